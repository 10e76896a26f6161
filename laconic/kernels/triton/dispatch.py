"""Registers the Triton kernels as what the ops of laconic run on CUDA tensors.

What a kernel does not cover (float64, empty tensors, a residual that broadcasts, a GPU that is too old, a scheme that
has no kernel yet) goes to the reference, which runs on every device. Nothing else chooses: the same call takes the
same road every time. triton is imported by the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laconic.kernels.triton import installed, missing
from laconic.numerics import Scheme

__all__ = ["OPS", "register"]

Reference = Callable[..., Tensor]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def register(library: torch.library.Library, references: Mapping[str, Reference], key: str = "CUDA") -> bool:
    """Make the kernels what `laconic::NAME` runs under a dispatch key; says whether it did.

    Args:
        library: that defined the ops.
        references: NAME -> function for what a kernel does not cover; ops without one are left as they are.
        key: whose tensors they run on.
    """
    if key == "CUDA" and not installed():
        return False
    for name, run in OPS.items():
        if name in references:
            library.impl(name, functools.partial(run, references[name]), key)
    return True


def _linear(
    reference: Reference, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, *, scheme: str, act: str = "none", inputs: str = "",
) -> Tensor:  # fmt: skip
    if inputs:
        from laconic.kernels.inputs import round_inputs

        x = round_inputs(x, inputs)
    if act in ACTIVATIONS and x.ndim and _covered(codes, scale, zero, scheme, x.shape[-1]):
        from laconic.kernels.triton import weight_only

        if not weight_only.input_not_covered(x, codes, bias, residual, (*x.shape[:-1], codes.shape[0])):
            return weight_only.linear(x, codes, scale, zero, bias, residual, scheme=scheme, act=act)
    return reference(x, codes, scale, zero, bias, residual, scheme=scheme, act=act)


def _experts(
    reference: Reference, x: Tensor, index: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None,
    bias: Tensor | None = None, *, out: int, scheme: str, act: str = "none",
) -> Tensor:  # fmt: skip
    whole = x.ndim == 2 and index.device == x.device and out > 0 and codes.shape[0] % out == 0
    if whole and act in ACTIVATIONS and _covered(codes, scale, zero, scheme, x.shape[-1]):
        from laconic.kernels.triton import weight_only

        if not weight_only.input_not_covered(x, codes, bias, None, ()):
            return weight_only.experts(x, index, codes, scale, zero, bias, out=out, scheme=scheme, act=act)
    return reference(x, index, codes, scale, zero, bias, out=out, scheme=scheme, act=act)


def _embedding(
    reference: Reference, ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, scheme: str, dim: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if ids.device == codes.device and _covered(codes, scale, zero, scheme, dim):
        from laconic.kernels.triton import weight_only

        return weight_only.embedding(ids, codes, scale, zero, scheme=scheme, dim=dim, dtype=dtype)
    return reference(ids, codes, scale, zero, scheme=scheme, dim=dim, dtype=dtype)


def _dequantize(
    reference: Reference, codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, scheme: str, k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if _covered(codes, scale, zero, scheme, k):
        from laconic.kernels.triton import weight_only

        return weight_only.dequantize(codes, scale, zero, scheme=scheme, k=k, dtype=dtype)
    return reference(codes, scale, zero, scheme=scheme, k=k, dtype=dtype)


def _by_dequantizing(reference: Reference, *operands: Any, **options: Any) -> Tensor:
    """A reference that asks `laconic::dequantize` for the weight, which is where its time is saved."""
    return reference(*operands, **options)


def _covered(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int) -> bool:
    if missing(codes.device):
        return False
    from laconic.kernels.triton import weight_only

    return not weight_only.not_covered(codes, scale, zero, Scheme.parse(scheme), k)


OPS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "experts": _experts,
    "embedding": _embedding,
    "dequantize": _dequantize,
    "conv": _by_dequantizing,
}
