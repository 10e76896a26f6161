"""Linear layers on sparse weights by the compiled kernels: what `torch.ops.laconic.sparse_linear` runs on a CPU.

The reference in `laconic.kernels.sparse` is the truth. Sums are taken in another order here, so results agree to
rounding of float32, and are the same bits from run to run and for any number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.kernels import native
from laconic.kernels.cpu_linear import ACTS
from laconic.numerics import Sparse24, sparse_from

__all__ = ["sparse_linear"]

_NONE = (0, 0)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    starts: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    act: str,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """y = act(x W^T + b) with float32 products; see `torch.ops.laconic.sparse_linear`.

    Raises:
        ValueError: a tensor has another type or shape than the format says, or an index points outside.
        RuntimeError: the extension is missing.
    """
    cpu = native.module()
    k = x.shape[-1]
    sparse = sparse_from(values, index, starts, scale, format, k)
    rows = sparse.shape[0]
    r, c = (1, 1) if isinstance(sparse, Sparse24) else sparse.block
    m = math.prod(x.shape[:-1])
    flat = x.reshape(m, k).float().contiguous()
    bias = bias.float().contiguous() if bias is not None else None
    out = torch.empty((m, rows), dtype=torch.float32)
    number = {torch.float32: cpu.FLOAT32, torch.bfloat16: cpu.BFLOAT16, torch.int8: cpu.INT8}[values.dtype]
    cpu.sparse_linear(
        _operand(values), number, _operand(index), _operand(starts), _operand(scale), rows, k, r, c,
        _operand(flat), m, _operand(out), _operand(bias), ACTS[act],
        torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return out.view(*x.shape[:-1], rows).to(x.dtype)


def _operand(x: Tensor | None) -> tuple[int, int]:
    return _NONE if x is None else (x.data_ptr(), x.numel())
