"""Reading a trace: the norms of a model, and who reads the output of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ._trace import CASTS, VIEWS, Held, Names, Step, Trace, module_of
from ._uses import PRODUCTS, RIGHT, Use

__all__ = ["Readers", "norms_of"]


@dataclass(frozen=True)
class Readers:
    """Who reads the output of a norm.

    Attributes:
        modules: paths of the modules that multiply the output by a weight of theirs: a linear layer, a
            router, or fused experts (whose weight is 3-D and not called `weight`: see `weights`).
        weights: canonical names of those weights, in the same order.
        offset: what the norm adds to its stored weight before it multiplies (1.0 in Gemma, 0.0 nearly
            everywhere).
        reason: why a per-channel scale can't move from the norm into `weights`; "" if it can, which means
            that `modules` is everything that sees the output and that nothing else reads these weights.
    """

    modules: tuple[str, ...]
    weights: tuple[str, ...]
    offset: float
    reason: str

    @property
    def complete(self) -> bool:
        """Whether a scale can move from the norm into its readers."""
        return not self.reason


def norms_of(trace: Trace, reads: list[tuple[str, Use]], names: Names) -> dict[str, Readers]:
    """Every module that normalizes and scales by a weight of its own, with the readers of its output."""
    weights = {
        use.module: name
        for name, use in reads
        if use.op == "norm" and use.role == "weight" and names.modules[module_of(name)] == use.module
    }
    steps: dict[str, list[Step]] = defaultdict(list)
    for step in trace.steps:
        steps[step.module].append(step)
    counts = Counter(name for name, _ in reads)
    return {
        path: _readers(trace, steps[path], counts)
        for path in weights
        if not any(step.op == "batch_norm" for step in steps[path])
    }


def _readers(trace: Trace, steps: list[Step], counts: Counter[str]) -> Readers:
    """Follow what leaves a norm, given its steps, to the products that read it."""
    own = {id(step) for step in steps}
    leaving = [
        value
        for step in steps
        for value in step.outputs
        if value in trace.results or any(id(reader) not in own for reader, _ in trace.consumers[value])
    ]
    reasons = _reasons_within(trace, steps, leaving, counts)
    modules: list[str] = []
    weights: list[str] = []
    for value in leaving:
        for step, argument, at in _beyond_views(trace, value):
            parameter = _multiplied_by(trace.held, step, argument, at)
            if id(step) in own:
                continue
            if parameter is None:
                reasons.append(f"its output also goes to {step.op} in {step.module or 'the model'}")
                continue
            if counts[parameter.name] > 1:
                reasons.append(f"{parameter.name}, which reads it, is read in other places too")
            if parameter.name not in weights:
                modules.append(step.module)
                weights.append(parameter.name)
        if trace.results & _views_of(trace, value):
            reasons.append("the model returns its output")
    if not modules and not reasons:
        reasons.append("nothing reads its output")
    offset = next((added for step in steps if (added := _added_to_weight(step, trace.held))), 0.0)
    return Readers(tuple(modules), tuple(weights), offset, "; ".join(dict.fromkeys(reasons)))


def _reasons_within(trace: Trace, steps: list[Step], leaving: list[int], counts: Counter[str]) -> list[str]:
    """Why the norm itself, whoever reads it, does not scale the last axis of one output."""
    reasons = []
    if len({step.call for step in steps}) > 1:
        reasons.append("it is called more than once")
    elif len(leaving) > 1:
        reasons.append(f"{len(leaving)} of its values are read outside")
    for step in steps:
        if step.op in ("group_norm", "instance_norm") and len(trace.shapes[step.source]) > 2:
            reasons.append("it scales the second axis and not the last")
        for value in [value for _, value in step.inputs if value in trace.held]:
            if sum(size != 1 for size in trace.shapes[value]) > 1:
                reasons.append("its weight has more than one axis")
            if counts[trace.held[value].name] > 1 and len({step.call for step in steps}) == 1:
                reasons.append(f"{trace.held[value].name}, its own, is read in other places too")
    return reasons


def _added_to_weight(step: Step, held: dict[int, Held]) -> float:
    """The constant that a step adds to a bare parameter."""
    if step.op != "add" or len(step.inputs) != 1 or step.source not in held:
        return 0.0
    return float(sum(option for option in step.options.values() if isinstance(option, (int, float))))


def _multiplied_by(held: dict[int, Held], step: Step, argument: str, value: int) -> Held | None:
    """The parameter on the right of a product that has an activation on its left."""
    if step.op not in PRODUCTS or argument not in ("input", "self", "mat1", "batch1"):
        return None
    if step.op in ("addmm", "baddbmm") and argument == "self":
        return None
    found = [held[other] for key, other in step.inputs if key in RIGHT and other in held and other != value]
    if len(found) != 1 or found[0].ndim not in (2, 3) or found[0].reshaped or found[0].part:
        return None
    return found[0]


# --- through views ----------------------------------------------------------------------------------


def _beyond_views(trace: Trace, value: int) -> Iterator[tuple[Step, str, int]]:
    """The steps that read a value, seen through those that keep its channels: (step, argument, value)."""
    for step, argument in trace.consumers[value]:
        if _keeps_channels(trace, step, value):
            yield from _beyond_views(trace, step.outputs[0])
        else:
            yield step, argument, value


def _views_of(trace: Trace, value: int) -> set[int]:
    """A value and those that have the same channels."""
    found = {value}
    for step, _ in trace.consumers[value]:
        if _keeps_channels(trace, step, value):
            found |= _views_of(trace, step.outputs[0])
    return found


def _keeps_channels(trace: Trace, step: Step, value: int) -> bool:
    """Whether a step only moves rows of `value` about, each still a vector over the same channels."""
    before, after = trace.shapes[value], trace.shapes[step.outputs[0]]
    if value != step.source or not before or not after or before[-1] != after[-1]:
        return False
    last = len(before) - 1
    if step.op in ("dropout", "feature_dropout", *CASTS):
        return True
    if step.op in VIEWS:
        return before[-1] != 1
    if step.op == "transpose":
        axes = (step.options.get("dim0"), step.options.get("dim1"))
        return all(isinstance(axis, int) and axis % len(before) != last for axis in axes)
    if step.op == "permute":
        axes = step.options.get("dims", ())
        return bool(axes) and axes[-1] % len(before) == last
    if step.op in ("select", "slice", "narrow"):
        dim = step.options.get("dim", 0)
        return isinstance(dim, int) and dim % len(before) != last
    if step.op == "index":  # rows, as a router sends them to experts; a mask spans as many axes as it has
        widest = max(len(trace.shapes[index]) for _, index in step.inputs[1:])
        return step.options.get("len(indices)", 1) + max(widest, 1) - 1 <= last
    if step.op == "getitem":
        index = step.options.get("indices")
        return _leaves_last_axis(index if isinstance(index, tuple) else (index,), len(before))
    return False


def _leaves_last_axis(index: tuple, ndim: int) -> bool:
    """Whether `x[index]`, with numbers and slices alone, takes all of the last of `ndim` axes."""
    if any(item is None for item in index):
        return False
    if Ellipsis in index:
        return index[-1] is Ellipsis or index[-1] == slice(None)
    return len(index) < ndim or index[-1] == slice(None)
