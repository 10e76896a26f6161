"""Reading a model's weights some rows at a time: to check them, to judge them by samples, to round them to nearest."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from laconic.core.units import Unit
from laconic.nn import matrix_view, pack_tensors
from laconic.numerics import Scheme, pack_codes
from laconic.quant import round_to_nearest

from .source import Source, check_finite

CHUNK = 1 << 23  # elements read at a time: 32 MiB of float32
SAMPLE = 1 << 20  # elements by which a unit is judged where reading it whole takes too much memory
PIECES = 16  # places in a parameter that a sample is taken from


def check_weights(source: Source) -> None:
    """Refuse weights that are not finite, reading some rows at a time.

    Raises:
        BadInput: naming the tensor.
    """
    for name in source.names():
        _, shape = source.spec(name)
        rows = shape[0] if shape else 0
        step = max(1, CHUNK // max(1, math.prod(shape[1:])))
        for begin in range(0, rows, step):
            check_finite(name, source.read(name, begin, min(begin + step, rows)))


def sample(source: Source, unit: Unit) -> Tensor:
    """About SAMPLE elements of a parameter, as rows from all over it; the whole where it is small or stored transposed."""
    rows, per_row = unit.shape[0], unit.numel // max(1, unit.shape[0])
    wanted = max(1, SAMPLE // max(1, per_row))
    if wanted >= rows or len(unit.shape) < 2 or unit.view == "transposed":
        return source.read(unit.name)
    pieces = min(PIECES, wanted)
    length = wanted // pieces
    starts = [i * (rows - length) // max(1, pieces - 1) for i in range(pieces)]
    return torch.cat([source.read(unit.name, begin, begin + length) for begin in starts])


def round_rows(read: Callable[[int, int], Tensor], unit: Unit, scheme: Scheme) -> dict[str, Tensor]:
    """Round a parameter to nearest and pack it, some rows of its first axis at a time.

    One that is stored transposed, or whose scales or table follow from all of it at once, is taken whole.

    Args:
        read: gives rows [begin, end) of the parameter's first axis.
        unit: of the parameter.
        scheme: how to store it.

    Returns:
        What is stored, and `loss`: the share of the weights' energy that is error.
    """
    spec = unit.spec(scheme)
    words = torch.empty(spec.tensors()["packed"][1], dtype=torch.int32)
    scales, zeros, loss, power = [], [], 0.0, 0.0
    whole = unit.view == "transposed" or scheme.whole or len(unit.shape) < 2
    leading = unit.shape[0]
    step = leading if whole else max(1, CHUNK // max(1, unit.numel // max(1, leading)))
    at, empty = 0, torch.zeros((0, 0), dtype=torch.uint8)
    for begin in range(0, leading, step):
        matrix = matrix_view(read(begin, min(begin + step, leading)), unit.view)
        solved = round_to_nearest(matrix, scheme, unit.name)
        words[at : at + matrix.shape[0]] = pack_codes(solved.codes, scheme.element).cpu()
        at, empty = at + matrix.shape[0], solved.codes[:0].cpu()
        scales.append(solved.scale.cpu())
        if solved.zero is not None:
            zeros.append(solved.zero.cpu())
        loss += solved.loss
        power += float(matrix.float().square().sum(dtype=torch.float64))
    stored = pack_tensors(spec, empty, torch.cat(scales), torch.cat(zeros) if zeros else None)
    stored["packed"] = words
    stored["loss"] = torch.tensor(loss / (power or 1.0), dtype=torch.float64)
    return stored
