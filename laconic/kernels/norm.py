"""LayerNorm and RMSNorm over the last axis, fused with what stands around them: ops `laconic::layer_norm` and others.

For rows s of length d, weight w (d,) and bias b (d,), all in float32 (float64 stays so):

    s = x + residual, rounded to the type of x      a = s - mean(s) for LayerNorm, a = s for RMSNorm
    r = 1 / sqrt(mean(a^2) + eps)                   eps_outside: r = 1 / (sqrt(mean(a^2)) + eps)
    y = a r w + b, rounded to the type of x         unit_offset: (1 + w) in place of w
    scale = 2 max |y| / 255 (1 where that is 0), codes = round(y / scale) in -128..127, from the rounded y

| op                                            | gives                  | for                                      |
|-----------------------------------------------|------------------------|------------------------------------------|
| `layer_norm`, `rms_norm`                      | y                      | a norm                                   |
| `add_layer_norm`, `add_rms_norm`              | y, s                   | a norm and the residual stream around it |
| `layer_norm_int8`, `rms_norm_int8`            | y, codes, scale        | a norm before layers with 8-bit inputs   |
| `add_layer_norm_int8`, `add_rms_norm_int8`    | y, s, codes, scale     | all of it                                |

The first four have gradients, by one op `norm_backward` that goes over the rows once more; a second derivative is taken
through its reference. Those with codes are for inference. The references here are the truth; the compiled kernels agree
to rounding of float32, and give the same bits from run to run and for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from laconic.kernels import native, ops
from laconic.kernels.inputs import round_rows

__all__ = ["DTYPES", "at_once", "backward", "backward_reference", "forward", "reference"]

_NUMBER = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # dtype numbers of the extension
DTYPES = tuple(_NUMBER)  # that the compiled kernels read
_NONE = (0, 0, 1)  # an operand that is not there
_PLAIN = (Tensor, torch.nn.Parameter)


# --- the references -------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centred: bool,
    eps: float,
    unit_offset: bool = False,
    eps_outside: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, s) of the equations above, y before it is rounded: float32, or float64 of float64."""
    s = x if residual is None else x + residual
    a, _, inverse = _moments(s, centred, eps, eps_outside)
    y = a * inverse
    if weight is not None:
        y = y * _gain(weight, y.dtype, unit_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y, s


def backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor | None,
    *,
    centred: bool,
    eps: float,
    unit_offset: bool = False,
    eps_outside: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by s (of the type of x), by the weight and by the bias (d,), float32 or float64, for `x` = s.

        h = dy w      dx = r (h - mean(h)) - c a mean(h a), without mean(h) for RMSNorm      dw = sum of dy a r
        c = r^3, eps_outside: r^2 / sqrt(mean(a^2))                                          db = sum of dy

    `grad_sum` is what s gets from elsewhere, added to dx.
    """
    a, root, r = _moments(x, centred, eps, eps_outside)
    dy = grad.to(a.dtype)
    h = dy if weight is None else dy * _gain(weight, a.dtype, unit_offset)
    c = torch.where(root > 0, r.square() / root, 0.0) if eps_outside else r**3
    dx = r * (h - h.mean(-1, keepdim=True) if centred else h) - c * a * (h * a).mean(-1, keepdim=True)
    if grad_sum is not None:
        dx = dx + grad_sum.to(a.dtype)
    rows = tuple(range(x.ndim - 1))
    return dx.to(x.dtype), (dy * a * r).sum(rows) if rows else dy * a * r, dy.sum(rows) if rows else dy


def _moments(s: Tensor, centred: bool, eps: float, eps_outside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(a, root of its mean square, r), the last two (..., 1)."""
    wide = s.to(_wide(s.dtype))
    a = wide - wide.mean(-1, keepdim=True) if centred else wide
    square = a.square().mean(-1, keepdim=True)
    root = square.sqrt()
    return a, root, 1 / (root + eps) if eps_outside else torch.rsqrt(square + eps)


def _gain(weight: Tensor, dtype: torch.dtype, unit_offset: bool) -> Tensor:
    return 1 + weight.to(dtype) if unit_offset else weight.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _quantize(y: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) of each row, as `inputs.round_inputs` rounds tokens."""
    codes, scale = round_rows(y.float())
    return codes.nan_to_num(-128).to(torch.int8), scale


# --- the kernels ----------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centred: bool,
    eps: float,
    unit_offset: bool = False,
    eps_outside: bool = False,
    codes: bool = False,
    threads: int | None = None,
    isa: int = -1,
) -> tuple[Tensor, ...]:
    """(y[, s][, codes, scale]) by the compiled kernel; s where there is a residual.

    Raises:
        ValueError: a type, shape or device does not fit.
        RuntimeError: the extension is missing.
    """
    cpu = native.module()
    shape, d = x.shape, x.shape[-1]
    rows = x.numel() // d
    x = x.contiguous()
    y = torch.empty(shape, dtype=x.dtype)
    out = [y]
    total = _NONE
    if residual is not None:
        residual = residual.contiguous()
        out.append(torch.empty(shape, dtype=x.dtype))
        total = _operand(out[1])
    coded: tuple[int, int, int, int] = (0, 0, 0, 0)
    if codes:
        out += [torch.empty(shape, dtype=torch.int8), torch.empty((*shape[:-1], 1), dtype=torch.float32)]
        coded = (out[-2].data_ptr(), out[-2].numel(), out[-1].data_ptr(), rows)
    weight, bias = _vector(weight), _vector(bias)
    cpu.norm(
        _operand(x), _operand(residual), _operand(weight), _operand(bias), _operand(y), total, *coded, rows, d,
        (eps, centred, eps_outside, unit_offset), torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return tuple(out)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor | None,
    *,
    centred: bool,
    eps: float,
    unit_offset: bool = False,
    eps_outside: bool = False,
    dweight: bool = True,
    dbias: bool = True,
    threads: int | None = None,
    isa: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward_reference` by the compiled kernel; a gradient that is not wanted comes back with no elements.

    Raises:
        ValueError: a type, shape or device does not fit.
        RuntimeError: the extension is missing.
    """
    cpu = native.module()
    d = x.shape[-1]
    rows = x.numel() // d
    grad, x, weight = grad.contiguous(), x.contiguous(), _vector(weight)
    grad_sum = grad_sum.contiguous() if grad_sum is not None else None
    dx = torch.empty(x.shape, dtype=x.dtype)
    dw, db = (torch.empty(d if wanted else 0, dtype=torch.float32) for wanted in (dweight, dbias))
    cpu.norm_backward(
        _operand(grad), _operand(x), _operand(grad_sum), _operand(weight), _operand(dx),
        _operand(dw if dweight else None), _operand(db if dbias else None), rows, d,
        (eps, centred, eps_outside, unit_offset), torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return dx, dw, db


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _operand(x: Tensor | None) -> tuple[int, int, int]:
    return _NONE if x is None else (x.data_ptr(), x.numel(), _NUMBER[x.dtype])


def _takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernel is there and reads these; else the reference works."""
    return not ops._by_reference and native.load() is not None and all(t is None or t.dtype in _NUMBER for t in tensors)


def at_once(*tensors: Tensor | None) -> bool:
    """Whether `forward` may be called on these without the op around it, which costs more than a short row does.

    So it is for plain tensors on the CPU of which no gradient is wanted, where the kernel is there, and where nothing
    traces, transforms or watches torch's functions: all these must see an operation of torch.
    """
    if ops._by_reference or native.load() is None:
        return False
    gradients = torch.is_grad_enabled()
    for t in tensors:  # a loop, since this is asked for every norm of a token: generators would double its time
        if t is not None and (
            type(t) not in _PLAIN or t.dtype not in _NUMBER or not t.is_cpu or (gradients and t.requires_grad)
        ):
            return False
    return not (
        torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
    )


# --- the ops --------------------------------------------------------------------------------------------------------


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"norm: x has shape {tuple(x.shape)}, needs a last axis of at least one element")
    if not x.is_floating_point():
        raise ValueError(f"norm: x is {x.dtype}, must be floating")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"norm: {name} has shape {tuple(t.shape)}, x {tuple(x.shape)} takes ({x.shape[-1]},)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        shapes = tuple(residual.shape), tuple(x.shape)
        raise ValueError(
            f"norm: the residual is {residual.dtype} of shape {shapes[0]}, x is {x.dtype} of shape {shapes[1]}"
        )


def _variant(centred: bool, add: bool, codes: bool):
    """(reference, CPU implementation, fake, setup_context, backward) of one op."""

    def split(operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        x, *rest = operands
        residual = rest.pop(0) if add else None
        weight, bias = (*rest, None, None)[:2]
        _check(x, residual, weight, bias)
        return x, residual, weight, bias

    def plain(*operands, **options):
        x, residual, weight, bias = split(operands)
        y, s = reference(x, residual, weight, bias, centred=centred, **options)
        y = y.to(x.dtype)
        out = (y, *((s,) if add else ()), *(_quantize(y) if codes else ()))
        return out if len(out) > 1 else out[0]

    def native_or_plain(*operands, **options):
        if not _takes(*operands):
            return plain(*operands, **options)
        out = forward(*split(operands), centred=centred, codes=codes, **options)
        return out if len(out) > 1 else out[0]

    def fake(*operands, **options):
        x, *_ = split(operands)
        out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(1 + add)]
        if codes:
            out += [x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)]
        return tuple(out) if len(out) > 1 else out[0]

    def keep(ctx, inputs, keyword_only_inputs, output):
        x, residual, weight, bias = split(inputs)
        ctx.save_for_backward(x if residual is None else output[1], weight, bias)
        ctx.options = dict(keyword_only_inputs)

    def gradients(ctx, grad, grad_sum=None):
        s, weight, bias = ctx.saved_tensors
        options = {"centred": centred, "eps_outside": False, "unit_offset": False, **ctx.options}
        wanted = ctx.needs_input_grad[1 + add :]
        dweight, dbias = (bool(wanted[i : i + 1] == (True,)) for i in range(2))
        if torch.is_grad_enabled():  # a second derivative is wanted
            dx, dw, db = backward_reference(grad, s, weight, grad_sum, **options)
        else:
            dx, dw, db = torch.ops.laconic.norm_backward(
                grad, s, weight, grad_sum, dweight=dweight, dbias=dbias, **options
            )
        found = (dx, *((dx,) if add else ()))
        return (*found, dw.to(weight.dtype) if dweight else None, db.to(bias.dtype) if dbias else None)

    return plain, native_or_plain, fake, keep, gradients


def _backward_plain(grad, x, weight=None, grad_sum=None, *, dweight=True, dbias=True, **options):
    dx, dw, db = backward_reference(grad, x, weight, grad_sum, **options)
    return dx, dw if dweight else dw.new_empty(0), db if dbias else db.new_empty(0)


def _backward(grad, x, weight=None, grad_sum=None, **options):
    if _takes(grad, x, weight, grad_sum):
        return backward(grad, x, weight, grad_sum, **options)
    return _backward_plain(grad, x, weight, grad_sum, **options)


def _fake_backward(grad, x, weight=None, grad_sum=None, *, dweight=True, dbias=True, **options):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (dx, *(x.new_empty(x.shape[-1] if wanted else 0, dtype=_wide(x.dtype)) for wanted in (dweight, dbias)))


_OPTIONS = "*, float eps, bool unit_offset=False, bool eps_outside=False"
_library = torch.library.Library("laconic", "FRAGMENT")
for _kind_name, _centred in (("layer_norm", True), ("rms_norm", False)):
    for _add in (False, True):
        for _codes in (False, True):
            _name = "add_" * _add + _kind_name + "_int8" * _codes
            _operands = "Tensor x, " + "Tensor residual, " * _add + "Tensor? weight=None, Tensor? bias=None"
            _gives = "Tensor y" + ", Tensor sum" * _add + ", Tensor codes, Tensor scale" * _codes
            _library.define(f"{_name}({_operands}, {_OPTIONS}) -> " + (f"({_gives})" if _add or _codes else "Tensor"))
            _plain, _native_or_plain, _fake, _keep, _grad = _variant(_centred, _add, _codes)
            _library.impl(_name, _plain, "CompositeExplicitAutograd")
            _library.impl(_name, _native_or_plain, "CPU")
            torch.library.register_fake(f"laconic::{_name}", _fake, lib=_library)
            if not _codes:
                torch.library.register_autograd(f"laconic::{_name}", _grad, setup_context=_keep, lib=_library)
_library.define(
    "norm_backward(Tensor grad, Tensor x, Tensor? weight=None, Tensor? grad_sum=None, *, bool centred, float eps, "
    "bool unit_offset=False, bool eps_outside=False, bool dweight=True, bool dbias=True) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)"
)
_library.impl("norm_backward", _backward_plain, "CompositeExplicitAutograd")
_library.impl("norm_backward", _backward, "CPU")
torch.library.register_fake("laconic::norm_backward", _fake_backward, lib=_library)
