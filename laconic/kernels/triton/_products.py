"""The Triton kernels behind `weight_only.py`: products with packed rows, the sum of their parts, and the rows themselves.

In each, a packed matrix is `codes` (int32 words or bytes, as `Format.by_words` says) in rows of stride `code_stride`,
`scale` (rows, groups), `zero` and `table`, with the constants of its `Format`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from laconic.kernels.triton import interpreted
from laconic.kernels.triton._device import (
    _epilogue,
    _load_unit,
    _natural_code,
    _scale_and_zero,
    _unit_code,
    _value,
)

# What is tuned changes neither the order of a sum nor the instructions that make it.
GEMM_CONFIGS = [
    triton.Config({"BLOCK_N": block}, num_warps=4, num_stages=stages) for block in (64, 128) for stages in (3, 2)
]

# Row numbers are int64 before they meet a stride: a packed matrix of experts has more than 2^31 bytes.


@triton.jit
def _gemv(
    x, bias, residual, index, out, partial, M, N, K, units, row_bytes, experts,
    codes, scale, zero, table, code_stride, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, PER_UNIT: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    ZERO: tl.constexpr, ACT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Outputs (ROWS, BLOCK_N) over a part of K; with `index`, row program_id(2) of x alone, times its expert."""
    split = tl.program_id(1)
    m = (tl.program_id(2) + tl.arange(0, ROWS))[:, None, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    row = n.to(tl.int64)
    real = n < N  # rows of the matrix that there are
    bias_at = n
    if index is not None:
        expert = tl.load(index + tl.program_id(2)).to(tl.int64)
        known = (expert >= 0) & (expert < experts)
        expert = tl.where(known, expert, 0)
        row += expert * N
        bias_at = expert * N + n
    in_m = m < M

    acc = tl.zeros((ROWS, BLOCK_N, BLOCK_U), dtype=tl.float32)
    if GROUP == 0:
        s, z = _scale_and_zero(scale, zero, row, 0, groups, real, BITS, ZERO, PER_ROW)
    tiles = tl.cdiv(tl.cdiv(units, BLOCK_U), SPLITS)  # of a split
    for tile in range(split * tiles, split * tiles + tiles):
        u = (tile * BLOCK_U + tl.arange(0, BLOCK_U))[None, None, :]
        here = real & (u < units)
        held = _load_unit(codes, row * code_stride, u, here, KIND, BITS)
        if GROUP > 0 and GROUP % PER_UNIT == 0:
            s, z = _scale_and_zero(scale, zero, row, u * PER_UNIT // GROUP, groups, here, BITS, ZERO, PER_ROW)
        for p in tl.static_range(PER_UNIT):
            k = u * PER_UNIT + p
            a = tl.load(x + m.to(tl.int64) * K + k, mask=in_m & (k < K), other=0.0).to(tl.float32)
            q = _unit_code(codes, row * code_stride, u, held, here, row_bytes, p, KIND, BITS)
            if GROUP > 0 and GROUP % PER_UNIT != 0:
                s, z = _scale_and_zero(scale, zero, row, k // GROUP, groups, real & (k < K), BITS, ZERO, PER_ROW)
            w = _value(q, s, z, table, here, KIND)
            acc += a * tl.where(k < K, w, 0.0)  # behind the row's end 0 times an infinite scale would be nan
    y = tl.sum(acc, axis=2)

    m = tl.program_id(2) + tl.arange(0, ROWS)[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (m < M) & (n < N)
    if index is not None:
        y = tl.where(known, y, float("nan"))
        bias_at = expert * N + n
    else:
        bias_at = n
    at = m.to(tl.int64) * N + n
    if SPLITS == 1:
        y = _epilogue(y, bias, bias_at, residual, at, mask, ACT)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + split.to(tl.int64) * M * N + at, y, mask=mask)


@triton.autotune(GEMM_CONFIGS[:1] if interpreted() else GEMM_CONFIGS, key=["N", "K", "BLOCK_M", "KIND", "BITS"])
@triton.jit
def _gemm(
    x, bias, residual, order, tile_expert, tile_begin, tile_end, out, partial, M, N, K, m_blocks,
    codes, scale, zero, table, code_stride, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, PER_UNIT: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    ZERO: tl.constexpr, ACT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs (BLOCK_M, BLOCK_N) over a part of K; with `order`, of the rows of x that a tile of one expert lists."""
    split = tl.program_id(1)
    block_m = tl.program_id(0) % m_blocks  # neighbours share weights
    n = tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    bias_at = n[None, :]
    known = True
    if order is not None:
        expert = tl.load(tile_expert + block_m)
        known = expert >= 0
        expert = tl.where(known, expert, 0)
        listed = tl.load(tile_begin + block_m) + tl.arange(0, BLOCK_M)
        in_m = listed < tl.load(tile_end + block_m)
        m = tl.load(order + listed, mask=in_m, other=0)
        row += expert * N
        bias_at = (expert * N + n)[None, :]
    else:
        m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_m = m < M
    real, rows = (n < N)[None, :], row[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GROUP == 0:
        s, z = _scale_and_zero(scale, zero, rows, 0, groups, real, BITS, ZERO, PER_ROW)
    tiles = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)  # of a split
    for tile in range(split * tiles, split * tiles + tiles):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(x + (m * K)[:, None] + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0.0)
        k = k[:, None]
        here = real & (k < K)
        q = _natural_code(codes, rows * code_stride, k, here, KIND, BITS)
        if GROUP > 0:
            if GROUP % BLOCK_K == 0:  # one scale for all of the tile's rows
                first = (tile * BLOCK_K + tl.arange(0, 1))[:, None]
                here_first = real & (first < K)
                s, z = _scale_and_zero(
                    scale, zero, rows, first // GROUP, groups, here_first, BITS, ZERO, PER_ROW
                )  # fmt: skip
            else:
                s, z = _scale_and_zero(scale, zero, rows, k // GROUP, groups, here, BITS, ZERO, PER_ROW)
        w = _value(q, s, z, table, here, KIND)
        w = tl.where(k < K, w, 0.0)  # behind the row's end 0 times an infinite scale would be nan
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")

    if order is not None:
        acc = tl.where(known, acc, float("nan"))
    mask = in_m[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if SPLITS == 1:
        y = _epilogue(acc, bias, bias_at, residual, at, mask, ACT)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + split.to(tl.int64) * M * N + at, acc, mask=mask)


@triton.jit
def _reduce(
    partial, bias, residual, index, out, M, N,
    SPLITS: tl.constexpr, ACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums (SPLITS, M, N) of one row of the output, added in their order, and the epilogue."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask, at = n < N, m * N + n
    y = tl.load(partial + at, mask=mask, other=0.0)
    here = at
    for _ in range(1, SPLITS):
        here += (m * 0 + M) * N  # int64 as m is; M and N may be constants, which have no `to`
        y += tl.load(partial + here, mask=mask, other=0.0)
    bias_at = n
    if index is not None:
        bias_at = tl.load(index + m).to(tl.int64) * N + n
        mask_bias = mask & (y == y)  # an index that is no expert's has made nan of y, and has no bias
        y = _epilogue(y, bias, bias_at, residual, at, mask_bias, ACT)
    else:
        y = _epilogue(y, bias, bias_at, residual, at, mask, ACT)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rows(
    ids, out, count, rows, K, codes, scale, zero, table, code_stride, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, PER_UNIT: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights (BLOCK_R, BLOCK_K) of consecutive rows, or of rows `ids`."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (r < count)[:, None] & (k < K)
    row = r
    if ids is not None:
        row = tl.load(ids + r, mask=r < count, other=0).to(tl.int64)
    known = ((row >= 0) & (row < rows))[:, None]
    row = row[:, None]
    here = mask & known
    q = _natural_code(codes, row * code_stride, k, here, KIND, BITS)
    group = k // GROUP if GROUP > 0 else k * 0
    s, z = _scale_and_zero(scale, zero, row, group, groups, here, BITS, ZERO, PER_ROW)
    w = _value(q, s, z, table, here, KIND)
    w = tl.where(known, w, float("nan"))
    tl.store(out + r[:, None] * K + k, w.to(out.dtype.element_ty), mask=mask)
