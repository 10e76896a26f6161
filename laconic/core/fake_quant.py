"""Rounding that can be trained through: fake quantization with straight-through gradients, and LSQ.

For numbers x, a scale s and a zero point z that broadcast against them, and codes from qmin to qmax:

    v = x / s          q = clamp(round(v) + z, qmin, qmax)          x^ = s (q - z)

    fake_quant_ste     dx = g 1[qmin <= v + z <= qmax]              or dx = g everywhere, unclipped
    lsq                dx as above, clipped;  ds = c sum g d,       d = q - z - v inside the range, q - z outside it

with the sum over all numbers that share the scale, and c = 1 / sqrt(n qmax) by default, n the number of elements of x.
LSQ: "Learned Step Size Quantization", Esser, McKinstry, Bablani, Appuswamy, Modha, 2019, arXiv 1902.08153.

Rounding is one of `ROUNDINGS`: "nearest" (ties to even), "zero" (what lies between is cut off, so that no magnitude
grows), "floor", or "stochastic": floor(v + u), u ~ U[0, 1), which is v on average.

What is computed here is the value that a packed layer would have, in floats: it trains, and saves nothing. For packing see
`laconic.core.qat`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "ROUNDINGS",
    "code_range",
    "fake_quant_ste",
    "lsq",
    "lsq_grad_scale",
    "lsq_init",
    "pass_through",
    "rounded",
    "stochastic_round",
]

ROUNDINGS = ("nearest", "zero", "floor", "stochastic")


# --- rounding ---------------------------------------------------------------------------------------


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """floor(x + u), u ~ U[0, 1): one of the two integers around x, and x on average. Integers stay as they are."""
    below = x.floor()
    # Compared instead of added: x + u would round up to the next integer where x is just below it.
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return below + (noise < x - below)


def rounded(x: Tensor, rounding: str = "nearest", generator: torch.Generator | None = None) -> Tensor:
    """Integers of the type of x, without a gradient.

    Args:
        x: of any shape.
        rounding: one of `ROUNDINGS`.
        generator: randomness of the stochastic one.

    Raises:
        ValueError: another rounding.
    """
    x = x.detach()
    if rounding == "nearest":
        return x.round()
    if rounding == "zero":
        return x.trunc()
    if rounding == "floor":
        return x.floor()
    if rounding == "stochastic":
        return stochastic_round(x, generator)
    raise ValueError(f"rounding is {rounding!r}: it must be one of {', '.join(ROUNDINGS)}")


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def pass_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` forwards, the identity of x backwards: exactly, where x + (value - x).detach() rounds twice.

    Raises:
        ValueError: their shapes differ.
    """
    if x.shape != value.shape:
        raise ValueError(f"pass_through: x is of shape {tuple(x.shape)} and its value of {tuple(value.shape)}")
    return _PassThrough.apply(x, value)


def code_range(bits: int, *, signed: bool = True, narrow: bool = False) -> tuple[int, int]:
    """(qmin, qmax) of integers: [0, 2^b - 1], signed [-2^(b-1), 2^(b-1) - 1], and narrow without the least of these.

    >>> code_range(4), code_range(4, narrow=True), code_range(4, signed=False)
    ((-8, 7), (-7, 7), (0, 15))

    Raises:
        ValueError: no bits, a sign alone, or a narrow range without signs.
    """
    if bits < 1 + signed:
        raise ValueError(f"{bits} bits are too few for {'signed' if signed else 'unsigned'} codes")
    if not signed:
        if narrow:
            raise ValueError("a narrow range leaves out the least signed code, and unsigned codes have none")
        return 0, (1 << bits) - 1
    half = 1 << (bits - 1)
    return -half + narrow, half - 1


# --- fake quantization ------------------------------------------------------------------------------


def _inside(v: Tensor, zero: Tensor | float, qmin: float, qmax: float) -> Tensor:
    shifted = v + zero
    return (shifted >= qmin) & (shifted <= qmax)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Any, qmin: float, qmax: float, clipped: bool, rounding: str,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        v = x / scale
        if clipped and ctx.needs_input_grad[0]:
            ctx.save_for_backward(_inside(v, zero, qmin, qmax))
        q = (rounded(v, rounding, generator) + zero).clamp(qmin, qmax)
        return ((q - zero) * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors
        return (gradient * kept[0] if kept else gradient, *(None,) * 7)


def fake_quant_ste(
    x: Tensor, scale: Tensor | float, zero: Tensor | float, qmin: float, qmax: float, *, clipped: bool = True,
    rounding: str = "nearest", generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """x^ of the shape and type of x, with a straight-through gradient for x; scale and zero get none.

    Args:
        x: of any shape.
        scale: s, positive, broadcasts against x (not the other way).
        zero: z, likewise; whole numbers, unless qmin and qmax stand for a range of another kind.
        qmin, qmax: least and largest code.
        clipped: no gradient where v + z lies outside of the codes.
        rounding: one of `ROUNDINGS`.
        generator: randomness of the stochastic one.

    Raises:
        ValueError: scale or zero do not broadcast against x, another rounding, or no codes.

    Example:
        >>> x = torch.tensor([-1.0, 0.3, 0.6, 9.0], requires_grad=True)
        >>> y = fake_quant_ste(x, 0.5, 0, -2, 1)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([-1.0, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0])
    """
    scale = _like(x, scale)
    _check(x, scale, zero, qmin, qmax)
    return _FakeQuant.apply(x, scale, zero, qmin, qmax, clipped, rounding, generator)


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Any, qmin: float, qmax: float, grad_scale: float) -> Tensor:
        v = x / scale
        inside = _inside(v, zero, qmin, qmax)
        shifted = (v.round() + zero).clamp(qmin, qmax) - zero
        ctx.save_for_backward(inside, torch.where(inside, shifted - v, shifted))
        ctx.grad_scale, ctx.like = grad_scale, scale
        return (shifted * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inside, slope = ctx.saved_tensors
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        to_scale = None
        if ctx.needs_input_grad[1]:
            to_scale = ((gradient * slope).sum_to_size(ctx.like.shape) * ctx.grad_scale).to(ctx.like.dtype)
        return to_x, to_scale, None, None, None, None


def lsq(
    x: Tensor, scale: Tensor, qmin: float, qmax: float, grad_scale: float | None = None, *, zero: Tensor | float = 0
) -> Tensor:
    """x^ of the shape and type of x, with LSQ's gradients for x and for the scale.

    Args:
        x: of any shape.
        scale: s, positive, broadcasts against x; what is learned.
        qmin, qmax: least and largest code.
        grad_scale: c; `lsq_grad_scale` by default, 1 for the plain gradient.
        zero: z, broadcasts against x; it gets no gradient.

    Raises:
        ValueError: scale or zero do not broadcast against x, or no codes.

    Example:
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> y = lsq(torch.tensor([0.3, 9.0]), scale, -2, 1, 1.0)
        >>> y.sum().backward()
        >>> y.tolist(), round(scale.grad.item(), 4)  # (1 - 0.6) inside and qmax outside
        ([0.5, 0.5], 1.4)
    """
    scale = _like(x, scale)
    _check(x, scale, zero, qmin, qmax)
    factor = lsq_grad_scale(x.numel(), qmax) if grad_scale is None else grad_scale
    return _LSQ.apply(x, scale, zero, qmin, qmax, factor)


def lsq_grad_scale(numel: int, qmax: float) -> float:
    """1 / sqrt(n qmax): a step of the scale is then about as large, relative to it, as one of the numbers."""
    return 1 / math.sqrt(max(numel, 1) * max(qmax, 1))


def lsq_init(x: Tensor, qmax: float, dims: tuple[int, ...] | None = None) -> Tensor:
    """2 mean |x| / sqrt(qmax), kept of one element along `dims` (all by default, and then without dimensions).

    Where all numbers are 0 it is 1, so that they can be divided by it.
    """
    size = x.detach().abs()
    size = size.float() if size.dtype in (torch.float16, torch.bfloat16) else size
    mean = size.mean() if dims is None else size.mean(dims, keepdim=True)
    scale = 2 * mean / math.sqrt(max(qmax, 1))
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _like(x: Tensor, scale: Tensor | float) -> Tensor:
    return scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=x.dtype, device=x.device)


def _check(x: Tensor, scale: Tensor, zero: Tensor | float, qmin: float, qmax: float) -> None:
    if qmin > qmax:
        raise ValueError(f"fake quantization: codes from {qmin} to {qmax} are none")
    for name, value in (("scale", scale), ("zero", zero)):
        if not isinstance(value, Tensor):
            continue
        try:
            shape = torch.broadcast_shapes(x.shape, value.shape)
        except RuntimeError:
            shape = None
        if shape != x.shape:
            raise ValueError(
                f"fake quantization: a {name} of shape {tuple(value.shape)} does not broadcast against numbers of "
                f"shape {tuple(x.shape)}"
            )
