"""`StreamNorm` and `ChannelAffine`: what is left of a layer norm where its input is known to have mean zero.

For x (..., d) with sum_i x_i = 0, layer norm is division by the root mean square:

    y = g x / sqrt(sum_i x_i^2 / d + eps) + b

and d - 1 of the channels say all: x_d = -sum_{i<d} x_i. With `short`, x holds these alone, and
sum_i x_i^2 = sum_{i<d} x_i^2 + (sum_{i<d} x_i)^2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.kernels import norm as fused

__all__ = ["ChannelAffine", "StreamNorm", "short_rms_norm"]


def short_rms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt((sum x^2 + (sum x)^2) / d + eps) for the first d - 1 of d channels that sum to zero: (..., d - 1).

    float16 and bfloat16 are computed in float32.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    squares = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    return (wide * torch.rsqrt(squares / (x.shape[-1] + 1) + eps)).to(x.dtype)


class StreamNorm(nn.Module):
    """Layer norm of vectors that have mean zero; at inference on a CPU by the compiled kernel, which agrees to rounding.

    Args:
        width: d.
        eps: added to the mean square, as in the layer norm that it stands for.
        affine: whether there is a gain.
        bias: whether there is a bias beside the gain.
        short: the input holds the first d - 1 channels.
        restore: with `short`, give all d channels; a gain and a bias need that.
        device, dtype: of gain and bias.

    Raises:
        ValueError: a gain for a short output, or `restore` without `short`.
    """

    def __init__(
        self, width: int, eps: float = 1e-5, *, affine: bool = False, bias: bool = False, short: bool = False,
        restore: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if restore and not short:
            raise ValueError("restore is for an input that is short: leave it out")
        if affine and short and not restore:
            raise ValueError("the gain of a norm with a short output belongs into its readers: fold it, or restore")
        if bias and not affine:
            raise ValueError("a bias belongs to affine=True")
        self.width, self.eps, self.short, self.restore = width, eps, short, restore
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """y.

        Raises:
            ValueError: x has another number of channels.
        """
        wanted = self.width - self.short
        if x.ndim == 0 or x.shape[-1] != wanted:
            raise ValueError(f"{wanted} channels are wanted on the last axis, found an input of {tuple(x.shape)}")
        if not self.short:
            if fused.at_once(x, self.weight, self.bias):
                return fused.forward(x, None, self.weight, self.bias, centred=False, eps=self.eps)[0]
            y = F.rms_norm(x, (self.width,), self.weight, self.eps)
        else:
            y = short_rms_norm(x, self.eps)
            if self.restore:
                y = torch.cat([y, -y.sum(-1, keepdim=True)], -1)
            if self.weight is not None:
                y = y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        flags = [name for name in ("short", "restore") if getattr(self, name)]
        parts = [f"{self.width}", f"eps={self.eps}", f"affine={self.weight is not None}"]
        return ", ".join(parts + [f"{name}=True" for name in flags])


class ChannelAffine(nn.Module):
    """y = g x + b, channel by channel: what a norm of a constant scale is where no reader can take it."""

    def __init__(
        self,
        width: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.width}, bias={self.bias is not None}"
