"""Which files hold the weights of a folder, and what their headers say: all of it checked before it is believed."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.errors import BadInput

from .tensorfile_format import AGAIN, DTYPES, INDEX, MAX_HEADER, SINGLE

__all__ = ["PAD", "Entry", "is_padding", "parse_header", "read_header", "weight_files"]

PAD = re.compile(r"__pad_\d+")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` counts from the start of the file."""

    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None, int | None]:
    """The files that hold the weights of `path`, with the index's weight map and total size if it has one."""
    if path.is_file():
        return [path], None, None
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if (path / SINGLE).is_file():
        return [path / SINGLE], None, None
    if not (path / INDEX).is_file():
        raise BadInput(f"{path} holds neither {SINGLE} nor {INDEX}")
    try:
        index = json.loads((path / INDEX).read_bytes())
        weight_map = index["weight_map"]
        total = index.get("metadata", {}).get("total_size")
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path / INDEX} is not a valid index (no usable weight_map): {AGAIN}") from error
    for file in files:
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise BadInput(f"{path / INDEX} names the shard {file!r}, which is not a plain file name")
        if not (path / file).is_file():
            lost = sum(other == file for other in weight_map.values())
            raise BadInput(f"{path / INDEX} names {file} ({lost} tensors), which is missing: {AGAIN}")
    return [path / file for file in files], weight_map, total if isinstance(total, int) else None


def read_header(descriptor: int, file: Path, size: int) -> tuple[bytes, int]:
    """The JSON bytes of the header and the offset where the data starts."""
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise BadInput(f"{file} has only {size} bytes and is not a safetensors file: {AGAIN}")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER:
        raise BadInput(
            f"{file} claims a header of {length} bytes, above the format's 100 MB: it is no safetensors file"
        )
    if length > size - 8:
        raise BadInput(f"{file} claims a header of {length} bytes but has only {size} bytes: it is cut short, {AGAIN}")
    return os.pread(descriptor, length, 8), 8 + length


def parse_header(raw: bytes, file: Path, number: int, start: int, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Check the header of one file entirely; return its metadata and its tensors in file order."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"{file}: the header has the key {twice!r} twice: {AGAIN}")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: the header is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(header, dict):
        raise BadInput(f"{file}: the header is not a JSON object: {AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{file}: __metadata__ in the header is not a map of strings: {AGAIN}")
    entries = [(name, _entry(name, fields, file, number, start)) for name, fields in header.items()]
    entries.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end, before = start, "the header"
    for name, entry in entries:
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else f"leaves a hole of {entry.offset - end} bytes behind"
            raise BadInput(f"{file}: tensor {name} {what} {before}, so the header is wrong: {AGAIN}")
        end, before = entry.offset + entry.nbytes, name
        if end > size:
            raise BadInput(
                f"{file} is cut short: tensor {name} ends at byte {end} but the file has {size} bytes "
                f"(half a checkpoint): {AGAIN}"
            )
    if end != size:
        raise BadInput(f"{file} has {size - end} bytes behind its last tensor, unknown to its header: {AGAIN}")
    return metadata, dict(entries)


def _entry(name: str, fields: Any, file: Path, number: int, start: int) -> Entry:
    """One tensor's entry from its header fields, checked by itself."""
    try:
        code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{file}: tensor {name} lacks dtype, shape or data_offsets: {AGAIN}") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise BadInput(f"{file}: tensor {name} has dtype {code!r}, which laconic does not read: convert it first")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise BadInput(f"{file}: tensor {name} has shape {shape!r}, which is not a list of sizes: {AGAIN}")
    if not _is_count(begin) or not _is_count(end) or end < begin:
        raise BadInput(f"{file}: tensor {name} has offsets [{begin!r}, {end!r}], not a range: {AGAIN}")
    dtype = DTYPES[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise BadInput(
            f"{file}: tensor {name} of shape {shape} and dtype {code} takes {nbytes} bytes, but the header "
            f"gives it {end - begin}: {AGAIN}"
        )
    return Entry(number, dtype, tuple(shape), start + begin, nbytes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_padding(name: str, entry: Entry) -> bool:
    """Whether an entry only fills the space between tensors."""
    return PAD.fullmatch(name) is not None and entry.dtype is torch.uint8 and len(entry.shape) == 1
