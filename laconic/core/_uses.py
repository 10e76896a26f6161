"""Reading a trace: every place where a parameter is read, and what is done with it there."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ._trace import CASTS, VIEWS, Held, Step, Trace, is_alias

__all__ = ["OPS", "PRODUCTS", "RIGHT", "Use", "reads_of"]


@dataclass(frozen=True)
class Use:
    """One place where a parameter is read.

    Attributes:
        module: path of the innermost module whose forward reads it. This is often, but not always, the
            module that owns it: `nn.MultiheadAttention` reads `out_proj.weight` by itself, Mamba's mixer
            reads `conv1d.weight`.
        op: "linear", "embedding", "conv", "conv_transpose", "norm", "matmul", "experts", "rnn", "attention"
            or "other:NAME". "linear" is every product of an activation with a 2-D parameter on its right,
            `x @ W` and `x @ W.T`; "experts" is the same with one slice of a 3-D parameter per group of
            rows; "matmul" is any other product. Casts, views, transposes, chunks and slices on the way are
            looked through, so before replacing a whole module look at `Structure.ops`, too.
        transposed: the parameter is stored (in, out), as in GPT-2's `Conv1D`; for experts (E, in, out).
        role: "weight", "bias" or "other".
    """

    module: str
    op: str
    transposed: bool
    role: str


_CONVS = {f"conv{n}d" for n in (1, 2, 3)} | {"convolution", "_convolution"}
OPS = {
    **dict.fromkeys(_CONVS, "conv"),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], "conv_transpose"),
    **dict.fromkeys(["embedding", "embedding_bag"], "embedding"),
    **dict.fromkeys(["layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm"], "norm"),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm", "native_group_norm"], "norm"),
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], "rnn"),
    **dict.fromkeys(["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"], "rnn"),
    **dict.fromkeys(["scaled_dot_product_attention", "multi_head_attention_forward"], "attention"),
}
PRODUCTS = {"linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "grouped_mm", "grouped_mm_fallback"}
RIGHT = {"weight", "other", "mat2", "batch2"}
_EXPANDED = {  # arguments of multi_head_attention_forward that it passes to linear
    **dict.fromkeys(["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"], "weight"),
    **{"out_proj_weight": "weight", "in_proj_bias": "bias", "out_proj_bias": "bias"},
}


def reads_of(trace: Trace) -> list[tuple[str, Use]]:
    """Every read of a parameter, in order: its canonical name and the use."""
    held = trace.held
    found = []
    for step in trace.steps:
        for argument, value in step.inputs:
            if value in held and not (value == step.source and is_alias(step, held[value])):
                found.append((held[value].name, _use(trace, step, argument, held[value])))
    for value in sorted(trace.results & held.keys()):  # the model returns a parameter as it is
        found.append((held[value].name, Use("", "other:output", False, "other")))
    return found


def _use(trace: Trace, step: Step, argument: str, parameter: Held) -> Use:
    """What a step does with a parameter."""
    use = functools.partial(Use, step.module)
    if step.op == "multi_head_attention_forward" and argument in _EXPANDED:
        return use("linear", False, _EXPANDED[argument])
    if step.op in PRODUCTS:
        return _product_use(step, argument, parameter)
    if step.op in OPS:
        op = OPS[step.op]
        if op == "rnn":
            return use(op, False, "weight" if parameter.ndim > 1 else "bias")
        return use(op, False, argument if argument in ("weight", "bias") else "other")
    role = _norm_role(trace, step)
    return use("norm", False, role) if role else use(f"other:{step.op}", False, "other")


def _product_use(step: Step, argument: str, parameter: Held) -> Use:
    """A parameter in a product: `linear` has (out, in) on its right, all others have (in, out)."""
    kind = {2: "linear", 3: "experts"}.get(parameter.ndim, "matmul")
    if parameter.reshaped:  # rows and columns of the product are not those of the parameter
        kind = "matmul"
    if argument in RIGHT:
        turned = parameter.turned if step.op == "linear" else not parameter.turned
        return Use(step.module, kind, turned and kind != "matmul", "weight")
    if argument == "bias" or step.op in ("addmm", "baddbmm") and argument == "self":
        return Use(step.module, "linear", False, "bias")
    return Use(step.module, "matmul", False, "weight" if parameter.ndim > 1 else "other")


# --- norms written by hand --------------------------------------------------------------------------

_ROOTS = {"rsqrt", "sqrt", "linalg_vector_norm", "linalg_norm", "norm", "normalize", "std", "var_mean"}
_ELEMENTWISE = {"mul", "div", "sub", "add", "reciprocal", "clamp", "clamp_min"} | CASTS | VIEWS
_LOOK_BACK = 12  # values to look at on the way from a handwritten norm's scale to its root


def _norm_role(trace: Trace, step: Step) -> str:
    """ "weight" or "bias" if the step is the scale or the shift of a norm written by hand (RMSNorm), else "".

    The scale is a product with something that was just divided by a root; the shift is a sum with such a
    scale. `1 + weight`, as Gemma has it, counts as the weight.
    """
    data = [value for _, value in step.inputs if value not in trace.held]
    if step.op == "mul" and len(data) == 1:
        return "weight" if _is_divided_by_root(trace, step, data[0]) else ""
    if step.op == "add" and len(data) == 1:
        return "bias" if _is_divided_by_root(trace, step, data[0]) else ""
    if step.op == "add" and not data and len(step.inputs) == 1:
        shifted = [reader for reader, _ in _through_casts(trace, step.outputs[0])]
        rest = [value for reader in shifted for _, value in reader.inputs]
        divided = any(_is_divided_by_root(trace, step, value) for value in rest)
        return "weight" if divided and all(reader.op == "mul" for reader in shifted) else ""
    return ""


def _through_casts(trace: Trace, value: int) -> list[tuple[Step, str]]:
    """The steps that read a value, seen through casts."""
    found = []
    for step, argument in trace.consumers[value]:
        found += _through_casts(trace, step.outputs[0]) if step.op in CASTS else [(step, argument)]
    return found


def _is_divided_by_root(trace: Trace, step: Step, value: int) -> bool:
    """Whether elementwise steps of the same module call lead from a root to `value`."""
    todo, seen = [value], {value}
    for _ in range(_LOOK_BACK):
        if not todo:
            return False
        maker = trace.producers.get(todo.pop(0))
        if maker is None or maker.call != step.call:
            continue
        if maker.op in _ROOTS or maker.op == "pow" and -0.5 in maker.options.values():
            return True
        if maker.op in _ELEMENTWISE:
            fresh = [source for _, source in maker.inputs if source not in seen]
            seen.update(fresh)
            todo += fresh
    return False
