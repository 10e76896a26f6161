"""Whether a tensor holds inf or nan, which no code stands for, and how many; and the errors of what cannot be stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NotFinite", "NotFiniteCount", "ScaleOutOfRange", "check_finite", "count_not_finite"]

CHUNK = 1 << 24  # elements looked at together: bounds the memory of the masks


class NotFinite(ValueError):
    """The tensor holds inf or nan, which no integer code stands for."""


class ScaleOutOfRange(ValueError):
    """A scale cannot be stored in the scheme's dtype (underflow or overflow): use float32 scales here."""


class NotFiniteCount(NamedTuple):
    """How many values of a tensor are nan, and how many are inf of either sign; (0, 0) if all are finite."""

    nan: int
    inf: int


def count_not_finite(x: Tensor) -> NotFiniteCount:
    """Count nan and inf in a tensor of any shape and type, a chunk at a time."""
    nan = inf = 0
    if x.is_floating_point():
        for piece in x.detach().reshape(-1).split(CHUNK):
            if piece.dtype.itemsize == 1:  # torch has no arithmetic on 8-bit floats
                piece = piece.float()
            if bool(torch.isfinite(piece.sum(dtype=torch.float32))):
                continue  # a finite sum proves that every element is finite, and costs a single pass
            nan += int(piece.isnan().sum())
            inf += int(piece.isinf().sum())
    return NotFiniteCount(nan, inf)


def check_finite(x: Tensor, name: str) -> None:
    """Raise `NotFinite` that names the tensor and counts its inf and nan."""
    found = count_not_finite(x)
    if any(found):
        raise NotFinite(f"{name}: {found.nan} nan and {found.inf} inf among {x.numel()} values")
