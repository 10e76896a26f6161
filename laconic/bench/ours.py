"""Our contestants: the packed op on a matrix, packed models, an artifact as `laconic.load` gives it back."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.kernels import native
from laconic.kernels.inputs import INT8_TOKENS
from laconic.nn import PackedParameterSpec, declare, fill, is_packed, pack_tensors, packed_specs
from laconic.nn.blocks import fuse
from laconic.numerics import Scheme, affine_params, quantize
from laconic.pipeline.tensorfile import SINGLE

from .contest import OURS, Absent, Ready, contestant, cycling
from .machine import INT8
from .problems import Encoder, LanguageModel, Load, Product

__all__ = ["packed", "scheme_of"]


def scheme_of(weights: str, group: int | None) -> Scheme:
    """How weights of a kind (a key of `BITS`) are stored.

    Scales in two bytes by the range of their weights, which gives back exactly what has two or three values.

    Raises:
        Absent: this laconic has no such scheme.
    """
    shared = f"group{group}" if group else "channel"
    rule = "absmean" if weights == "binary" else "minmax"
    try:
        return Scheme.parse(f"v1/{weights}/{shared}/float16/{rule}/znone/nearest")
    except ValueError as error:
        raise Absent(f"this laconic has no scheme for it: {error}") from error


def packed(weight: Tensor, scheme: Scheme) -> tuple[PackedParameterSpec, dict[str, Tensor]]:
    """The stored tensors of a float matrix, rounded to nearest, by suffix."""
    spec = PackedParameterSpec(scheme, tuple(weight.shape))
    scale, zero = affine_params(weight, scheme)
    return spec, pack_tensors(spec, quantize(weight, scale, zero, scheme), scale, zero)


def _kernels() -> str:
    status = native.status()
    return f"C++, {status['isa']}" if status["present"] else f"without C++ ({status['why']})"


def _has_scheme(problem: Product | LanguageModel) -> str | None:
    try:
        scheme_of(problem.weights, problem.group)
    except Absent as why:
        return str(why)
    return None


@contestant("laconic weight-only", OURS, Product, when=_has_scheme)
def weight_only(problem: Product) -> Ready:
    """`torch.ops.laconic.linear` on the packed matrix, float inputs."""
    scheme = scheme_of(problem.weights, problem.group)
    spec, stored = packed(problem.weight, scheme)
    operands = ("packed", "scale") if scheme.symmetric else ("packed", "scale", "zero_point")
    nbytes = scheme.nbytes(*spec.matrix)
    copies = [tuple(stored[name].clone() for name in operands) for _ in range(problem.turns(nbytes))]
    x, text = problem.x, str(scheme)
    linear = torch.ops.laconic.linear
    call = cycling(copies, lambda tensors: linear(x, *tensors, scheme=text))
    return Ready(_inferring(call), stored=nbytes, note=f"{text}; {_kernels()}")


@contestant("laconic weight-only", OURS, LanguageModel, when=_has_scheme)
def weight_only_model(problem: LanguageModel) -> Ready:
    """Every linear layer packed, transformers' own forward."""
    scheme = scheme_of(problem.weights, problem.group)
    model = problem.twin()
    nbytes = _pack_linears(model, scheme)
    return Ready(problem.step(model), stored=nbytes, note=f"{scheme}; transformers' forward; {_kernels()}")


@contestant("laconic int8 inputs", OURS, Product, when=lambda problem: _rounds(problem) or _has_scheme(problem))
def int8_inputs(problem: Product) -> Ready:
    """The same op, each row of the inputs rounded to 8 bits when it runs."""
    scheme = scheme_of(problem.weights, problem.group)
    spec, stored = packed(problem.weight, scheme)
    nbytes = scheme.nbytes(*spec.matrix)
    copies = [tuple(stored[name].clone() for name in ("packed", "scale")) for _ in range(problem.turns(nbytes))]
    x, text = problem.x, str(scheme)
    linear = torch.ops.laconic.linear
    call = cycling(copies, lambda tensors: linear(x, *tensors, scheme=text, inputs=INT8_TOKENS))
    return Ready(_inferring(call), stored=nbytes, note=f"{text}; int8 inputs; {_kernels()}", peak=INT8)


def _rounds(problem: Product) -> str | None:
    return "the problem has inputs of 1 bit" if problem.activations == 1 else None


@contestant(
    "laconic signs", OURS, Product,
    when=lambda problem: None if problem.activations == 1 and problem.weights == "binary" else "both operands are of 1 bit",
)  # fmt: skip
def signs(problem: Product) -> Ready:
    """Signs of the inputs against those of the weights, by counting bits; packing the inputs is part of the time."""
    from laconic.kernels.binary import pack_signs

    weight = problem.weight
    codes, scale = pack_signs(weight), weight.abs().mean(1)
    nbytes = codes.nbytes + scale.nbytes
    copies = [codes.clone() for _ in range(problem.turns(nbytes))]
    x, linear = problem.x, torch.ops.laconic.binary_linear
    call = cycling(copies, lambda words: linear(x, words, scale))
    return Ready(_inferring(call), stored=nbytes, note=f"exclusive or and bit counts; {_kernels()}", peak=INT8)


@contestant("laconic fused blocks", OURS, LanguageModel, when=_has_scheme)
def fused_model(problem: LanguageModel) -> Ready:
    """The packed model with its blocks as compiled code; inputs of linear layers stay float."""
    scheme = scheme_of(problem.weights, problem.group)
    model = problem.twin()
    nbytes = _pack_linears(model, scheme)
    fuse(model)
    return Ready(problem.step(model), stored=nbytes, note=f"{scheme}; fused blocks; {_kernels()}")


@contestant("laconic fused blocks, int8 inputs", OURS, LanguageModel, when=_has_scheme)
def fused_int8_model(problem: LanguageModel) -> Ready:
    """The same, with inputs of linear layers rounded to 8 bits a token."""
    scheme = scheme_of(problem.weights, problem.group)
    model = problem.twin()
    nbytes = _pack_linears(model, scheme)
    fuse(_round_inputs(model))
    note = f"{scheme}; fused blocks, int8 inputs; {_kernels()}"
    return Ready(problem.step(model), stored=nbytes, note=note, peak=INT8)


def _round_inputs(model: Any) -> Any:
    """Let every packed linear layer of a model round its inputs."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_packed(module):
            rounding = {name: replace(spec, inputs=INT8_TOKENS) for name, spec in module._packed.items()}
            object.__setattr__(module, "_packed", rounding)
    return model


def _pack_linears(model: nn.Module, scheme: Scheme) -> int:
    """Pack all linear layers of a model, in place; returns their bytes."""
    nbytes = 0
    for linear in LanguageModel.linears(model).values():
        spec, stored = packed(linear.weight.detach(), scheme)
        declare(linear, "weight", spec, device="meta")
        fill(linear, "weight", stored)
        nbytes += scheme.nbytes(*spec.matrix)
    return nbytes


@contestant("laconic int8 weights", OURS, Encoder)
def encoder_int8(problem: Encoder) -> Ready:
    """What `laconic.compress` makes of MiniLM without data at 8 bits, as `laconic.load` gives it back."""
    return _artifact(problem, scheme_of("int8", None))


@contestant("laconic int4 weights", OURS, Encoder)
def encoder_int4(problem: Encoder) -> Ready:
    """The same at 4 bits in groups of 32."""
    return _artifact(problem, scheme_of("int4", 32))


def _artifact(problem: Encoder, scheme: Scheme, int8: bool = False) -> Ready:
    from laconic.pipeline.load import load

    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as folder:
        model = load(problem.compress(scheme, Path(folder) / "artifact"))
    fuse(_round_inputs(model) if int8 else model)
    stored = sum(scheme.nbytes(*spec.matrix) for spec in packed_specs(model).values())
    how = "fused blocks, int8 inputs" if int8 else "fused blocks"
    return encoder_ready(problem, model, stored=stored, note=f"{scheme}; {how}; {_kernels()}")


@contestant("laconic int8 weights and inputs", OURS, Encoder)
def encoder_int8_inputs(problem: Encoder) -> Ready:
    """8-bit weights, inputs of linear layers rounded to 8 bits a token, blocks as compiled code."""
    return replace(_artifact(problem, scheme_of("int8", None), int8=True), peak=INT8)


@contestant("laconic load", OURS, Load)
def first_answer(problem: Load) -> Ready:
    """`laconic.load`, then one forward."""
    from laconic.pipeline.load import load

    size = (problem.artifact / SINGLE).stat().st_size
    call = _inferring(lambda: load(problem.artifact)(**problem.inputs).last_hidden_state)
    return Ready(call, stored=size, answer=problem.pool, note=problem.scheme)


def encoder_ready(problem: Encoder, model: Any, **given: Any) -> Ready:
    """A transformers model as a contestant."""
    call = _inferring(lambda: model(**problem.inputs).last_hidden_state)
    return Ready(call, answer=problem.pool, **given)


def _inferring(call: Any) -> Any:
    def inside() -> Any:
        with torch.inference_mode():
            return call()

    return inside
