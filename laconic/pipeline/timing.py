"""Milliseconds: of the layers of a model as float and packed, and of a whole packed model before it is solved.

A latency ceiling needs times before there is anything to time. The time of a packed layer depends on shapes and schemes
and not on values, so layers are timed on made-up codes, once for each kind; and a whole plan is timed on a model whose
packed tensors are all zeros.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laconic.core.record import FUSE, Record, apply_records
from laconic.core.units import Unit
from laconic.nn.blocks import blocks_of, why_not
from laconic.numerics import Scheme, read_scales

from .measure import run_batch

SLICE = 0.02  # seconds that one kind of layer is timed for, at least
ROUNDS = 5


def rows_seen(model: nn.Module, task: Any, batch: Any, units: Iterable[Unit]) -> dict[str, int]:
    """Rows of inputs (tokens) that each linear layer multiplies in one forward on a batch."""
    seen: dict[str, int] = {}

    def count(name: str, k: int, inputs: tuple[Any, ...]) -> None:
        if inputs and k:
            seen[name] = seen.get(name, 0) + inputs[0].numel() // k

    with ExitStack() as stack:
        for unit in units:
            if unit.op == "linear":
                for name in unit.names:
                    module = model.get_submodule(name.rpartition(".")[0])
                    k = unit.spec(unit.options[0]).matrix[1] if unit.options else 0
                    hook = lambda m, args, name=unit.name, k=k: count(name, k, args)  # noqa: E731
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        run_batch(task, model, batch)
    return seen


class LayerTimes:
    """Milliseconds of layers by their kind: shape, rows of inputs, scheme. Each kind is timed once."""

    def __init__(self, rows: Mapping[str, int]):
        self.rows = rows
        self._known: dict[tuple[Any, ...], float] = {}

    def extra(self, unit: Unit, scheme: Scheme | None, inputs: str) -> float:
        """Milliseconds that a unit costs more under a scheme than as it is, in one forward; negative is faster."""
        if scheme is None or unit.op == "embedding":  # a few rows are looked up: nothing that a clock would see
            return 0.0
        many = self.rows.get(unit.name, 0)
        if unit.op == "linear":
            if many == 0:
                return 0.0
            return self._time(unit, scheme, inputs, many) - self._time(unit, None, "", many)
        # Convolutions, experts and parameters are dequantized first; the float operation is the same.
        return self._time(unit, scheme, "", 0) * max(1, unit.calls)

    def _time(self, unit: Unit, scheme: Scheme | None, inputs: str, many: int) -> float:
        options = unit.options[0] if scheme is None else scheme
        rows, k = unit.spec(options).matrix
        key = (rows, k, many, str(scheme), inputs)
        if key not in self._known:
            self._known[key] = _milliseconds(_layer(rows, k, many, scheme, inputs))
        return self._known[key]


def _layer(rows: int, k: int, many: int, scheme: Scheme | None, inputs: str) -> Callable[[], Any]:
    """One linear layer on `many` rows of inputs, or, without inputs, the unpacking of its weight."""
    x = torch.randn(many, k)
    if scheme is None:
        weight = torch.randn(rows, k)
        return lambda: F.linear(x, weight)
    stored = {
        suffix: torch.randint(-(2**31), 2**31 - 1, shape).to(dtype) if dtype == torch.int32 else torch.ones(shape, dtype=dtype)
        for suffix, (dtype, shape) in scheme.tensors(rows, k).items()
    }  # fmt: skip
    codes, scale = stored["packed"], read_scales(stored, scheme, scheme.scales(rows, k))
    zero = None if scheme.beside is None else stored[scheme.beside]
    name = str(scheme.plain)
    if many == 0:
        return lambda: torch.ops.laconic.dequantize(codes, scale, zero, scheme=name, k=k, dtype=torch.float32)
    return lambda: torch.ops.laconic.linear(x, codes, scale, zero, scheme=name, inputs=inputs)


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median over rounds, after a first call that is not counted."""
    with torch.inference_mode():
        run()
        found: list[float] = []
        begin = time.perf_counter()
        while len(found) < ROUNDS or time.perf_counter() - begin < SLICE:
            start = time.perf_counter()
            run()
            found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def fuse_records(skeleton: nn.Module, records: Sequence[Record]) -> tuple[list[Record], dict[str, str]]:
    """Which blocks of a packed model run as compiled code, as records, and why others do not.

    Args:
        skeleton: the float model's structure, on meta; it is packed by this.
        records: of the packed parameters.
    """
    apply_records(skeleton, (Record(r.action, r.path, r.data) for r in records))
    reasons = {path: why_not(block, family) for path, block, family in blocks_of(skeleton)}
    return [Record(FUSE, path) for path, reason in reasons.items() if not reason], {
        p: r for p, r in reasons.items() if r
    }


def blank_model(skeleton: nn.Module, records: Sequence[Record], device: str) -> nn.Module:
    """A packed model of zeros, which takes as long as one that means something."""
    apply_records(skeleton, (Record(r.action, r.path, r.data) for r in records))
    made: dict[int, Any] = {}  # tied tensors stay tied
    for module in skeleton.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                zeros = torch.zeros(p.shape, dtype=p.dtype, device=device)
                module._parameters[name] = made.setdefault(id(p), nn.Parameter(zeros, requires_grad=False))
        for name, b in module._buffers.items():
            if b is not None:
                blank = torch.zeros(b.shape, dtype=b.dtype, device=device) if b.is_meta else b.to(device)
                module._buffers[name] = made.setdefault(id(b), blank)
    return skeleton.eval()
