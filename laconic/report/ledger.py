"""The ledger: every parameter and buffer once, its sum, and what was left alone, grouped by the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import text
from .record import get

__all__ = ["Group", "Total", "left_alone", "schemes", "shape", "total"]


class Total(NamedTuple):
    """The sum of the ledger against the size of the file."""

    tensors: int
    header: int
    padding: int
    bytes: int
    equal: bool | None  # None: the file's size is not recorded
    sentence: str


class Group(NamedTuple):
    """Entries that were left alone for one reason."""

    reason: str
    names: list[str]
    bytes: int


def total(record: Mapping) -> Total:
    """Rows, header and padding added up, and whether that is the file's size."""
    tensors = sum(row.get("bytes") or 0 for row in record.get("ledger") or [])
    header, padding = record.get("ledger_header") or 0, record.get("ledger_padding") or 0
    whole, file = tensors + header + padding, get(record, "after", "size")
    if file is None:
        return Total(
            tensors, header, padding, whole, None, f"{whole:,} bytes; the file's size was not recorded"
        )
    if whole == file:
        return Total(tensors, header, padding, whole, True, f"equals the file's size of {file:,} bytes")
    gap = f"{abs(whole - file):,} bytes {'more' if whole > file else 'less'} than the file's {file:,} bytes"
    return Total(tensors, header, padding, whole, False, f"does not equal the file's size: {gap}")


def left_alone(record: Mapping) -> list[Group]:
    """Ledger rows without a scheme, grouped by reason, most bytes first."""
    groups: dict[str, tuple[list[str], list[int]]] = {}
    for row in record.get("ledger") or []:
        if not row.get("scheme"):
            names, sizes = groups.setdefault(str(row.get("reason") or "no reason recorded"), ([], []))
            names.append(str(row.get("name")))
            sizes.append(row.get("bytes") or 0)
    found = [Group(reason, names, sum(sizes)) for reason, (names, sizes) in groups.items()]
    return sorted(found, key=lambda group: (-group.bytes, group.reason))


def schemes(record: Mapping) -> list[str]:
    """Every scheme that occurs in the ledger, in full."""
    return sorted({str(row["scheme"]) for row in record.get("ledger") or [] if row.get("scheme")})


def shape(row: Mapping) -> str:
    """A shape as people write it: 384 × 1536; a scalar has none."""
    dims = row.get("shape")
    return text.MISSING if dims is None else " × ".join(str(d) for d in dims) or "scalar"
