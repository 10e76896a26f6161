"""Products with packed weights: y = act(x W^T + b) + r, W (N, K) in 2 to 8 bits, NF4, FP4, ternary or binary.

Three kernels, chosen by the number of rows M of x (M, K):

- `_gemv`, M <= 8: multiplies and adds in float32. Each program reads the codes of a few rows once for all of x.
- `_gemm`, beyond: tiles of codes become weights in the type of x, as the reference's are, and go to the tensor cores
  (float32 to plain multiply-adds: no TF32), summed in float32.
- `_rows`: weights themselves, for `dequantize` and `embedding`, bit-equal to the reference.

Where N alone gives too few programs to fill the GPU, K is split, and partial sums (splits, M, N) in float32 are added
by `_reduce` in the order of k. Nothing is added atomically and no choice depends on a timing that changes the order of
a sum: the same call gives the same bits from run to run. (The autotuned configurations differ in how N is cut and how
deep loads are pipelined.) Bias, activation and residual are applied in float32, and the result is rounded once.

Codes are read as they lie in the artifact (`_device.py`).

Experts take the same kernels: the rows of x are those of one expert, found through a sorted list (`_gemm`), or each
row of x is a product of its own (`_gemv`).

Not run on hardware yet: see `laconic.kernels.triton`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from laconic.kernels.triton._device import FLOATS, Format, format_of, on_device, processors, table_of
from laconic.kernels.triton._products import _gemm, _gemv, _reduce, _rows
from laconic.numerics import Codebook, Scheme

__all__ = ["GEMV_ROWS", "dequantize", "embedding", "experts", "input_not_covered", "linear", "not_covered"]

GEMV_ROWS = 8  # the most rows of x that `_gemv` takes
LONE_ROWS = 16  # the most rows of x that experts take one by one
MAX_SPLITS = 16
WAVES = 2  # programs that are wanted for each multiprocessor

# What a program takes at a time: outputs, and units of a row. Fixed, because they order the sums.
GEMV_TILE, GEMV_UNITS = 8, 64


def not_covered(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int) -> str:
    """Why the kernels do not take this packed (N, k) matrix, and the reference has to; "" if they do."""
    rows = codes.shape[0]
    if k == 0 or rows == 0:
        return "a matrix without elements"
    if scheme.scale.granularity == "token":
        return "scales per token, which belong to activations"
    if isinstance(scheme.element, Codebook):
        return "a codebook, whose table lies with the tensor"
    groups = scheme.scale.groups(k) if scheme.scale.granularity == "group" else 1
    if tuple(codes.shape) != (rows, scheme.element.words(k)) or codes.dtype != torch.int32:
        return f"codes of {codes.dtype} and shape {tuple(codes.shape)}"
    if scale.dtype not in FLOATS or scale.ndim != 2 or scale.shape[0] not in (1, rows) or scale.shape[1] != groups:
        return f"scales of {scale.dtype} and shape {tuple(scale.shape)}"
    if (zero is None) != (scheme.zero == "none"):
        return "zero points that do not go with the scheme"
    if zero is not None:
        integer = scheme.zero == "int"
        stored = (scheme.element.words(scale.shape[0]), groups) if integer else tuple(scale.shape)
        if tuple(zero.shape) != stored or zero.dtype not in ((torch.int32,) if integer else FLOATS):
            return f"zero points of {zero.dtype} and shape {tuple(zero.shape)}"
    if any(t is not None and t.device != codes.device for t in (scale, zero)):
        return "tensors on several devices"
    return ""


def input_not_covered(
    x: Tensor, codes: Tensor, bias: Tensor | None, residual: Tensor | None, out_shape: tuple[int, ...]
) -> str:
    """Why the kernels do not take this input, bias (N,) or (E, N), and residual; "" if they do."""
    if x.dtype not in FLOATS:
        return f"an input of {x.dtype}"
    if x.numel() == 0:
        return "an input without elements"
    if any(t is not None and t.device != codes.device for t in (x, bias, residual)):
        return "tensors on several devices"
    if bias is not None and bias.dtype != x.dtype:
        return f"a bias of {bias.dtype}"
    if residual is not None and (residual.dtype != x.dtype or tuple(residual.shape) != out_shape):
        return f"a residual of {residual.dtype} and shape {tuple(residual.shape)}"
    return ""


def linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, *, scheme: str, act: str = "none",
) -> Tensor:  # fmt: skip
    """act(x W^T + b) + r of operands that `not_covered` and `input_not_covered` have nothing against.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        codes, scale, zero: a packed (N, K) matrix, as `torch.ops.laconic.linear` takes it.
        bias: (N,), of the type of x.
        residual: (..., N), of the type of x.
        scheme: of the weight, as text.
        act: a name in `laconic.kernels.ops.ACTIVATIONS`.
    """
    how, k, n = Scheme.parse(scheme), x.shape[-1], codes.shape[0]
    flat = x.reshape(-1, k).contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    weight = _Weight(codes, scale, zero, how, k)
    residual = residual.contiguous() if residual is not None else None
    bias = bias.contiguous() if bias is not None else None
    run = _run_gemv if flat.shape[0] <= GEMV_ROWS else _run_gemm
    with on_device(x):
        run(flat, weight, bias, residual, out.view(-1, n), act)
    return out


def experts(
    x: Tensor, index: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None,
    *, out: int, scheme: str, act: str = "none",
) -> Tensor:  # fmt: skip
    """y_t = act(x_t W_e^T + b_e), e = index_t; nan for an index that is no expert's, which only the GPU knows.

    Args:
        x: (T, K) float32, float16 or bfloat16.
        index: (T,) integers.
        codes, scale, zero: a packed (E * out, K) matrix.
        bias: (E, out), of the type of x.
        out: features of an expert's output.
        scheme: of the weights, as text.
        act: a name in `laconic.kernels.ops.ACTIVATIONS`.
    """
    how, (tokens, k) = Scheme.parse(scheme), x.shape
    x, bias = x.contiguous(), bias.contiguous() if bias is not None else None
    y = torch.empty((tokens, out), dtype=x.dtype, device=x.device)
    weight = _Weight(codes, scale, zero, how, k)
    index = index.contiguous()
    with on_device(x):
        if tokens <= LONE_ROWS:
            _run_gemv(x, weight, bias, None, y, act, index)
        else:
            _run_gemm(x, weight, bias, None, y, act, index)
    return y


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, scheme: str, k: int, dtype: torch.dtype
) -> Tensor:
    """The (N, k) matrix itself: computed in float32, rounded to `dtype`."""
    return _weights(None, codes, scale, zero, scheme, k, dtype)


def embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, scheme: str, dim: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` of the packed matrix, (*ids.shape, dim); nan for ids outside, which only the GPU knows."""
    flat = ids.reshape(-1).contiguous()
    return _weights(flat, codes, scale, zero, scheme, dim, dtype).view(*ids.shape, dim)


# --- launching ------------------------------------------------------------------------------------------------------


class _Weight:
    """A packed matrix as the kernels take it: pointers, strides in elements of them, constants."""

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int) -> None:
        # clone and not contiguous(): a (rows, 1) view counts as contiguous whatever its last stride, and has no bytes.
        codes = codes if codes.stride(-1) == 1 else codes.clone(memory_format=torch.contiguous_format)
        self.format: Format = format_of(scheme, k, per_row=scale.shape[0] > 1 or codes.shape[0] == 1)
        self.rows, self.k = codes.shape[0], k
        self.row_bytes = 4 * codes.shape[1]
        self.codes = codes if self.format.by_words else codes.view(torch.uint8)
        self.scale, self.groups = scale.contiguous(), scale.shape[1]
        self.zero = zero.contiguous() if zero is not None else None
        self.table = table_of(scheme, codes.device)
        self.units = self.format.units(k)

    def arguments(self) -> dict[str, object]:
        """What describes the matrix to a kernel."""
        return {
            "codes": self.codes,
            "scale": self.scale,
            "zero": self.zero,
            "table": self.table,
            "code_stride": self.codes.stride(0),
            "groups": self.groups,
            **self.format.constants(),
        }


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts K is cut so that the GPU is filled: by shapes and the device alone, never by timing."""
    wanted = WAVES * processors(device) // max(1, programs)
    return max(1, min(wanted, tiles, MAX_SPLITS))


def _run_gemv(
    x: Tensor, weight: _Weight, bias: Tensor | None, residual: Tensor | None, out: Tensor, act: str,
    index: Tensor | None = None,
) -> None:  # fmt: skip
    m, n = out.shape
    rows = 1 if index is not None else triton.next_power_of_2(m)
    lone = m if index is not None else 1
    tile, units = GEMV_TILE, GEMV_UNITS if rows <= 2 else GEMV_UNITS // 2
    blocks = triton.cdiv(n, tile)
    splits = _splits(blocks * lone, triton.cdiv(weight.units, units), x.device)
    partial = torch.empty((splits, m, n), dtype=torch.float32, device=x.device) if splits > 1 else None
    _gemv[(blocks, splits, lone)](
        x, bias, residual, index, out, partial, m, n, weight.k, weight.units, weight.row_bytes, weight.rows // n,
        **weight.arguments(), ACT=act, SPLITS=splits, ROWS=rows, BLOCK_N=tile, BLOCK_U=units, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    if partial is not None:
        _finish(partial, bias, residual, index, out, act)


def _run_gemm(
    x: Tensor, weight: _Weight, bias: Tensor | None, residual: Tensor | None, out: Tensor, act: str,
    index: Tensor | None = None,
) -> None:  # fmt: skip
    m, n = out.shape
    most = 32 if x.dtype == torch.float32 else 64  # without tensor cores a larger tile does not fit into registers
    block_m = max(16, min(most, triton.next_power_of_2(m)))
    block_k = 32 if x.dtype == torch.float32 or weight.format.group % 64 == 32 else 64
    lists: tuple[Tensor | None, ...] = (None, None, None, None)
    m_blocks = triton.cdiv(m, block_m)
    if index is not None:
        lists = tiles = _tiles_of_experts(index, weight.rows // n, block_m)
        m_blocks = tiles[1].shape[0]
    # The splits must not depend on the tile that the autotuner picks.
    programs = m_blocks * triton.cdiv(n, 128)
    splits = 1 if index is not None else _splits(programs, triton.cdiv(weight.k, 4 * block_k), x.device)
    partial = torch.empty((splits, m, n), dtype=torch.float32, device=x.device) if splits > 1 else None
    _gemm[lambda meta: (m_blocks * triton.cdiv(n, meta["BLOCK_N"]), splits)](
        x, bias, residual, *lists, out, partial, m, n, weight.k, m_blocks,
        **weight.arguments(), ACT=act, SPLITS=splits, BLOCK_M=block_m, BLOCK_K=block_k, enable_fp_fusion=True,
    )  # fmt: skip
    if partial is not None:
        _finish(partial, bias, residual, None, out, act)


def _finish(
    partial: Tensor, bias: Tensor | None, residual: Tensor | None, index: Tensor | None, out: Tensor, act: str
) -> None:
    splits, m, n = partial.shape
    block = 256
    _reduce[(m, triton.cdiv(n, block))](
        partial, bias, residual, index, out, m, n, SPLITS=splits, ACT=act, BLOCK_N=block, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def _tiles_of_experts(index: Tensor, count: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert, and for each tile of at most `block` of them: expert, first and last + 1 in that order.

    All on the GPU and without waiting for it, so there are as many tiles as there could be: those that are not needed
    begin where they end. Rows whose index is no expert's come first or last, and belong to tiles of expert -1.
    """
    tokens = index.shape[0]
    index = torch.where((index >= 0) & (index < count), index, count).to(torch.int64)
    order = index.argsort(stable=True)
    numbers = torch.arange(count + 1, device=index.device)  # the last one: rows of no expert
    ends = torch.searchsorted(index[order], numbers, right=True)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    last = ((sizes + block - 1) // block).cumsum(0)
    tile = torch.arange(tokens // block + min(tokens, count + 1), device=index.device)
    expert = torch.searchsorted(last, tile, right=True)
    used = expert <= count
    expert = expert.clamp(max=count)
    within = tile - (last - (sizes + block - 1) // block)[expert]
    begin = (ends - sizes)[expert] + within * block
    end = torch.minimum(begin + block, ends[expert])
    expert = torch.where(expert == count, -1, expert)
    return order, expert, torch.where(used, begin, 0), torch.where(used, end, 0)


def _weights(
    ids: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, dtype: torch.dtype
) -> Tensor:
    weight = _Weight(codes, scale, zero, Scheme.parse(scheme), k)
    rows = weight.rows if ids is None else ids.shape[0]
    out = torch.empty((rows, k), dtype=dtype, device=codes.device)
    block_r, block_k = 4, 512
    if rows:
        with on_device(codes):
            _rows[(triton.cdiv(rows, block_r), triton.cdiv(k, block_k))](
                ids, out, rows, weight.rows, k, **weight.arguments(), BLOCK_R=block_r, BLOCK_K=block_k,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out
