"""The ledger: every parameter and buffer of a model once, with its scheme, its bytes, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from laconic.core.record import Record
from laconic.numerics import Scheme

from .plan import Ground

LEFT = "left as it is: the budget allows it"


def ledger(
    ground: Ground, decision: Mapping[str, Scheme | None], packed: Mapping[str, Record], corrected: set[str]
) -> list[dict[str, Any]]:
    """One row for each parameter and buffer in the file.

    Args:
        ground: the model.
        decision: how each unit is stored.
        packed: records by path.
        corrected: biases that took up the mean of rounding errors.
    """
    rows = []
    for unit in ground.units:
        scheme = decision.get(unit.name)
        stored = unit.spec(scheme).tensors().values() if scheme is not None else [(unit.dtype, unit.shape)]
        size = sum(nbytes(dtype, shape) for dtype, shape in stored)
        method = packed[unit.name].data["method"] if unit.name in packed else None
        reason = None if scheme is not None else unit.reason or LEFT
        if unit.name in corrected:
            method, reason = "bias_correction", "stored as it is; took up the mean of its layer's rounding errors"
        rows.append(
            {
                "name": unit.name, "names": list(unit.names), "dtype": str(unit.dtype).removeprefix("torch."),
                "shape": list(unit.shape), "bytes": size, "scheme": str(scheme) if scheme is not None else None,
                "method": method, "reason": reason,
                "speed": None if scheme is None else "packed op" if unit.op != "parameter" else "no speed: dequantized on access",
            }
        )  # fmt: skip
    for name, buffer in ground.others.items():
        rows.append(
            {
                "name": name, "names": [name], "dtype": str(buffer.dtype).removeprefix("torch."),
                "shape": list(buffer.shape), "bytes": nbytes(buffer.dtype, tuple(buffer.shape)), "scheme": None,
                "method": None, "reason": "a buffer, not a weight", "speed": None,
            }
        )  # fmt: skip
    return rows


def coverage(ground: Ground, decision: Mapping[str, Scheme | None]) -> float:
    """Elements stored below source width, over all elements of unique storages."""
    total = sum(u.numel for u in ground.units) + sum(b.numel() for b in ground.others.values())
    packed = sum(u.numel for u in ground.units if decision.get(u.name) is not None)
    return packed / total if total else 0.0


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)
