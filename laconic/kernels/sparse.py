"""The ops on sparse weights, registered with torch: `torch.ops.laconic.{sparse_linear, sparse_dense}`.

    y = act(x W^T + b)        x (..., k), W (rows, k) sparse, y (..., rows)

The weight comes as it is stored (see `laconic.numerics.sparse`): `values`; `index`, which is the positions of 2:4 or the
block columns; `starts` of block rows, none for 2:4; `scale` of int8 values, else none. `format` says which it is: "2:4",
or "block4x16".

The implementation here is the reference: write the matrix out in float32, cast it to the type of `x`, and call the float
operation of torch. On a CPU the compiled kernels (`laconic.kernels.cpu_sparse`) multiply with the weight as it lies.
Gradients are defined for `x` and the bias; a sparse weight has none.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from laconic.kernels import cpu_sparse, native, ops
from laconic.kernels.ops import _activation, _keep, _through
from laconic.numerics import sparse_from

_library = torch.library.Library("laconic", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor values, Tensor index, Tensor? starts=None, Tensor? scale=None, Tensor? bias=None, "
    "*, str format, str act='none') -> Tensor"
)
_library.define(
    "sparse_dense(Tensor values, Tensor index, Tensor? starts=None, Tensor? scale=None, *, str format, int k, "
    "ScalarType dtype) -> Tensor"
)


def sparse_rows(values: torch.Tensor, starts: torch.Tensor | None, format: str) -> int:
    """Rows of the matrix, from shapes alone."""
    if starts is None:
        return values.shape[0]
    return (starts.shape[0] - 1) * int(format.removeprefix("block").partition("x")[0])


def _sparse_linear(x, values, index, starts=None, scale=None, bias=None, *, format, act="none"):
    weight = sparse_from(values, index, starts, scale, format, x.shape[-1]).unpack()
    return _activation(act)(F.linear(x, weight.to(x.dtype), bias))


def _cpu_sparse_linear(x, values, index, starts=None, scale=None, bias=None, *, format, act="none"):
    fast = not ops._by_reference and native.load() is not None and act in ops.ACTIVATIONS and x.dtype != torch.float64
    # k = 0 has no values to point to; under autocast torch says in which type to compute.
    if fast and x.shape[-1] and not torch.is_autocast_enabled("cpu"):
        return cpu_sparse.sparse_linear(x, values, index, starts, scale, bias, format, act)
    return _sparse_linear(x, values, index, starts, scale, bias, format=format, act=act)


def _sparse_dense(values, index, starts=None, scale=None, *, format, k, dtype):
    return sparse_from(values, index, starts, scale, format, k).unpack().to(dtype)


def _fake_sparse_linear(x, values, index, starts=None, scale=None, bias=None, *, format, act="none"):
    _check_format(starts, format)
    return x.new_empty((*x.shape[:-1], sparse_rows(values, starts, format)))


def _fake_sparse_dense(values, index, starts=None, scale=None, *, format, k, dtype):
    _check_format(starts, format)
    return values.new_empty((sparse_rows(values, starts, format), k), dtype=dtype)


def _check_format(starts, format) -> None:
    known = format == "2:4" if starts is None else re.fullmatch(r"block[1-9][0-9]*x[1-9][0-9]*", format)
    if not known:
        raise ValueError(
            f"sparse format {format!r} is not known: 2:4 without starts, or a block as in block4x16 with them"
        )


def _differentiable_sparse_linear(x, values, index, starts=None, scale=None, bias=None, *, format, act="none"):
    weight = torch.ops.laconic.sparse_dense(values, index, starts, scale, format=format, k=x.shape[-1], dtype=x.dtype)
    return _activation(act)(F.linear(x, weight, bias))


for _name, _reference, _fake in (
    ("sparse_linear", _sparse_linear, _fake_sparse_linear),
    ("sparse_dense", _sparse_dense, _fake_sparse_dense),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"laconic::{_name}", _fake, lib=_library)
_library.impl("sparse_linear", _cpu_sparse_linear, "CPU")
torch.library.register_autograd(
    "laconic::sparse_linear", _through(_differentiable_sparse_linear, (0, 5)), setup_context=_keep, lib=_library
)
