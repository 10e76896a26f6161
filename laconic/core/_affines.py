"""Reading a trace: where the scale and shift of a norm can go, into its readers or into the layer before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ._batchnorms import _own_weight
from ._norms import _beyond_views, _multiplied_by, _views_of
from ._trace import Names, Step, Trace, module_of
from ._uses import OPS, Use

__all__ = ["Around", "Reader", "affines_of"]


@dataclass(frozen=True)
class Reader:
    """A layer that multiplies a norm's output by a weight.

    Attributes:
        module: its path.
        weight: canonical name of the weight.
        transposed: the weight is stored (in, out).
        shared: the weight is read in other places too: by other modules ("tied") or by this one again ("twice").
    """

    module: str
    weight: str
    transposed: bool
    shared: str


@dataclass(frozen=True)
class Around:
    """What lies around a module that works per channel.

    Attributes:
        before: path of the linear layer or convolution that alone makes its input, on the same channels.
        not_before: why there is none, "" if there is.
        readers: everything that sees its output, if all of it multiplies the channels by weights.
        not_after: why that is not so, "" if it is.
    """

    before: str
    not_before: str
    readers: tuple[Reader, ...]
    not_after: str


def affines_of(trace: Trace, reads: list[tuple[str, Use]], names: Names, axes: Mapping[str, int]) -> dict[str, Around]:
    """What lies around some modules.

    Args:
        trace: of the model.
        reads: of its parameters.
        names: of its modules.
        axes: path of a module -> the axis that its channels lie on.
    """
    counts = Counter(name for name, _ in reads)
    calls = Counter(trace.order)
    found = {}
    for path, axis in axes.items():
        steps = [step for step in trace.steps if _inside(step.module, path)]
        reason = _reason_within(trace, reads, names, path, calls)
        given = _given(trace, steps)
        leaving = _leaving(trace, steps)
        if not reason and (len(given), len(leaving)) != (1, 1):
            reason = f"it reads {len(given)} tensors and gives {len(leaving)}, where one and one are wanted"
        if reason:
            found[path] = Around("", reason, (), reason)
            continue
        before, not_before = _before(trace, names, steps, given[0], axis, counts, calls)
        readers, not_after = _after(trace, names, reads, leaving[0], axis, counts)
        found[path] = Around(before, not_before, readers, not_after)
    return found


def _inside(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _reason_within(trace: Trace, reads: list[tuple[str, Use]], names: Names, path: str, calls: Counter[str]) -> str:
    """Why the module itself, whatever lies around it, cannot go."""
    if calls[path] != 1:
        return f"it is called {calls[path]} times"
    groups = names.groups()
    for canonical, group in groups.items():
        mine = [name for name in group if _inside(module_of(name), path)]
        if mine and len(mine) < len(group):
            other = next(name for name in group if name not in mine)
            return f"{mine[0]}, its own, is tied to {other}"
        reader = next(
            (use.module for name, use in reads if mine and name == canonical and not _inside(use.module, path)), None
        )
        if reader is not None:
            return f"{mine[0]}, its own, is read by {reader or 'the model'} too"
    return ""


def _given(trace: Trace, steps: list[Step]) -> list[int]:
    """The activations that some steps read from outside."""
    made = {value for step in steps for value in step.outputs}
    read = [value for step in steps for _, value in step.inputs]
    return [
        value
        for value in dict.fromkeys(read)
        if value not in made and value not in trace.held and value not in trace.buffers
    ]


def _leaving(trace: Trace, steps: list[Step]) -> list[int]:
    """The values of some steps that others see."""
    own = {id(step) for step in steps}
    return [
        value
        for step in steps
        for value in step.outputs
        if value in trace.results or any(id(reader) not in own for reader, _ in trace.consumers[value])
    ]


def _before(
    trace: Trace,
    names: Names,
    steps: list[Step],
    given: int,
    axis: int,
    counts: Counter[str],
    calls: Counter[str],
) -> tuple[str, str]:
    own = {id(step) for step in steps}
    maker = trace.producers.get(given)
    weight = None if maker is None else _own_weight(trace.held, maker, names)
    if maker is None or weight is None:
        return "", f"its input is made by {maker.op if maker else 'the caller'}, not by a linear layer or a convolution"
    if given in trace.results or any(id(reader) not in own for reader, _ in trace.consumers[given]):
        return "", f"the output of {maker.module} is read in other places too"
    if calls[maker.module] != 1 or any(counts[trace.held[v].name] > 1 for _, v in maker.inputs if v in trace.held):
        return "", f"{maker.module} is called more than once, or shares its weights"
    ndim = len(trace.shapes[given])
    made_on = ndim - 1 if maker.op == "linear" else 1
    if axis % ndim != made_on or (maker.op != "linear" and ndim != weight.ndim):
        return "", f"its channels are not those of {maker.module}"
    return maker.module, ""


def _after(
    trace: Trace, names: Names, reads: list[tuple[str, Use]], leaving: int, axis: int, counts: Counter[str]
) -> tuple[tuple[Reader, ...], str]:
    if trace.results & _views_of(trace, leaving):
        return (), "the model returns its output"
    ndim = len(trace.shapes[leaving])
    last = axis % ndim == ndim - 1
    seen = (
        _beyond_views(trace, leaving) if last else ((s, argument, leaving) for s, argument in trace.consumers[leaving])
    )
    readers: dict[str, Reader] = {}
    for step, argument, at in seen:
        if last:
            weight = _multiplied_by(trace.held, step, argument, at)
        else:
            weight = (
                _own_weight(trace.held, step, names) if OPS.get(step.op) == "conv" and argument == "input" else None
            )
            if weight is not None and (weight.ndim != ndim or axis % ndim != 1):
                weight = None
        if weight is None or (last and weight.ndim != 2):
            return (), f"its output also goes to {step.op} in {step.module or 'the model'}"
        where = [use.module for name, use in reads if name == weight.name]
        shared = "" if counts[weight.name] == 1 else "twice" if where.count(step.module) > 1 else "tied"
        turned = any(use.transposed for name, use in reads if name == weight.name and use.module == step.module)
        readers[step.module] = Reader(step.module, weight.name, turned, shared)
    return (tuple(readers.values()), "") if readers else ((), "nothing reads its output")
