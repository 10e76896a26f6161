"""The ops of laconic, registered with torch: `torch.ops.laconic.{linear,embedding,conv,experts,dequantize}`.

Every op takes the packed weight as it lies in the artifact: `codes` (int32 words, a row per output), `scale`
(rows, G), and, where the scheme has one, `zero` (integer zero points packed along dim 0, or real ones as they are).
`scheme` is the string form of a `Scheme`. Later arguments come by keyword, so the signatures need not change.

The implementation here is the reference: unpack a tile of rows, dequantize it to float32, cast, and call the float
operation of torch. Only unpacking and dequantizing integers go through the native kernel, where it is built; both give
the same bits. Gradients are defined for the input, the bias and the residual; packed weights have none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from laconic.kernels import cpu_linear, native
from laconic.kernels.inputs import round_inputs, static_scale
from laconic.kernels.triton import dispatch
from laconic.numerics import Int, Scheme, dequantize, unpack_codes

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
# Weights dequantized at a time, elements: a reused 8 MiB float32 scratch stays near the caches, and fresh memory of
# the whole matrix would cost ten times the unpacking in page faults.
TILE = 1 << 21

_library = torch.library.Library("laconic", "DEF")
_library.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero=None, Tensor? bias=None, Tensor? residual=None, "
    "*, str scheme, str act='none', str inputs='') -> Tensor"
)
_library.define(
    "embedding(Tensor ids, Tensor codes, Tensor scale, Tensor? zero=None, *, str scheme, int dim, ScalarType dtype) "
    "-> Tensor"
)
_library.define(
    "conv(Tensor x, Tensor codes, Tensor scale, Tensor? zero=None, Tensor? bias=None, Tensor? residual=None, "
    "*, str scheme, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups=1, str act='none') -> Tensor"
)
_library.define(
    "experts(Tensor x, Tensor index, Tensor codes, Tensor scale, Tensor? zero=None, Tensor? bias=None, *, int out, "
    "str scheme, str act='none') -> Tensor"
)
_library.define(
    "experts_input_grad(Tensor grad, Tensor index, Tensor codes, Tensor scale, Tensor? zero=None, *, int k, str scheme) "
    "-> Tensor"
)
_library.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero=None, *, str scheme, int k, ScalarType dtype) -> Tensor"
)


# --- the matrix behind the codes ------------------------------------------------------------------------------------


def unpack_zero(zero: Tensor | None, rows: int, scheme: Scheme) -> Tensor | None:
    """Zero points (rows, G), uint8 or real, of what is stored: integer ones are packed along dim 0."""
    if zero is None or scheme.zero == "real":
        return zero
    # clone and not contiguous(): a (groups, 1) view counts as contiguous whatever its last stride, and has no bytes.
    return unpack_codes(zero.t().clone(memory_format=torch.contiguous_format), scheme.element, rows).t().contiguous()


def dequantize_rows(
    codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int, out: Tensor | None = None
) -> Tensor:
    """float32 (rows, k) of packed rows; `zero` already unpacked. Native where possible, else the reference."""
    if isinstance(scheme.element, Int) and native.load() is not None and codes.device.type == "cpu":
        group = scheme.scale.group if scheme.scale.granularity == "group" else None
        return native.dequantize(codes, scale, zero, group, scheme.element.bits, k, out=out)
    values = dequantize(unpack_codes(codes, scheme.element, k), scale, zero, scheme)
    return values if out is None else out.copy_(values)


def _tiles(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int):
    """(begin, end, float32 rows) for all rows, a scratch at a time. The scratch is overwritten by the next tile."""
    rows = codes.shape[0]
    per_row = scale.shape[0] > 1 or rows == 1
    zero = unpack_zero(zero, scale.shape[0], scheme)
    step = max(1, min(rows, TILE // max(1, k)))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        s = scale[begin:end] if per_row else scale
        z = zero[begin:end] if zero is not None and per_row else zero
        out = _scratch(end - begin, k) if codes.device.type == "cpu" else None
        yield begin, end, dequantize_rows(codes[begin:end], s, z, scheme, k, out)


_local = threading.local()


def _scratch(rows: int, k: int) -> Tensor:
    """A reused float32 (rows, k) of this thread."""
    n = rows * k
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            buffer = _local.buffer = torch.empty(max(n, 1), dtype=torch.float32)
    return buffer[:n].view(rows, k)


def _matrix(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((codes.shape[0], k), dtype=dtype, device=codes.device)
    for begin, end, tile in _tiles(codes, scale, zero, scheme, k):
        out[begin:end] = tile
    return out


def _rows_of(codes: Tensor, index: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int) -> Tensor:
    """float32 (len(index), k): some rows only."""
    # index_select, which refuses negative numbers as F.embedding does, where indexing would count from the end.
    some = codes.index_select(0, index)
    if scale.shape[0] == 1 and codes.shape[0] != 1:
        return dequantize_rows(some, scale, unpack_zero(zero, 1, scheme), scheme, k)
    return dequantize_rows(some, scale.index_select(0, index), _zero_rows(zero, index, scheme), scheme, k)


def _zero_rows(zero: Tensor | None, index: Tensor, scheme: Scheme) -> Tensor | None:
    """Zero points (len(index), G) of some rows: of a table of embeddings, all of them would be most of the work."""
    if zero is None or scheme.zero == "real":
        return zero if zero is None else zero.index_select(0, index)
    bits = scheme.element.bits
    first = index.long() * bits
    word = first >> 5
    low, high = (zero.index_select(0, at).long() & 0xFFFFFFFF for at in (word, (word + 1).clamp(max=zero.shape[0] - 1)))
    return ((low | high << 32) >> (first & 31).unsqueeze(1) & (1 << bits) - 1).to(torch.uint8)


# --- the references -------------------------------------------------------------------------------------------------


def _linear(x, codes, scale, zero=None, bias=None, residual=None, *, scheme, act="none", inputs=""):
    how, k = Scheme.parse(scheme), x.shape[-1]
    x = round_inputs(x, inputs)
    out = x.new_empty((*x.shape[:-1], codes.shape[0]))
    for begin, end, tile in _tiles(codes, scale, zero, how, k):
        part = F.linear(x, tile.to(x.dtype), bias[begin:end] if bias is not None else None)
        if begin == 0 and end == codes.shape[0]:
            out = part
        else:
            out[..., begin:end] = part
    y = _activation(act)(out)
    return y if residual is None else y + residual


@contextmanager
def by_reference() -> Iterator[None]:
    """Compute with the references inside of this block, also where a faster kernel is there: to compare, or to debug.

    It holds for the whole process, not for this thread alone.
    """
    global _by_reference
    before, _by_reference = _by_reference, True
    try:
        yield
    finally:
        _by_reference = before


_by_reference = False


def _cpu_linear(x, codes, scale, zero=None, bias=None, residual=None, *, scheme, act="none", inputs=""):
    how = Scheme.parse(scheme)
    fast = not _by_reference and native.load() is not None and act in ACTIVATIONS and cpu_linear.takes(how)
    if fast and not torch.is_autocast_enabled("cpu"):  # else torch says in which type to compute
        known = static_scale(inputs)  # also where it is not taken: a word that is not known is refused
        int8 = bool(inputs) and cpu_linear.takes_int8(how, x.shape[-1])
        x = x if int8 else round_inputs(x, inputs)
        return cpu_linear.linear(x, codes, scale, zero, bias, residual, how, act, int8=int8, x_scale=known)
    return _linear(x, codes, scale, zero, bias, residual, scheme=scheme, act=act, inputs=inputs)


def _embedding(ids, codes, scale, zero=None, *, scheme, dim, dtype):
    flat = ids.reshape(-1)
    rows = _rows_of(codes, flat, scale, zero, Scheme.parse(scheme), dim)
    return rows.to(dtype).reshape(*ids.shape, dim)


def _conv(
    x, codes, scale, zero=None, bias=None, residual=None, *, scheme, kernel, stride, padding, dilation, groups=1, act="none"
):  # fmt: skip
    channels = x.shape[1 if x.dim() == len(kernel) + 2 else 0] // groups
    k = channels * _product(kernel)
    weight = _matrix(codes, scale, zero, Scheme.parse(scheme), k, x.dtype).view(codes.shape[0], channels, *kernel)
    y = _CONV[len(kernel)](x, weight, bias, stride, padding, dilation, groups)
    y = _activation(act)(y)
    return y if residual is None else y + residual


def _experts(x, index, codes, scale, zero=None, bias=None, *, out, scheme, act="none"):
    y = x.new_zeros((x.shape[0], out))
    for e, at, weight in _expert_weights(index, codes, scale, zero, scheme, out, x.shape[-1]):
        y[at] = F.linear(x[at], weight.to(x.dtype), bias[e] if bias is not None else None)
    return _activation(act)(y)


def _experts_input_grad(grad, index, codes, scale, zero=None, *, k, scheme):
    found = grad.new_zeros((grad.shape[0], k))
    for _, at, weight in _expert_weights(index, codes, scale, zero, scheme, grad.shape[-1], k):
        found[at] = grad[at] @ weight.to(grad.dtype)
    return found


def _expert_weights(index, codes, scale, zero, scheme, out, k):
    """(expert, rows of the input that it takes, float32 (out, k)) for every expert that is picked."""
    how = Scheme.parse(scheme)
    zero = unpack_zero(zero, scale.shape[0], how)
    per_row = scale.shape[0] > 1
    for e in torch.unique(index).tolist():
        rows = slice(e * out, (e + 1) * out)
        s = scale[rows] if per_row else scale
        z = zero[rows] if zero is not None and per_row else zero
        yield e, (index == e).nonzero().squeeze(1), dequantize_rows(codes[rows], s, z, how, k)


def _dequantize(codes, scale, zero=None, *, scheme, k, dtype):
    return _matrix(codes, scale, zero, Scheme.parse(scheme), k, dtype)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _activation(name: str):
    if name not in ACTIVATIONS:
        raise ValueError(f"act={name!r}: one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _product(values) -> int:
    result = 1
    for value in values:
        result *= value
    return result


# --- shapes only ----------------------------------------------------------------------------------------------------


def _fake_linear(x, codes, scale, zero=None, bias=None, residual=None, *, scheme, act="none", inputs=""):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _fake_embedding(ids, codes, scale, zero=None, *, scheme, dim, dtype):
    return scale.new_empty((*ids.shape, dim), dtype=dtype)


def _fake_conv(
    x, codes, scale, zero=None, bias=None, residual=None, *, scheme, kernel, stride, padding, dilation, groups=1, act="none"
):  # fmt: skip
    channels = x.shape[1 if x.dim() == len(kernel) + 2 else 0] // groups
    weight = x.new_empty((codes.shape[0], channels, *kernel))
    return _CONV[len(kernel)](x, weight, None, stride, padding, dilation, groups)


def _fake_experts(x, index, codes, scale, zero=None, bias=None, *, out, scheme, act="none"):
    return x.new_empty((x.shape[0], out))


def _fake_experts_input_grad(grad, index, codes, scale, zero=None, *, k, scheme):
    return grad.new_empty((grad.shape[0], k))


def _fake_dequantize(codes, scale, zero=None, *, scheme, k, dtype):
    return scale.new_empty((codes.shape[0], k), dtype=dtype)


# --- gradients ------------------------------------------------------------------------------------------------------
# The output is recomputed from the float weight with autograd on: one definition for every activation, at the price of
# a second forward. Packed tensors have no gradient. Weights come from ops here and not from the functions behind them,
# because backward is traced (torch.compile, export for training) and what unpacks real bytes cannot be.


def _keep(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
    ctx.slots = [isinstance(v, Tensor) for v in inputs]
    ctx.keywords = dict(keyword_only_inputs)


def _kept(ctx) -> list[Tensor | None]:
    saved = iter(ctx.saved_tensors)
    return [next(saved) if slot else None for slot in ctx.slots]


def _through(reference, differentiable: tuple[int, ...]):
    """Backward of `reference` with respect to the positional inputs listed."""

    @once_differentiable
    def backward(ctx, grad):
        inputs = _kept(ctx)
        wanted = [i for i in differentiable if i < len(inputs) and inputs[i] is not None and ctx.needs_input_grad[i]]
        grads: list[Tensor | None] = [None] * len(inputs)
        if wanted:
            with torch.enable_grad():
                fresh = {i: inputs[i].detach().requires_grad_() for i in wanted}
                y = reference(*(fresh.get(i, v) for i, v in enumerate(inputs)), **ctx.keywords)
            found = torch.autograd.grad(y, [fresh[i] for i in wanted], grad, allow_unused=True)
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return tuple(grads)

    return backward


def _differentiable_linear(x, codes, scale, zero=None, bias=None, residual=None, *, scheme, act="none", inputs=""):
    x = x + (round_inputs(x, inputs) - x).detach()  # rounding passes gradients on as they are
    weight = torch.ops.laconic.dequantize(codes, scale, zero, scheme=scheme, k=x.shape[-1], dtype=x.dtype)
    y = _activation(act)(F.linear(x, weight, bias))
    return y if residual is None else y + residual


def _differentiable_conv(
    x, codes, scale, zero=None, bias=None, residual=None, *, scheme, kernel, stride, padding, dilation, groups=1, act="none"
):  # fmt: skip
    channels = x.shape[1 if x.dim() == len(kernel) + 2 else 0] // groups
    k = channels * _product(kernel)
    matrix = torch.ops.laconic.dequantize(codes, scale, zero, scheme=scheme, k=k, dtype=x.dtype)
    weight = matrix.view(codes.shape[0], channels, *kernel)
    y = _activation(act)(_CONV[len(kernel)](x, weight, bias, stride, padding, dilation, groups))
    return y if residual is None else y + residual


@once_differentiable
def _experts_backward(ctx, grad):
    """dx_t = dh_t W_e and db_e = sum of dh_t over the rows t of expert e, where dh is the gradient before `act`."""
    x, index, codes, scale, zero, bias = (*_kept(ctx), None, None)[:6]
    scheme, act = ctx.keywords["scheme"], ctx.keywords.get("act", "none")
    if act != "none":
        h = torch.ops.laconic.experts(x, index, codes, scale, zero, bias, out=ctx.keywords["out"], scheme=scheme)
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            y = _activation(act)(h)
        grad = torch.autograd.grad(y, h, grad)[0]
    needed = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(ctx.slots)
    if needed[0]:
        k = x.shape[-1]
        grads[0] = torch.ops.laconic.experts_input_grad(grad, index, codes, scale, zero, k=k, scheme=scheme)
    if bias is not None and needed[5]:
        grads[5] = torch.zeros_like(bias).index_add(0, index, grad.to(bias.dtype))
    return tuple(grads)


_CPU_AND_ALL = "CompositeExplicitAutograd"
for _name, _reference, _fake, _backward in (
    ("linear", _linear, _fake_linear, _through(_differentiable_linear, (0, 4, 5))),
    ("embedding", _embedding, _fake_embedding, None),
    ("conv", _conv, _fake_conv, _through(_differentiable_conv, (0, 4, 5))),
    ("experts", _experts, _fake_experts, _experts_backward),
    ("experts_input_grad", _experts_input_grad, _fake_experts_input_grad, None),
    ("dequantize", _dequantize, _fake_dequantize, None),
):
    _library.impl(_name, _reference, _CPU_AND_ALL)
    torch.library.register_fake(f"laconic::{_name}", _fake, lib=_library)
    if _backward is not None:
        torch.library.register_autograd(f"laconic::{_name}", _backward, setup_context=_keep, lib=_library)

_library.impl("linear", _cpu_linear, "CPU")
# Convolutions run by the dequantize op, which has a kernel on GPUs.
_ON_GPU = {
    "linear": _linear, "embedding": _embedding, "conv": _differentiable_conv, "experts": _experts, "dequantize": _dequantize,
}  # fmt: skip
dispatch.register(_library, _ON_GPU)
