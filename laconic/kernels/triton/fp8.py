"""Products of float8_e4m3 numbers, where the GPU multiplies them: compute capability 8.9 and later.

    y = act(s_x s_w sum_k f_x f_w + b) + r          s = max |row| / 448 (1 if the row is 0),  f = float8(row / s)

Rows of x get their scale when they are seen; weights (N, K) are float8_e4m3fn tensors with a scale to a row, or one in
all, made by `quantize_rows` as well. Hopper sums FP8 products in fewer bits than float32 has, so each tile of K is added
to the float32 sum by itself.

Not run on hardware yet: see `laconic.kernels.triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.kernels.triton import fp8_missing, interpreted
from laconic.kernels.triton._device import FLOATS, _epilogue, on_device

__all__ = ["DTYPE", "linear", "quantize_rows"]

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max

BLOCK_K = 128  # fixed, because it orders the sums
# As in `weight_only`, what is tuned leaves the order of sums alone, and the rows of x choose BLOCK_M.
CONFIGS = [
    triton.Config({"BLOCK_N": block}, num_warps=4, num_stages=stages) for block in (64, 128) for stages in (3, 4)
]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn (M, K) and scales float32 (M, 1) of a finite matrix, a scale to a row.

    Args:
        x: (M, K) float32, float16 or bfloat16.

    Raises:
        RuntimeError: the GPU has no FP8.
    """
    _require(x.device)
    x = x.contiguous()
    m, k = x.shape
    codes = torch.empty((m, k), dtype=DTYPE, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m:
        block = min(4096, triton.next_power_of_2(max(k, 1)))
        with on_device(x):
            _quantize_rows[(m,)](x, codes, scale, k, LARGEST=LARGEST, BLOCK=block, num_warps=4, enable_fp_fusion=False)
    return codes, scale


def linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    *, dtype: torch.dtype, act: str = "none",
) -> Tensor:  # fmt: skip
    """act(s_x f_x (s_w f_w)^T + b) + r.

    Args:
        x: (M, K) float8_e4m3fn.
        x_scale: float32, (M, 1) or (1, 1).
        weight: (N, K) float8_e4m3fn.
        scale: float32, (N, 1) or (1, 1).
        bias: (N,) floating.
        residual: (M, N) floating.
        dtype: of the result.
        act: a name in `laconic.kernels.ops.ACTIVATIONS`.

    Raises:
        RuntimeError: the GPU has no FP8.
        ValueError: a shape or a type is not one that this kernel takes.
    """
    _require(x.device)
    (m, k), n = x.shape, weight.shape[0]
    for name, t, s in (("x", x, x_scale), ("weight", weight, scale)):
        if t.dtype != DTYPE or t.shape[1] != k:
            raise ValueError(
                f"fp8.linear: {name} is {t.dtype} of shape {tuple(t.shape)}, must be {DTYPE} with {k} columns"
            )
        if s.dtype != torch.float32 or tuple(s.shape) not in ((t.shape[0], 1), (1, 1)):
            raise ValueError(f"fp8.linear: the scale of {name} is {s.dtype} of shape {tuple(s.shape)}, must be float32 of "
                             f"shape {(t.shape[0], 1)} or (1, 1)")  # fmt: skip
    if dtype not in FLOATS:
        raise ValueError(f"fp8.linear: dtype is {dtype}, must be one of {', '.join(map(str, FLOATS))}")
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    with on_device(x):
        _fp8_gemm[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)](
            x.contiguous(), x_scale, weight.contiguous(), scale, bias.contiguous() if bias is not None else None,
            residual.contiguous() if residual is not None else None, out, m, n, k,
            PER_TOKEN=x_scale.shape[0] > 1 or m == 1, PER_ROW=scale.shape[0] > 1 or n == 1, ACT=act,
            BLOCK_M=max(16, min(64, triton.next_power_of_2(m))), BLOCK_K=BLOCK_K, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _require(device: torch.device) -> None:
    why = fp8_missing(device)
    if why:
        raise RuntimeError(f"{why}; use int8, or weights alone in few bits")


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_rows(x, codes, scale, K, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its largest size, then its codes."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, K, BLOCK):
        k = begin + lanes
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)))
    s = tl.div_rn(tl.max(largest, axis=0), LARGEST)
    s = tl.where(s == 0.0, 1.0, s)
    tl.store(scale + row, s)
    for begin in range(0, K, BLOCK):
        k = begin + lanes
        v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        v = tl.div_rn(v, s + tl.zeros_like(v))
        v = tl.minimum(tl.maximum(v, -LARGEST), LARGEST)  # a quotient rounded up would be no number
        tl.store(codes + row * K + k, v.to(tl.float8e4nv), mask=k < K)


@triton.autotune(CONFIGS[:1] if interpreted() else CONFIGS, key=["N", "K", "BLOCK_M"])
@triton.jit
def _fp8_gemm(
    x, x_scale, weight, scale, bias, residual, out, M, N, K,
    PER_TOKEN: tl.constexpr, PER_ROW: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs (BLOCK_M, BLOCK_N)."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row = n.to(tl.int64)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a = tl.load(x + m * K + k[None, :], mask=(m < M) & (k < K)[None, :], other=0.0)
        w = tl.load(weight + row * K + k[:, None], mask=(n < N) & (k < K)[:, None], other=0.0)
        y = tl.dot(a, w, y, max_num_imprecise_acc=BLOCK_K)
    y *= tl.load(x_scale + m, mask=m < M, other=0.0) if PER_TOKEN else tl.load(x_scale)
    y *= tl.load(scale + n, mask=n < N, other=0.0) if PER_ROW else tl.load(scale)
    mask = (m < M) & (n < N)
    at = m * N + n
    y = _epilogue(y, bias, n, residual, at, mask, ACT)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
