"""Rewrites of the float model before anything is rounded: smoothquant, awq, rotate. What it computes stays the same.

Each is a pass of the catalogue (`laconic.quant`); here it gets what it needs to know of the data, leaves alone what the
user excluded, and says what it could not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laconic.core import passes
from laconic.core.record import Record, apply_records
from laconic.core.rotation import ties_in_the_way, untie
from laconic.core.structure import Structure
from laconic.core.units import matches
from laconic.errors import BadInput
from laconic.numerics import Scheme
from laconic.quant import AWQ, Rotate, SmoothQuant

from . import recipe
from .observe import output_absmax
from .plan import Ground
from .source_weights import few
from .walk import Inputs, run_all

Note = Callable[[str], None]


@dataclass(frozen=True)
class Sight:
    """What rewriting may look at.

    Attributes:
        task, batches: calibration data; no batches where there is none.
        exclude: patterns of parameters that no pass may touch.
        seed: of signs and matrices.
        note: takes sentences for the report.
    """

    task: Any
    batches: Sequence[Any]
    exclude: Sequence[str]
    seed: int
    note: Note


def pass_of(step: recipe.Rewrite) -> SmoothQuant | AWQ | Rotate:
    """The pass that a step of a recipe names."""
    if isinstance(step, recipe.SmoothQuant):
        return SmoothQuant(step.alpha)
    if isinstance(step, recipe.AWQ):
        return AWQ(Scheme.parse(step.scheme), step.grid)
    return Rotate(step.kind, stream=step.stream, value=step.value, heads=step.heads, ffn=step.ffn)


def rewrite(
    ground: Ground, steps: Iterable[recipe.Rewrite], sight: Sight, again: Callable[[Ground], None]
) -> list[Record]:
    """Do the steps to a model in memory, in order.

    Args:
        ground: of the model, which is changed in place.
        steps: of the recipe.
        sight: what they may look at.
        again: finds structure and units of the ground anew, after a step that changed names or shapes.

    Returns:
        The records; their tensors are dropped, since the model's file holds the values.
    """
    records: list[Record] = []
    for step in steps:
        one = pass_of(step)
        if ground.streamed:
            sight.note(f"{one.id} was left out: the float model does not fit under --max-ram")
        elif "data" in one.needs and not sight.batches:
            sight.note(f"{one.id} was left out: it needs data")
        else:
            with torch.no_grad():
                records += _untied(ground, sight, again) if isinstance(one, Rotate) and one.stream else []
                records += _changed(ground, one, sight)
            if isinstance(one, Rotate):
                again(ground)
    return [Record(r.action, r.path, r.data) for r in records]


def _untied(ground: Ground, sight: Sight, again: Callable[[Ground], None]) -> list[Record]:
    """Give readers of streams weights of their own: a head that is tied to the embeddings absorbs a gain they do not."""
    ties = {} if sight.exclude else ties_in_the_way(ground.structure)
    records = [untie(name, others) for name, others in ties.items()]
    if records:
        sight.note(f"{few(list(ties))} is stored twice: once turned, a tied weight is no longer the same at both ends")
        apply_records(ground.model, records)
        again(ground)
    return records


def _changed(ground: Ground, one: SmoothQuant | AWQ | Rotate, sight: Sight) -> list[Record]:
    """Apply a pass to every place that it can change."""
    model, structure = ground.model, ground.structure
    planned = one.plan(structure, model)
    ctx = _context(ground, one, planned, sight)
    left = dict(planned.skipped)
    records = []
    for path in planned.units:
        if not _seen(one, structure, path, ctx):
            left[path] = "it does not run on this data"
            continue
        try:
            record = one.solve(path, planned, ctx)
        except ValueError as error:  # values that are not finite, for instance
            raise BadInput(f"{one.id} stopped: {error}") from error
        touched = [f"{path}.weight", *record.data.get("readers", ()), *record.data.get("shapes", ())]
        if any(matches(pattern, name) for pattern in sight.exclude for name in touched):
            left[path] = "it, or what reads it, is named by --exclude"
            continue
        one.apply(model, record)
        records.append(record)
    if not records and not left:
        sight.note(f"{one.id} found nothing in this model that it could change")
    if left:
        first, reason = next(iter(left.items()))
        why = reason.removeprefix(f"{first}: ")
        sight.note(
            f"{one.id} left {few(list(left))} as {'it is' if len(left) == 1 else 'they are'}: "
            f"{why if len(left) == 1 else f'{first}, since {why}'}"
        )
    return records


def _seen(one: SmoothQuant | AWQ | Rotate, structure: Structure, path: str, ctx: passes.Context) -> bool:
    """Whether the calibration data reached what a pass looks at."""
    if isinstance(one, SmoothQuant):
        return path in ctx.absmax
    return not isinstance(one, AWQ) or any(module in ctx.hessians for module in structure.norms[path].modules)


def _context(ground: Ground, one: SmoothQuant | AWQ | Rotate, planned: passes.Decision, sight: Sight) -> passes.Context:
    """What a pass solves from, looked up on the calibration data."""
    model, structure = ground.model, ground.structure
    if isinstance(one, SmoothQuant):
        absmax = output_absmax(model, sight.task, planned.units, sight.batches)
        for path, most in absmax.items():
            _finite(f"the output of {path}", most)
        return passes.Context(model, structure, absmax=absmax, seed=sight.seed)
    if isinstance(one, AWQ):
        return passes.Context(model, structure, hessians=_reader_inputs(ground, planned, sight), seed=sight.seed)
    return passes.Context(model, structure, seed=sight.seed)


def _reader_inputs(ground: Ground, planned: passes.Decision, sight: Sight) -> dict[str, Any]:
    """Second moments of what the first reader of each norm gets: all of its readers get the same."""
    readers = [ground.structure.norms[norm].modules[0] for norm in planned.units]
    modules = {path: ground.model.get_submodule(path) for path in readers}
    inputs = Inputs(modules, set(modules))
    run_all(ground.model, sight.task, sight.batches, inputs)
    found = inputs.result()
    for path, stats in found.items():
        _finite(f"the input of {path}", stats.mean)
    return dict(found)


def _finite(what: str, values: Tensor) -> None:
    """Refuse what comes of activations that overflowed.

    Raises:
        BadInput: with the module's path.
    """
    if not bool(torch.isfinite(values).all()):
        raise BadInput(f"{what} holds inf or nan on the calibration data: the float model overflows there")
