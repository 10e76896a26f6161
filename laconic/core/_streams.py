"""Reading a trace: the residual streams that layer norms read, and everything that writes to them.

A stream is a sum over d channels that is read by layer norms alone. Back from what a norm reads, sums, views, dropout and
products with numbers lead to its writers: linear layers, convolutions, tables of embeddings and bare parameters. Where
all of these write vectors of mean zero, so are all their sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ._norms import _keeps_channels
from ._trace import CASTS, VIEWS, Held, Step, Trace
from ._uses import PRODUCTS, RIGHT

__all__ = ["Stream", "Writer", "streams_of"]

LAYER_NORMS = ("layer_norm", "native_layer_norm")
CONVS = tuple(f"conv{n}d" for n in (1, 2, 3)) + ("convolution",)
POST = "which has a mean of its own (Post-LN): exchange it by laconic.swap, and train on"
DROPOUTS = ("dropout", "feature_dropout", "native_dropout")


@dataclass(frozen=True)
class Writer:
    """A parameter whose values are written to a stream.

    Attributes:
        name: canonical name of the parameter.
        axis: the axis of its channels.
        module: path of the module that reads it there.
    """

    name: str
    axis: int
    module: str


@dataclass(frozen=True)
class Stream:
    """A sum that layer norms read.

    Attributes:
        norms: paths of the layer norms, in the order of the forward pass.
        writers: the parameters that are written to it.
        width: d.
        reason: why its mean cannot be taken away at the writers; "" if it can.
    """

    norms: tuple[str, ...]
    writers: tuple[Writer, ...]
    width: int
    reason: str


@dataclass
class _Found:
    """What the way back from one norm met."""

    norms: dict[str, None] = field(default_factory=dict)
    values: set[int] = field(default_factory=set)
    writers: dict[Writer, None] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)

    def join(self, other: _Found) -> None:
        self.norms |= other.norms
        self.values |= other.values
        self.writers |= other.writers
        self.reasons |= other.reasons


def streams_of(trace: Trace) -> tuple[Stream, ...]:
    """Every stream that a layer norm reads."""
    found: list[_Found] = []
    for step in trace.steps:
        if step.op not in LAYER_NORMS or step.source in trace.held:
            continue
        last = len(trace.shapes[step.source]) - 1
        mine = _Found({step.module: None})
        _back(trace, step.source, last, mine)
        for other in [one for one in found if one.values & mine.values]:
            found.remove(other)
            other.join(mine)
            mine = other
        found.append(mine)
    return tuple(_stream(trace, one) for one in found)


def _stream(trace: Trace, found: _Found) -> Stream:
    inside = {id(step) for value in found.values for step in [trace.producers.get(value)] if step is not None}
    for value in sorted(found.values):
        if value in trace.results:
            found.reasons["the model returns it as it is"] = None
        for step, _ in trace.consumers[value]:
            if step.op in LAYER_NORMS and step.module in found.norms or id(step) in inside:
                continue
            found.reasons[f"{step.op} in {step.module or 'the model'} reads it as it is"] = None
    behind = [reason for reason in found.reasons if reason.endswith(POST)]
    reasons = behind[:1] or list(found.reasons)  # that a Post-LN stream is read by other things goes without saying
    start = next(step for step in trace.steps if step.op in LAYER_NORMS and step.module in found.norms)
    width = trace.shapes[start.source][-1]
    return Stream(tuple(found.norms), tuple(found.writers), width, "; ".join(reasons))


def _back(trace: Trace, value: int, axis: int, found: _Found) -> None:
    """Follow a value, whose channels lie on `axis`, back to what is written there."""
    todo = [(value, axis)]
    while todo:
        value, axis = todo.pop()
        if value in found.values:
            continue
        held = trace.held.get(value)
        if held is not None:
            _parameter(trace, value, axis, held, found)
            continue
        found.values.add(value)
        step = trace.producers.get(value)
        if step is None:
            found.reasons["an input of the model goes into it"] = None
            continue
        further = list(_sources(trace, step, value, axis, found))
        todo += reversed(further)


def _sources(trace: Trace, step: Step, value: int, axis: int, found: _Found) -> Iterator[tuple[int, int]]:
    """(value, axis) of what a step passes on; notes writers and what it cannot follow."""
    shapes, last = trace.shapes, len(trace.shapes[value]) - 1
    width = shapes[value][axis]
    where = step.module or "the model"
    if not step.inputs:
        found.reasons[f"{step.op} in {where} writes to it"] = None
    elif step.op == "add" and len(step.inputs) == 2 and axis == last:
        for _, source in step.inputs:
            if not shapes[source] or shapes[source][-1] != width:
                found.reasons[f"{where} adds one number to all its channels"] = None
                continue
            yield source, len(shapes[source]) - 1
    elif step.op in ("mul", "div") and _by_rows(trace, step, value) or step.op in DROPOUTS or step.op in CASTS:
        yield step.source, axis
    elif step.op == "cat" and step.options.get("dim", 0) % (last + 1) != axis:
        for _, source in step.inputs:
            yield source, axis
    elif step.op in PRODUCTS:
        _product(trace, step, axis == last, found)
    elif step.op == "embedding" and (tables := [v for name, v in step.inputs if name == "weight" and v in trace.held]):
        _write(trace, step, tables[0], 1, found)
    elif step.op in CONVS and axis == 1:
        for argument, source in step.inputs:
            if argument in ("weight", "bias") and source in trace.held:
                _write(trace, step, source, 0, found)
    elif step.op in LAYER_NORMS:
        found.reasons[f"it holds what the norm {where} gives, {POST}"] = None
    elif (moved := _moved(trace, step, value, axis)) is not None:
        yield step.source, moved
    else:
        found.reasons[f"{step.op} in {where} writes to it"] = None


def _by_rows(trace: Trace, step: Step, value: int) -> bool:
    """Whether a product has one number, or one to a row, beside the value."""
    others = [source for _, source in step.inputs[1:]]
    return trace.shapes[step.source] == trace.shapes[value] and all(
        not trace.shapes[other] or trace.shapes[other][-1] == 1 for other in others
    )


def _moved(trace: Trace, step: Step, value: int, axis: int) -> int | None:
    """The channels' axis before a step that only moves values about; None if it does something else."""
    before, after = trace.shapes[step.source], trace.shapes[value]
    if _keeps_channels(trace, step, step.source) and axis == len(after) - 1:
        return len(before) - 1
    if step.op == "transpose":
        dims = [int(step.options.get(name, 0)) % len(before) for name in ("dim0", "dim1")]
        return dims[1 - dims.index(axis)] if axis in dims else axis
    order = step.options.get("dims")
    if step.op == "permute" and isinstance(order, (tuple, list)) and len(order) == len(after):
        return int(order[axis]) % len(before)
    # What is behind the channels' axis may be put together, as the places of a picture are.
    if step.op in VIEWS and before[: axis + 1] == after[: axis + 1]:
        return axis
    return None


def _parameter(trace: Trace, value: int, axis: int, held: Held, found: _Found) -> None:
    """A bare parameter that is added, seen through slices of other axes and expansions."""
    own = next((v for v, name in trace.parameters.items() if name == held.name), None)
    width, shape = trace.shapes[value][axis], () if own is None else trace.shapes[own]
    if held.turned or not shape or shape[-1] != width or axis != len(trace.shapes[value]) - 1:
        found.reasons[f"{held.name} is written to it in a form of its own"] = None
        return
    found.writers[Writer(held.name, len(shape) - 1, held.name.rpartition(".")[0])] = None


def _product(trace: Trace, step: Step, last: bool, found: _Found) -> None:
    weights = [value for argument, value in step.inputs if argument in RIGHT and value in trace.held]
    where = step.module or "the model"
    if len(weights) != 1 or not last or trace.held[weights[0]].ndim != 2 or trace.held[weights[0]].part:
        found.reasons[f"{step.op} in {where} writes to it, and not by a weight of its own"] = None
        return
    held = trace.held[weights[0]]
    turned = held.turned if step.op == "linear" else not held.turned  # stored (in, out)
    _write(trace, step, weights[0], 1 if turned else 0, found)
    for argument, value in step.inputs:
        if argument == "bias" or (step.op == "addmm" and argument == "self"):
            if value in trace.held:
                _write(trace, step, value, 0, found)
            else:
                found.reasons[f"{where} adds a bias that is computed"] = None


def _write(trace: Trace, step: Step, value: int, axis: int, found: _Found) -> None:
    found.writers[Writer(trace.held[value].name, axis, step.module)] = None
