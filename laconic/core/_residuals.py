"""Reading a trace: the residual streams that norms of any kind read, and where heads of values lead.

A residual stream is a sum over d channels that norms alone read (`_streams.py` has those of layer norms). A mixer is a
linear layer whose outputs, in heads of D channels each, are averaged over tokens and read by another linear layer: the
values and the output of an attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ._affines import _given, _inside
from ._norms import Readers, _keeps_channels, _readers
from ._streams import LAYER_NORMS, Writer, _back, _Found
from ._trace import CASTS, VIEWS, Step, Trace
from ._uses import PRODUCTS, RIGHT, Use

__all__ = ["Mixer", "Residual", "mixers_of", "residuals_of"]

RMS_NORMS = ("rms_norm", "_fused_rms_norm")
ROOTS = ("rsqrt", "sqrt")
CENTRED = ("sub", "var", "var_mean", "std")


@dataclass(frozen=True)
class Residual:
    """A sum that norms read.

    Attributes:
        norms: path of each norm, in the order of the forward pass -> who reads it.
        kinds: path of each norm -> "rms" or "layer".
        writers: the parameters that are written to the sum.
        width: d.
        reason: why it cannot be turned as a whole; "" if it can.
    """

    norms: Mapping[str, Readers]
    kinds: Mapping[str, str]
    writers: tuple[Writer, ...]
    width: int
    reason: str


@dataclass(frozen=True)
class Mixer:
    """Values that are averaged over tokens, head by head.

    Attributes:
        value: path of the linear layer that makes them, kv_heads * width outputs.
        output: path of the linear layer that reads the averages, heads * width inputs.
        width: of a head.
        key: path of the linear layer that makes the keys, before what encodes positions; "" if that was not seen.
    """

    value: str
    output: str
    width: int
    key: str = ""


def residuals_of(trace: Trace, norms: Mapping[str, Readers], reads: list[tuple[str, Use]]) -> tuple[Residual, ...]:
    """Every residual stream.

    Args:
        trace: of the model.
        norms: the norms that have gains, with their readers.
        reads: of all parameters.
    """
    readers = dict(norms) | _bare(trace, norms, reads)
    steps: dict[str, list[Step]] = {path: [] for path in readers}
    for step in trace.steps:
        if step.module in steps:
            steps[step.module].append(step)
    order = [path for path in dict.fromkeys(step.module for step in trace.steps) if path in readers]
    found: list[_Found] = []
    for path in order:
        given = _given(trace, steps[path])
        if len(given) != 1:
            continue
        mine = _Found({path: None})
        _back(trace, given[0], len(trace.shapes[given[0]]) - 1, mine)
        for other in [one for one in found if one.values & mine.values]:
            found.remove(other)
            other.join(mine)
            mine = other
        found.append(mine)
    return tuple(_residual(trace, one, readers, steps) for one in found if one.values)


def _bare(trace: Trace, norms: Mapping[str, Readers], reads: list[tuple[str, Use]]) -> dict[str, Readers]:
    """Modules that divide by a root mean square and have no gain."""
    counts = Counter(name for name, _ in reads)
    steps: dict[str, list[Step]] = {}
    for step in trace.steps:
        steps.setdefault(step.module, []).append(step)
    found = {}
    for path, mine in steps.items():
        roots = any(step.op in ROOTS + RMS_NORMS + LAYER_NORMS for step in mine)
        if path and path not in norms and roots and _kind(mine):
            found[path] = _readers(trace, mine, counts)
    return found


def _kind(steps: list[Step]) -> str:
    """ "rms" or "layer", "" for what is neither."""
    ops = [step.op for step in steps]
    if any(op in LAYER_NORMS for op in ops):
        return "layer"
    if any(op in RMS_NORMS for op in ops):
        return "rms"
    if any(op in ROOTS for op in ops) and "mean" in ops and not any(op in CENTRED or op in PRODUCTS for op in ops):
        return "rms"
    return ""


def _residual(trace: Trace, found: _Found, readers: Mapping[str, Readers], steps: Mapping[str, list[Step]]) -> Residual:
    inside = {id(step) for value in found.values for step in [trace.producers.get(value)] if step is not None}
    reasons = dict(found.reasons)
    for value in sorted(found.values):
        if value in trace.results:
            reasons["the model returns it as it is"] = None
        for step, _ in trace.consumers[value]:
            if id(step) not in inside and not any(_inside(step.module, path) for path in found.norms):
                reasons[f"{step.op} in {step.module or 'the model'} reads it as it is"] = None
    first = next(iter(found.norms))
    kinds = {path: _kind(steps[path]) for path in found.norms}
    for path, kind in kinds.items():
        if not kind:
            reasons[f"{path} is neither a layer norm nor a root mean square norm"] = None
        if readers[path].reason:
            reasons[f"{path}: {readers[path].reason}"] = None
    width = trace.shapes[_given(trace, steps[first])[0]][-1]
    norms = {path: readers[path] for path in found.norms}
    return Residual(norms, kinds, tuple(found.writers), width, "; ".join(reasons))


# --- heads ------------------------------------------------------------------------------------------


def mixers_of(trace: Trace) -> tuple[Mixer, ...]:
    """Every pair of linear layers between which values are averaged head by head."""
    found = []
    for step in trace.steps:
        value = _values_read(trace, step)
        if value is None or not step.outputs:
            continue
        width = trace.shapes[value][-1]
        maker = _maker(trace, value, width)
        reader = _reader(trace, step.outputs[0], width)
        if maker is not None and reader is not None:
            found.append(Mixer(maker, reader, width, _key(trace, step)))
    return tuple(dict.fromkeys(found))


def _key(trace: Trace, step: Step) -> str:
    """The one linear layer behind the keys of an attention."""
    value = next((value for argument, value in step.inputs if argument == "key"), None)
    if value is None:  # a product of softmax(scores) and values: the keys are the right side of the scores
        at: Step | None = trace.producers.get(step.source)
        while at is not None and at.op not in PRODUCTS:
            at = trace.producers.get(at.source) if at.inputs else None
        value = at.inputs[1][1] if at is not None and len(at.inputs) == 2 else None
    makers: dict[str, None] = {}
    todo, seen = [] if value is None else [value], set[int]()
    while todo:
        value = todo.pop()
        maker = trace.producers.get(value)
        if value in seen or maker is None:
            continue
        seen.add(value)
        if maker.op in PRODUCTS and _own_matrix(trace, maker):
            makers[maker.module] = None
        else:
            todo += [source for _, source in maker.inputs if source not in trace.held]
    return next(iter(makers)) if len(makers) == 1 else ""


def _values_read(trace: Trace, step: Step) -> int | None:
    """What an attention averages."""
    if step.op == "scaled_dot_product_attention":
        return next((value for argument, value in step.inputs if argument == "value"), None)
    if step.op in ("matmul", "bmm") and len(step.inputs) == 2:
        weights, value = (v for _, v in step.inputs)
        if weights in trace.held or value in trace.held or not _from_softmax(trace, weights):
            return None
        return value
    return None


def _from_softmax(trace: Trace, value: int) -> bool:
    step = trace.producers.get(value)
    while step is not None and (step.op in CASTS or step.op in VIEWS or step.op in ("dropout", "native_dropout")):
        step = trace.producers.get(step.source) if step.inputs else None
    return step is not None and step.op in ("softmax", "_softmax")


def _maker(trace: Trace, value: int, width: int) -> str | None:
    """The linear layer whose outputs, cut into heads, a value is."""
    while True:
        readers = trace.consumers[value]
        step = trace.producers.get(value)
        if step is None or not step.inputs or value in trace.results or len(readers) != 1:
            return None
        if step.op in PRODUCTS:
            return step.module if _own_matrix(trace, step) and trace.shapes[value][-1] % width == 0 else None
        before, after = trace.shapes[step.source], trace.shapes[value]
        cut = step.op in VIEWS and before[-1] != after[-1] and after[-1] == width and before[-1] % width == 0
        if not cut and not _keeps_channels(trace, step, step.source):
            return None
        value = step.source


def _reader(trace: Trace, value: int, width: int) -> str | None:
    """The linear layer that alone reads a value, its heads laid side by side."""
    while True:
        readers = trace.consumers[value]
        if value in trace.results or len(readers) != 1:
            return None
        step, argument = readers[0]
        if step.op in PRODUCTS:
            wide = trace.shapes[value][-1]
            own = argument in ("input", "self", "mat1") and _own_matrix(trace, step) and wide % width == 0
            return step.module if own else None
        if not step.outputs:
            return None
        before, after = trace.shapes[value], trace.shapes[step.outputs[0]]
        joined = step.op in VIEWS and before[-1] == width and after[-1] % width == 0
        if not joined and not _keeps_channels(trace, step, value):
            return None
        value = step.outputs[0]


def _own_matrix(trace: Trace, step: Step) -> bool:
    """Whether a product has a whole matrix of one parameter on its right."""
    held = [trace.held[v] for argument, v in step.inputs if argument in RIGHT and v in trace.held]
    return len(held) == 1 and held[0].ndim == 2 and not held[0].part and not held[0].reshaped
