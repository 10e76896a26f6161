"""Linear layers on packed weights by the compiled kernels: what `torch.ops.laconic.linear` runs on a CPU.

The reference in `laconic.kernels.ops` is the truth. Sums are taken in another order here, so results agree to
rounding of float32 (a part in 10^6 of the largest value), and are the same bits from run to run and for any number of
threads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from laconic.kernels import native
from laconic.numerics import Binary, Codebook, Float, Levels, Scheme, Ternary

__all__ = ["ACTS", "linear", "takes", "takes_int8", "weights_of"]

ACTS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

TABLE = 16  # entries of a table of levels at most

_ZERO = {"none": 0, "int": 1, "real": 2}
_SCALE = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def takes(scheme: Scheme) -> bool:
    """Whether the kernels read what is packed so: scales that are numbers, and tables of few numbers, not of runs."""
    element = scheme.element
    if isinstance(element, Levels | Float) and element.levels > TABLE:
        return False
    return scheme.scale.plain and not (isinstance(element, Codebook) and (element.dim > 1 or element.levels > TABLE))


def weights_of(
    codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int, levels: Tensor | None = None
) -> Any:
    """The extension's description of a packed matrix (rows, k): addresses of these tensors, which must stay alive.

    Args:
        levels: the table of a codebook, float32, which has no zero points.

    Raises:
        ValueError: a tensor has another type or shape than the scheme says.
    """
    native.check("linear", "codes", codes, (torch.int32,), 2)
    native.check("linear", "scale", scale, tuple(_SCALE), 2)
    if zero is not None:
        native.check("linear", "zero", zero, (torch.int32,) if scheme.zero == "int" else (scale.dtype,), 2)
    rows, words = codes.shape
    group = scheme.scale.group_of(k)
    element = scheme.element
    base3 = isinstance(element, Ternary)
    levels = _table(element) if isinstance(element, Levels | Float | Binary) else levels
    return native.module().Weights(
        codes.data_ptr(), codes.numel(), rows, words, scale.data_ptr(), scale.numel(), _SCALE[scale.dtype],
        scale.shape[0], zero.data_ptr() if zero is not None else 0, zero.numel() if zero is not None else 0,
        _ZERO[scheme.zero], levels.data_ptr() if levels is not None else 0, levels.numel() if levels is not None else 0,
        scale.shape[1], group, 2 if base3 else element.bits, k, base3,
    )  # fmt: skip


@functools.cache
def _table(element: Levels | Float | Binary) -> Tensor:
    """The levels of an element, kept for the life of the process, since the extension gets their address."""
    with torch.inference_mode(False):
        return torch.tensor(element.table, dtype=torch.float32)


def takes_int8(scheme: Scheme, k: int) -> bool:
    """Whether integer products can run: evenly spaced levels, in groups of whole words of four."""
    if isinstance(scheme.element, Levels | Float | Codebook):
        return False
    return scheme.scale.granularity != "group" or scheme.scale.groups(k) == 1 or scheme.scale.group_of(k) % 4 == 0


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scheme: Scheme,
    act: str,
    *,
    int8: bool = False,
    x_scale: float = 0.0,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """y = act(x W^T + b) + r; see `torch.ops.laconic.linear`.

    Args:
        int8: round x to 8 bits first (see `laconic.kernels.inputs`) and take integer products; else products are
            float32, which is for few rows of x.
        x_scale: of x under `int8`, where one is known before; 0: each row has its own.
        threads: None is torch's number.
        isa: number of the instruction set, -1 the best of this CPU; for tests.

    Raises:
        ValueError: shapes or types do not fit, or int8 with groups that are no multiple of 4.
    """
    k, rows = x.shape[-1], codes.shape[0]
    levels = None
    if isinstance(scheme.element, Codebook):
        assert zero is not None
        levels, zero = zero.float().reshape(-1).contiguous(), None  # alive until the kernel is done
    w = weights_of(codes, scale, zero, scheme, k, levels)
    m = math.prod(x.shape[:-1])
    flat = x.reshape(m, k).float().contiguous()
    out = torch.empty((m, rows), dtype=torch.float32)
    bias = bias.float().contiguous() if bias is not None else None
    other = residual.expand(*x.shape[:-1], rows).reshape(m, rows).float().contiguous() if residual is not None else None
    native.module().linear(
        w, flat.data_ptr(), flat.numel(), m, out.data_ptr(), out.numel(),
        bias.data_ptr() if bias is not None else 0, rows if bias is not None else 0,
        other.data_ptr() if other is not None else 0, other.numel() if other is not None else 0,
        ACTS[act], int8, x_scale, torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return out.view(*x.shape[:-1], rows).to(x.dtype)
