"""`rmsnorm`: divide by the root mean square, without subtracting the mean.

For x (..., d), gain g (d,), bias b (d,), the last dimension (or dimensions) being normalized:

    rms(x) = |x| / sqrt(d)                          |x|^2 = sum_i x_i^2
    y = g x / (rms(x) + eps) + b                    eps outside the root: the paper's code
    y = g x / sqrt(rms(x)^2 + eps) + b              eps_inside: LLaMA, `torch.nn.RMSNorm`
    y = (1 + g) x / ...                             unit_offset: Gemma, g starts at 0
    pRMSNorm: rms(x) = |x_1..k| / sqrt(k)           k = int(p d): the first k features speak for all

The output does not change when x, or the weight that makes x, is scaled as a whole; it does when x is shifted, which
is what LayerNorm guards against besides.

Source: "Root Mean Square Layer Normalization", Zhang, Sennrich, 2019, arXiv 1910.07467. Official code:
bzhangGo/rmsnorm, BSD-3. We differ from it in that float16 and bfloat16 are computed in float32.

At inference the gain folds into the layers that read the norm, W' = W diag(g), if it is their only source; the division
stays, for it depends on the input.

Use it where LayerNorm stands in a transformer or a recurrent network. Keep LayerNorm where inputs have a mean that
carries nothing (raw features), and where a tuned kernel for it matters more than a few operations. Features must not
be permuted or pruned under pRMSNorm without keeping its first k.

Example:
    >>> import torch
    >>> from laconic.norm import RMSNorm
    >>> RMSNorm(2)(torch.tensor([[3.0, 4.0]])).square().mean().item()
    1.0
    >>> like_llama = RMSNorm(2, eps=1e-6, eps_inside=True)
    >>> like_llama(torch.zeros(1, 2)).tolist()
    [[0.0, 0.0]]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.kernels import native
from laconic.kernels import norm as _norm  # and registers torch.ops.laconic.rms_norm

_WORTH = 16384  # elements from which the fused gradient is faster than those of the single operations


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-8,
    *,
    eps_inside: bool = False,
    leading: int | None = None,
    unit_offset: bool = False,
    gain_after_cast: bool = False,
) -> Tensor:
    """y, of the shape and type of x; float16 and bfloat16 are computed in float32.

    Args:
        x: (..., *normalized_shape).
        normalized_shape: the last dimensions, which are normalized together.
        weight: g (*normalized_shape); 1 by default.
        bias: b (*normalized_shape); 0 by default.
        eps: keeps the division finite where x is 0.
        eps_inside: add eps to the mean square instead of the root.
        leading: k; how many of the first features the mean square is taken over, all by default.
        unit_offset: multiply by 1 + g.
        gain_after_cast: round to x's type before the gain is applied, as LLaMA does; afterwards (Gemma) by default.

    Raises:
        ValueError: the last dimensions of x are others.
    """
    shape = tuple(normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"rms_norm: the last dimensions of {tuple(x.shape)} must be {shape}")
    if leading is None and _kernel_wins(x, shape, weight, bias, gain_after_cast):
        return torch.ops.laconic.rms_norm(x, weight, bias, eps=eps, unit_offset=unit_offset, eps_outside=not eps_inside)
    dims = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    seen = wide if leading is None else wide[..., :leading]
    count = math.prod(shape) if leading is None else leading
    if eps_inside:
        y = wide * torch.rsqrt(seen.square().sum(dims, keepdim=True) / count + eps)
    else:
        # The gradient of a norm at 0 is 0 in torch; that of the root of a mean of squares is not finite.
        y = wide / (torch.linalg.vector_norm(seen, dim=dims, keepdim=True) * count**-0.5 + eps)
    if gain_after_cast:
        y = y.to(x.dtype)
    if weight is not None:
        y = y * (1 + weight if unit_offset else weight)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _kernel_wins(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, gain_after_cast: bool
) -> bool:
    """Whether the compiled kernel computes this, and faster: see benchmarks/norms.py.

    What is traced stays in torch's own operations, which every tool that reads a graph knows.
    """
    parameters = [p for p in (weight, bias) if p is not None]
    if native.load() is None or len(shape) != 1 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.device.type != "cpu" or not x.numel() or any(t.dtype not in _norm.DTYPES for t in (x, *parameters)):
        return False
    if any(p.shape != x.shape[-1:] for p in parameters) or (gain_after_cast and x.dtype != torch.float32):
        return False
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    return not trains or x.numel() >= _WORTH


class RMSNorm(nn.Module):
    """RMSNorm and, with `p`, pRMSNorm, in the form of `torch.nn.RMSNorm`, which it equals with `eps_inside=True`.

    Args:
        normalized_shape: the last dimension, or dimensions.
        eps: 1e-8 as in the paper's code; with `eps_inside`, models state theirs (LLaMA 1e-5 or 1e-6).
        elementwise_affine: learn a gain.
        bias: learn a bias too.
        p: share of the features, the first ones, that the mean square is taken over (the paper: 0.0625).
        eps_inside, unit_offset, gain_after_cast: see `rms_norm`. With `unit_offset` the gain starts at 0.
        device, dtype: of the parameters.

    Raises:
        ValueError: eps is negative, a bias or an offset without a gain is asked for, p is not in (0, 1], leaves no
            feature, or comes with several dimensions.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-8,
        elementwise_affine: bool = True,
        bias: bool = False,
        *,
        p: float | None = None,
        eps_inside: bool = False,
        unit_offset: bool = False,
        gain_after_cast: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.normalized_shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(int(size) for size in normalized_shape)
        )
        if not eps >= 0:
            raise ValueError(f"rmsnorm: eps is {eps}: it must not be negative")
        if not elementwise_affine and (bias or unit_offset):
            raise ValueError("rmsnorm: a bias and unit_offset belong to elementwise_affine=True")
        self.eps, self.elementwise_affine, self.p = eps, elementwise_affine, p
        self.eps_inside, self.unit_offset, self.gain_after_cast = eps_inside, unit_offset, gain_after_cast
        self.leading = None if p is None else _leading(p, self.normalized_shape)
        empty = {"device": device, "dtype": dtype}
        for name, wanted in (("weight", elementwise_affine), ("bias", bias)):
            parameter = nn.Parameter(torch.empty(self.normalized_shape, **empty)) if wanted else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gain at 1 (at 0 with `unit_offset`), the bias at 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            eps_inside=self.eps_inside,
            leading=self.leading,
            unit_offset=self.unit_offset,
            gain_after_cast=self.gain_after_cast,
        )

    def extra_repr(self) -> str:
        flags = [name for name in ("eps_inside", "unit_offset", "gain_after_cast") if getattr(self, name)]
        parts = [f"{self.normalized_shape}", f"eps={self.eps}"]
        parts += [f"elementwise_affine={self.elementwise_affine}"] + ["bias=True"] * (self.bias is not None)
        parts += [f"p={self.p}"] * (self.p is not None) + [f"{flag}=True" for flag in flags]
        return ", ".join(parts)


def _leading(p: float, shape: tuple[int, ...]) -> int:
    """int(p d), as the paper's code has it."""
    if len(shape) != 1:
        raise ValueError(f"rmsnorm: p={p} is for one dimension, and normalized_shape is {shape}")
    if not 0 < p <= 1:
        raise ValueError(f"rmsnorm: p is {p}: it must be in (0, 1]")
    leading = int(shape[0] * p)
    if leading < 1:
        raise ValueError(f"rmsnorm: p={p} of {shape[0]} features is less than one: p must be at least {1 / shape[0]:g}")
    return leading


CARD = Card(
    id="rmsnorm",
    title="Root Mean Square Layer Normalization",
    authors="Zhang, Sennrich",
    year=2019,
    source="arXiv 1910.07467",
    family="norm",
    summary="Layer normalization without the mean: divides every vector by its root mean square, or by that of its "
    "first few features.",
    objects={"RMSNorm": "Layer"},
    traits={"RMSNorm": ("gradient:exact", "batch_independent_eval")},
    use="In transformers and recurrent networks in place of LayerNorm; independent of the batch, so any batch size.",
    avoid="Inputs whose mean is large and carries nothing, which LayerNorm takes away.",
    composes=("nap", "smoothquant"),
    vectors=("rmsnorm",),
    code="github.com/bzhangGo/rmsnorm, BSD-3",
    claim={
        "text": "In place of LayerNorm, RMSNorm makes training steps 7 % to 64 % faster; here: the natural logarithm "
        "of the processor time of a step of a character transformer falls by more than 0.0726, which is 7 %.",
        "metric": "log of CPU seconds a step",
        "direction": "lower",
        "margin": 0.0726,
        "arms": ("layernorm", "rmsnorm"),
        "seeds": 5,
        "minutes": 6,
        "task": "chars",
    },
)
