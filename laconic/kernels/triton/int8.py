"""Integer activations times integer weights: x and W as int8, sums in int32, scales at the end.

Activations (M, K) are quantized when they are seen, a scale to a row, by the token scheme of `laconic.numerics`:

    s = 2 max |x| / 255 (1 if x = 0)        q = clamp(round(x / s), -128, 127)

Weights are those of the integer schemes, as packed: 2 to 8 bits with a code q in [0, 2^b - 1], centred on h = 2^(b-1).
With one weight scale to a row, or one in all, the whole sum is one of integers, and exact:

    y = act(s_x s_w (sum_k q_x (q - h) + (h - z) sum_k q_x) + b) + r

With groups each group's sum is scaled by itself and added in float32, so a group has to be a multiple of 32 codes.

Not run on hardware yet: see `laconic.kernels.triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.kernels.triton import interpreted
from laconic.kernels.triton._device import (
    FLOATS,
    _epilogue,
    _natural_code,
    _round,
    _scale_and_zero,
    format_of,
    on_device,
)
from laconic.numerics import Int, Scheme

__all__ = ["linear", "not_covered", "quantize_rows"]

# Sums of integers come out the same in whatever order, so all of these may be tuned.
CONFIGS = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (M, K) and scales float32 (M, 1) of finite activations, a scale to a row.

    Args:
        x: (M, K) float32, float16 or bfloat16.
    """
    x = x.contiguous()
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m:
        block = min(4096, triton.next_power_of_2(max(k, 1)))
        with on_device(x):
            _quantize_rows[(m,)](x, codes, scale, k, BLOCK=block, num_warps=4, enable_fp_fusion=False)
    return codes, scale


def not_covered(scheme: Scheme, k: int) -> str:
    """Why `linear` does not take weights (N, k) of this scheme; "" if it does."""
    if not isinstance(scheme.element, Int):
        return f"weights of {scheme.element}"
    if scheme.scale.granularity == "token":
        return "scales per token belong to activations"
    group = scheme.scale.group_of(k)
    if scheme.scale.granularity == "group" and group < k and group % 32:
        return f"groups of {group}, no multiple of 32"
    return ""


def linear(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, *, scheme: str, dtype: torch.dtype, act: str = "none", out_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """act(s_x q_x W^T + b) + r of quantized activations.

    Args:
        x: (M, K) int8.
        x_scale: float32, (M, 1) or, where one scale is known for all, (1, 1).
        codes, scale, zero: a packed (N, K) matrix, as `torch.ops.laconic.linear` takes it.
        bias: (N,) floating.
        residual: (M, N) floating.
        scheme: of the weight, as text; integers in groups of a multiple of 32.
        dtype: of the result.
        act: a name in `laconic.kernels.ops.ACTIVATIONS`.
        out_scale: if given, the result is int8 codes under this one scale, for the next layer.

    Raises:
        ValueError: a shape, a type or the scheme is not one that this kernel takes.
    """
    how, (m, k), n = Scheme.parse(scheme), x.shape, codes.shape[0]
    why = not_covered(how, k)
    if not why and (
        x.dtype != torch.int8 or x_scale.dtype != torch.float32 or tuple(x_scale.shape) not in ((m, 1), (1, 1))
    ):
        why = f"x of {x.dtype} and shape {tuple(x.shape)} under scales of {x_scale.dtype} and shape {tuple(x_scale.shape)}"
    if not why and (codes.dtype != torch.int32 or codes.shape[1] != how.element.words(k)):
        why = f"codes of {codes.dtype} and shape {tuple(codes.shape)} for {k} inputs"
    if not why and dtype not in FLOATS:
        why = f"a result of {dtype}"
    if why:
        raise ValueError(f"int8.linear under {scheme}: takes no {why}; use laconic::linear on float activations")
    out = torch.empty((m, n), dtype=dtype if out_scale is None else torch.int8, device=x.device)
    if m == 0 or n == 0:
        return out
    codes = codes if codes.stride(-1) == 1 else codes.clone(memory_format=torch.contiguous_format)
    form = format_of(how, k, per_row=scale.shape[0] > 1 or n == 1)
    block_k = 128
    while form.group and form.group % block_k:
        block_k //= 2
    stream = codes if form.by_words else codes.view(torch.uint8)
    with on_device(x):
        _int8_gemm[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)](
            x.contiguous(), x_scale, bias.contiguous() if bias is not None else None,
            residual.contiguous() if residual is not None else None, out, 1.0 if out_scale is None else out_scale,
            m, n, k, stream, scale.contiguous(), zero.contiguous() if zero is not None else None, stream.stride(0),
            scale.shape[1], BITS=form.bits, GROUP=form.group, PER_ROW=form.per_row, ZERO=form.zero,
            PER_TOKEN=x_scale.shape[0] > 1 or m == 1, TO_INT8=out_scale is not None, ACT=act,
            M_BUCKET=min(128, triton.next_power_of_2(m)), BLOCK_K=block_k, enable_fp_fusion=False,
        )  # fmt: skip
    return out


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_rows(x, codes, scale, K, BLOCK: tl.constexpr):
    """One row: its largest size, then its codes."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, K, BLOCK):
        k = begin + lanes
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)))
    s = _int8_scale(tl.max(largest, axis=0))
    tl.store(scale + row, s)
    for begin in range(0, K, BLOCK):
        k = begin + lanes
        v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(codes + row * K + k, _to_int8(v, s), mask=k < K)


@triton.jit
def _int8_scale(largest):
    """s = 2 max |x| / 255, and 1 where all are 0."""
    s = tl.div_rn(2.0 * largest, 255.0)
    return tl.where(s == 0.0, 1.0, s)


@triton.jit
def _to_int8(v, s):
    """clamp(round(v / s), -128, 127): a true division, as the reference has, so that ties fall the same way."""
    q = tl.div_rn(v, s + tl.zeros_like(v))
    q = tl.minimum(tl.maximum(q, -128.0), 127.0)
    return _round(q).to(tl.int8)


@triton.autotune(CONFIGS[:1] if interpreted() else CONFIGS, key=["M_BUCKET", "N", "K", "BITS", "GROUP"])
@triton.jit
def _int8_gemm(
    x, x_scale, bias, residual, out, out_scale, M, N, K, codes, scale, zero, code_stride, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr, ZERO: tl.constexpr, PER_TOKEN: tl.constexpr,
    TO_INT8: tl.constexpr, ACT: tl.constexpr, M_BUCKET: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs (BLOCK_M, BLOCK_N); BLOCK_K divides the group."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row = n.to(tl.int64)
    half: tl.constexpr = (1 << BITS) // 2
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    inputs = tl.zeros((BLOCK_M,), dtype=tl.int32)  # sum_k q_x
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a = tl.load(x + m * K + k[None, :], mask=(m < M) & (k < K)[None, :], other=0)
        q = _natural_code(codes, row * code_stride, k[:, None], (n < N) & (k < K)[:, None], "int", BITS)
        w = (q - half).to(tl.int8)
        if GROUP == 0:
            total = tl.dot(a, w, total, out_dtype=tl.int32)
            if ZERO != "none":
                inputs += tl.sum(a.to(tl.int32), axis=1)
        else:
            part = tl.dot(a, w, out_dtype=tl.int32).to(tl.float32)
            s, z = _scale_and_zero(scale, zero, row, begin // GROUP, groups, n < N, BITS, ZERO, PER_ROW)
            if ZERO != "none":
                part += tl.sum(a.to(tl.int32), axis=1).to(tl.float32)[:, None] * (half - z)
            y += part * s
    if GROUP == 0:
        y = total.to(tl.float32)
        s, z = _scale_and_zero(scale, zero, row, 0, groups, n < N, BITS, ZERO, PER_ROW)
        if ZERO != "none":
            y += inputs.to(tl.float32)[:, None] * (half - z)
        y *= s
    y *= tl.load(x_scale + m, mask=m < M, other=0.0) if PER_TOKEN else tl.load(x_scale)
    mask = (m < M) & (n < N)
    at = m * N + n
    y = _epilogue(y, bias, n, residual, at, mask, ACT)
    if TO_INT8:
        tl.store(out + at, _to_int8(y, out_scale), mask=mask)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
