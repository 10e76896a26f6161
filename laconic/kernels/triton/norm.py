"""RMSNorm and LayerNorm in one pass over memory, with what stands before and behind them in a transformer.

For a row x (K,), its residual r, gain g, bias b:

    h = x + r                                       rounded to the type of x: the next residual
    y = g h / sqrt(mean(h^2) + eps) + b             RMSNorm
    y = g (h - mean h) / sqrt(var h + eps) + b      LayerNorm, the variance over K

computed in float32 and rounded once; then, if wanted, y as int8 codes under a scale of its row (`int8.py`), which are
those of the rounded y.

Not run on hardware yet: see `laconic.kernels.triton`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.kernels.triton._device import FLOATS, on_device
from laconic.kernels.triton.int8 import _int8_scale, _to_int8

__all__ = ["LONGEST", "Normalized", "layer_norm", "rms_norm"]

LONGEST = 32768  # features: a program holds its row in registers


class Normalized(NamedTuple):
    """What a fused norm gives.

    Attributes:
        y: (..., K), or None if it was quantized.
        total: x + residual, (..., K); x itself without a residual.
        codes: int8 (..., K), or None.
        scale: float32 (..., 1) of the codes, or None.
    """

    y: Tensor | None
    total: Tensor
    codes: Tensor | None
    scale: Tensor | None


def rms_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, *,
    residual: Tensor | None = None, quantized: bool = False,
) -> Normalized:  # fmt: skip
    """RMSNorm over the last axis of x + residual.

    Args:
        x: (..., K) float32, float16 or bfloat16, K at most `LONGEST`.
        weight, bias: (K,) floating.
        eps: added to the mean square.
        residual: of the shape and type of x.
        quantized: give int8 codes instead of y.

    Raises:
        ValueError: a shape or a type is not one that this kernel takes.
    """
    return _norm(x, weight, bias, eps, residual, quantized, centred=False)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None, quantized: bool = False,
) -> Normalized:  # fmt: skip
    """LayerNorm over the last axis of x + residual; arguments and errors as of `rms_norm`."""
    return _norm(x, weight, bias, eps, residual, quantized, centred=True)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, quantized: bool, *,
    centred: bool,
) -> Normalized:  # fmt: skip
    name, k = "layer_norm" if centred else "rms_norm", x.shape[-1] if x.ndim else 0
    if x.dtype not in FLOATS or not 0 < k <= LONGEST:
        raise ValueError(
            f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; this kernel takes {', '.join(map(str, FLOATS))} with 1 to "
            f"{LONGEST} features, torch's own takes the others"
        )
    for label, t in (("weight", weight), ("bias", bias)):
        if t is not None and (tuple(t.shape) != (k,) or t.dtype not in FLOATS):
            raise ValueError(
                f"{name}: {label} is {t.dtype} of shape {tuple(t.shape)}, must be floating of shape {(k,)}"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{name}: residual is {residual.dtype} of shape {tuple(residual.shape)}, must be {x.dtype} of {tuple(x.shape)}"
        )
    x = x.contiguous()
    rows = x.numel() // k
    total = torch.empty_like(x) if residual is not None else x
    y = None if quantized else torch.empty_like(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device) if quantized else None
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if quantized else None
    if rows:
        block = triton.next_power_of_2(k)
        with on_device(x):
            _fused_norm[(rows,)](
                x, residual.contiguous() if residual is not None else None,
                weight.contiguous() if weight is not None else None, bias.contiguous() if bias is not None else None,
                y, total, codes, scale, k, float(eps), CENTRED=centred, BLOCK=block,
                num_warps=max(1, min(16, block // 512)), enable_fp_fusion=False,
            )  # fmt: skip
    return Normalized(y, total, codes, scale)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _fused_norm(
    x, residual, weight, bias, y, total, codes, scale, K, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row, held in registers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    at = row * K + k
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        stored = h.to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=mask)
        h = stored.to(tl.float32)
    if CENTRED:
        mean = tl.div_rn(tl.sum(h, axis=0), K + 0.0)
        h = tl.where(mask, h - mean, 0.0)
    size = tl.sqrt_rn(tl.div_rn(tl.sum(h * h, axis=0), K + 0.0) + eps)
    h = tl.div_rn(h, size + tl.zeros_like(h))
    if weight is not None:
        h *= tl.load(weight + k, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + k, mask=mask, other=0.0).to(tl.float32)
    rounded = h.to(x.dtype.element_ty)
    if codes is None:
        tl.store(y + at, rounded, mask=mask)
    else:
        v = tl.where(mask, rounded.to(tl.float32), 0.0)
        s = _int8_scale(tl.max(tl.abs(v), axis=0))
        tl.store(scale + row, s)
        tl.store(codes + at, _to_int8(v, s), mask=mask)
