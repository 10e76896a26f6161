"""Solving a model that does not fit in memory: one parameter at a time, some rows at a time, rounded to nearest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from laconic.core.record import Record
from laconic.nn import matrix_view, pack_tensors
from laconic.numerics import Scheme, pack
from laconic.quant import round_to_nearest

from .plan import Ground
from .solve import record_of
from .source import Source, check_finite
from .units import Unit
from .workspace import Workspace, digest

CHUNK = 1 << 23  # elements read at a time: 32 MiB of float32


def solve_streamed(
    ground: Ground,
    decision: Mapping[str, Scheme | None],
    workspace: Workspace,
    digests: Mapping[str, str],
    max_ram: int | None,
    progress: Callable[[int, int, str], None],
) -> list[Record]:
    """Records of all packed units. Their tensors stay on disk: `data["key"]` names them in the workspace."""
    records = []
    todo = [u for u in ground.units if decision.get(u.name) is not None]
    for number, unit in enumerate(todo):
        scheme = decision[unit.name]
        assert scheme is not None
        key = digest("unit", 1, unit.name, str(scheme), "rtn", digests[unit.name])
        tensors = workspace.load(key)
        if tensors is None:
            tensors = _solve_rows(ground, unit, scheme)
            workspace.save(key, tensors)
        record = record_of(unit, scheme, {}, {"method": "rtn", "loss": float(tensors["loss"]), "key": key})
        records.append(record)
        progress(number + 1, len(todo), unit.name)
    return records


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


def _solve_rows(ground: Ground, unit: Unit, scheme: Scheme) -> dict[str, Tensor]:
    """Pack a parameter reading some rows at a time (a transposed one, or one with a single scale, is read whole)."""
    rows, k = unit.spec(scheme).matrix
    words = torch.empty(unit.spec(scheme).tensors()["packed"][1], dtype=torch.int32)
    scales, zeros, loss, power = [], [], 0.0, 0.0
    whole = unit.view == "transposed" or scheme.scale.granularity == "tensor" or len(unit.shape) < 2
    leading = unit.shape[0]
    step = leading if whole else max(1, CHUNK // max(1, unit.numel // max(1, leading)))
    at = 0
    for begin in range(0, leading, step):
        value = ground.source.read(unit.name, begin, min(begin + step, leading))
        matrix = matrix_view(value, unit.view)
        solved = round_to_nearest(matrix, scheme, unit.name)
        words[at : at + matrix.shape[0]] = pack(solved.codes, scheme.bits)
        at += matrix.shape[0]
        scales.append(solved.scale)
        if solved.zero is not None:
            zeros.append(solved.zero)
        loss += solved.loss
        power += float(matrix.float().square().sum(dtype=torch.float64))
    empty = torch.zeros((0, k), dtype=torch.uint8)
    stored = pack_tensors(unit.spec(scheme), empty, torch.cat(scales), torch.cat(zeros) if zeros else None)
    stored["packed"] = words
    stored["loss"] = torch.tensor(loss / (power or 1.0), dtype=torch.float64)
    return stored
