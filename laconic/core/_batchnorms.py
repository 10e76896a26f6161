"""Reading a trace: the batch norms that can be folded into the layer before them."""

from __future__ import annotations

from collections import Counter

from ._trace import Held, Names, Step, Trace, module_of
from ._uses import OPS, Use

__all__ = ["batchnorm_pairs"]


def batchnorm_pairs(trace: Trace, reads: list[tuple[str, Use]], names: Names) -> list[tuple[str, str]]:
    """(conv or linear, batch norm) where nothing else sees what lies between, and both mean the same channels."""
    counts = Counter(name for name, _ in reads)
    calls = Counter(trace.order)
    pairs = []
    for norm in trace.steps:
        if norm.op != "batch_norm" or norm.options.get("training") or calls[norm.module] != 1:
            continue
        between = norm.source
        maker = trace.producers.get(between)
        if maker is None or between in trace.results or len(trace.consumers[between]) != 1:
            continue
        held = [trace.held[value].name for _, value in maker.inputs if value in trace.held]
        alone = calls[maker.module] == 1 and all(counts[name] == 1 for name in held)
        weight = _own_weight(trace.held, maker, names)
        # A batch norm scales the second axis. A layer's outputs lie there if what it makes has as many axes as its
        # weight: (N, out) for (out, in), (N, out, H, W) for (out, in, kh, kw). A linear layer on (N, L, in), or a
        # convolution without a batch axis, has something else there, which may even be of the same size.
        if alone and weight is not None and len(trace.shapes[between]) == weight.ndim:
            pairs.append((maker.module, norm.module))
    return pairs


def _own_weight(held: dict[int, Held], step: Step, names: Names) -> Held | None:
    """The weight of a step that is a convolution or a linear layer with the whole weight of its own module."""
    if step.op != "linear" and OPS.get(step.op) not in ("conv", "conv_transpose"):
        return None
    for argument, value in step.inputs:
        weight = held.get(value) if argument == "weight" else None
        if weight is None or weight.turned or weight.reshaped or weight.part:
            continue
        if names.modules[module_of(weight.name)] == step.module:
            return weight
    return None
