"""The plan: what would happen, from shapes alone, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laconic.core.structure import Structure
from laconic.core.units import Unit
from laconic.errors import Impossible
from laconic.nn import storage_names
from laconic.numerics import Scheme

from .budget import Budget
from .source_base import Source, stored_names
from .tensorfile import FileLayout, file_layout

RUNTIME = 450 << 20  # resident bytes of Python, torch and transformers before any model
SPEED = 4e10  # multiply-adds a second that a plan assumes; the report has the measured time
Specs = list[tuple[str, torch.dtype, tuple[int, ...]]]


@dataclass
class Ground:
    """A model ready to be planned: its units, and what else its file holds.

    Attributes:
        source: of the model.
        model: the float model, or its skeleton on meta where it is not loaded whole.
        structure: of it.
        units: every parameter.
        others: buffers that the file holds, by name.
        streamed: whether the float model is never whole in memory.
        folded: (layer, batch norm) pairs that were folded.
    """

    source: Source
    model: nn.Module
    structure: Structure
    units: list[Unit]
    others: dict[str, torch.Tensor]
    streamed: bool
    folded: list[tuple[str, str]]

    @property
    def packable(self) -> list[Unit]:
        """The units that may be packed."""
        return [u for u in self.units if u.options]

    def specs(self, decision: Mapping[str, Scheme | None]) -> Specs:
        """Every tensor of the file under a decision."""
        found: Specs = []
        for unit in self.units:
            scheme = decision.get(unit.name)
            if scheme is None:
                found.append((unit.name, unit.dtype, unit.shape))
            else:
                spec = unit.spec(scheme)
                stored = spec.tensors()
                found += [(name, *stored[suffix]) for suffix, name in storage_names(unit.name, spec).items()]
        return found + [(name, b.dtype, tuple(b.shape)) for name, b in self.others.items()]

    def layout(self, decision: Mapping[str, Scheme | None]) -> FileLayout:
        """The exact file under a decision."""
        return file_layout(self.specs(decision), METADATA)

    def least(self) -> int:
        """Bytes of the smallest file that the options allow."""
        return self.layout({u.name: u.options[-1] for u in self.packable}).total_bytes


METADATA = {"format": "pt", "laconic": "1"}


def other_tensors(model: nn.Module, units: Sequence[Unit]) -> dict[str, torch.Tensor]:
    """Persistent buffers of a model."""
    parameters = {u.name for u in units}
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in stored_names(model) if name not in parameters}


def check_possible(ground: Ground, budget: Budget) -> int | None:
    """The byte ceiling, if shapes allow it.

    Raises:
        Impossible: with the least figure that can be reached.
    """
    ceiling = budget.ceiling(ground.source.size_before)
    if ceiling is None:
        return None
    least = ground.least()
    if least > ceiling:
        ratio = math.floor(100 * ground.source.size_before / least) / 100  # down: it can be asked for as it is printed
        raise Impossible(
            f"a size of {ceiling:,} bytes cannot be reached for {ground.source.name}: the least is {least:,} bytes "
            f"({ratio:.2f}x smaller), with everything that can be packed at its fewest bits"
        )
    return ceiling


def peak_estimate(ground: Ground, data: bool) -> int:
    """Peak resident bytes that the work will need, roughly."""
    floats = sum(u.nbytes for u in ground.units)
    largest = max((u.nbytes for u in ground.units), default=0)
    if ground.streamed:
        return RUNTIME + largest + (256 << 20)
    return RUNTIME + floats * (3 if data else 2) + 4 * largest


def plan_record(
    ground: Ground, budget: Budget, ceiling: int | None, decision: Mapping[str, Scheme | None], tokens: int
) -> dict[str, Any]:
    """The plan as data, for tables and JSON."""
    layout = ground.layout(decision)
    macs = sum(u.numel * max(1, u.calls) for u in ground.packable if u.op in ("linear", "conv", "experts"))
    seconds = 10 + 4 * macs * tokens / SPEED + 60 * sum(u.numel for u in ground.packable) / 1e9
    return {
        "model": ground.source.name,
        "size_before": ground.source.size_before,
        "size_after": layout.total_bytes,
        "ratio": ground.source.size_before / layout.total_bytes,
        "least": ground.least(),
        "ceiling": ceiling,
        "budget": budget.text,
        "peak_rss_estimate": peak_estimate(ground, tokens > 0),
        "seconds_estimate": seconds,
        "streamed": ground.streamed,
        "units": [
            {
                "name": u.name,
                "op": u.op,
                "kernel": f"laconic::{u.op}" if u.op != "parameter" else "dequantized on access",
                "scheme": str(s) if (s := decision.get(u.name)) is not None else None,
                "bits": s.bits if s is not None else None,
                "bytes_before": u.nbytes,
                "bytes_after": u.stored(s),
                "calls": u.calls,
                "reason": u.reason or (None if s is not None else "left as it is: the budget allows it"),
            }
            for u in ground.units
        ],
        "notes": list(ground.source.notes) + list(ground.structure.notes),
    }
