"""Convolutions of bits and of bytes: ops `laconic::binary_conv2d` and `laconic::int8_conv2d`, and their weights.

Weights lie tap by tap with the channels of a group last, padded to whole 32-bit words: (out, kh, kw, words) int32 of
signs, or (out, kh, kw, bytes) int8. The compiled kernel rounds the input once and makes no matrix of columns. Sums are
exact integers, and the float32 results have the bits of the reference here: act(integer * (scale * x_scale) + bias),
each operation rounded (activations other than relu: to rounding of float32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import native
from laconic.kernels.binary import bias_of, is_native, numbers, pack_signs, threads_of, words_of
from laconic.kernels.cpu_linear import ACTS
from laconic.kernels.ops import ACTIVATIONS
from laconic.numerics import unpack

__all__ = ["binary_conv2d", "int8_conv2d", "pack_binary_weight", "pack_int8_weight", "quantize_input"]

_BITS, _BYTES = 0, 1
Pair = int | Sequence[int]  # of the height and the width, or one for both

_library = torch.library.Library("laconic", "FRAGMENT")
_library.define(
    "binary_conv2d(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? x_scale=None, *, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, int groups=1, int pad_value=0, str act='none') -> Tensor"
)
_library.define(
    "int8_conv2d(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? x_scale=None, Tensor? x_zero=None, "
    "*, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, bool signed=False, str act='none') -> Tensor"
)


# --- weights --------------------------------------------------------------------------------------------------------


def pack_binary_weight(weight: Tensor) -> Tensor:
    """(out, kh, kw, ceil(channels/32)) int32 of a float weight (out, channels, kh, kw): bit 1 where w >= 0."""
    out, channels, *kernel = weight.shape
    rows = weight.detach().permute(0, 2, 3, 1).reshape(-1, channels)
    return pack_signs(rows).view(out, *kernel, words_of(channels))


def pack_int8_weight(codes: Tensor) -> Tensor:
    """(out, kh, kw, channels padded with zeros to a multiple of 4) of int8 codes (out, channels, kh, kw)."""
    if codes.dtype != torch.int8:
        raise ValueError(f"pack_int8_weight: codes are int8, got {codes.dtype}")
    return F.pad(codes.permute(0, 2, 3, 1), (0, -codes.shape[1] % 4)).contiguous()


def _signs(weight: Tensor, channels: int) -> Tensor:
    """float64 (out, channels, kh, kw) of +-1."""
    out, *kernel, words = weight.shape
    bits = unpack(weight.reshape(-1, words), 1, channels).double()
    return (2 * bits - 1).view(out, *kernel, channels).permute(0, 3, 1, 2)


# --- binary ---------------------------------------------------------------------------------------------------------


def binary_conv2d(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None, *,
    stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1, pad_value: int = 0, act: str = "none",
    threads: int | None = None, isa: int = -1,
) -> Tensor:  # fmt: skip
    """y = act(x_scale * scale * conv2d(sgn(x), sgn(W)) + bias), with sgn(0) = 1.

    Args:
        x: (n, groups * channels, height, width) float; its signs are taken here.
        weight: of `pack_binary_weight`.
        scale: one number, or one for each channel of the output.
        bias: (out).
        x_scale: one number, or one for each image; none: 1.
        stride, padding, dilation, groups: as torch's conv2d.
        pad_value: what lies around the signs. 1 and -1 are signs; 0, as float networks have it, is none: places of
            padding then take no part, at the price of a correction at the borders.
        act: none, relu, gelu, gelu_tanh or silu.

    Raises:
        ValueError: a shape, type or number does not fit.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    channels = _check("binary_conv2d", x, weight, torch.int32, groups, act)
    if pad_value not in (-1, 0, 1):
        raise ValueError(f"binary_conv2d: pad_value is {pad_value}, must be -1, 0 or 1")
    if weight.shape[3] != words_of(channels):
        raise ValueError(
            f"binary_conv2d: weight has {weight.shape[3]} words, {channels} channels fill {words_of(channels)}"
        )
    out = weight.shape[0]
    scale, bias = numbers("scale", scale, out, x.device), bias_of(bias, out)
    x_scale = numbers("x_scale", x_scale, x.shape[0], x.device)
    scales = scale.expand(out) * (x_scale if x_scale.numel() == 1 else x_scale[:, None])
    if is_native(x, weight):
        return _run(_BITS, x, weight, scales, bias, stride, padding, dilation, groups, act, threads, isa, pad=pad_value)
    signs = F.pad(
        torch.where(x >= 0, 1.0, -1.0).double(), (*[padding[1]] * 2, *[padding[0]] * 2), value=float(pad_value)
    )
    y = F.conv2d(signs, _signs(weight, channels), None, stride, 0, dilation, groups)
    return _end(y, scales, bias, act).to(x.dtype)


# --- bytes ----------------------------------------------------------------------------------------------------------


def int8_conv2d(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None,
    x_zero: Tensor | None = None, *,
    stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1, signed: bool = False, act: str = "none",
    threads: int | None = None, isa: int = -1,
) -> Tensor:  # fmt: skip
    """y = act(x_scale * scale * conv2d(q(x) - zero, W) + bias), q(x) = clamp(round(x / x_scale) + zero) of 8 bits.

    Args:
        x: (n, groups * channels, height, width) float, rounded here.
        weight: of `pack_int8_weight`.
        scale: one number, or one for each channel of the output.
        bias: (out).
        x_scale: one number; none: of this x, see `quantize_input`.
        x_zero: the code of zero, a whole number in 0..255; none: 0. Only with x_scale and without `signed`.
        stride, padding, dilation, groups: as torch's conv2d. Padding is zero, exactly.
        signed: codes are -128..127 and their zero is 0, instead of 0..255.
        act: none, relu, gelu, gelu_tanh or silu.

    Raises:
        ValueError: a shape, type or number does not fit.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    channels = _check("int8_conv2d", x, weight, torch.int8, groups, act)
    if weight.shape[3] != channels + -channels % 4:
        raise ValueError(
            f"int8_conv2d: weight has {weight.shape[3]} bytes, {channels} channels fill {channels + -channels % 4}"
        )
    out = weight.shape[0]
    x_scale, zero = quantize_input(x, x_scale, x_zero, signed)
    scales = numbers("scale", scale, out, x.device).expand(out) * x_scale
    bias = bias_of(bias, out)
    if is_native(x, weight):
        return _run(
            _BYTES, x, weight, scales, bias, stride, padding, dilation, groups, act, threads, isa,
            factor=1 / x_scale, zero=zero,
        )  # fmt: skip
    codes = ((x.float() * (1 / x_scale)).round() + zero).clamp(0, 255) - zero
    rows = weight[..., :channels].permute(0, 3, 1, 2).double()
    y = F.conv2d(codes.double(), rows, None, stride, padding, dilation, groups)
    return _end(y, scales, bias, act).to(x.dtype)


def quantize_input(x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, signed: bool) -> tuple[Tensor, int]:
    """The step (1) float32 of 8-bit codes and the unsigned code of zero.

    Without a step it follows from this x: max|x| / 127 where signed, else (max - min) / 255 over the range with zero in
    it, and zero becomes round(-min / step).

    Raises:
        ValueError: x_scale is not one number, or x_zero does not go with the rest.
    """
    if x_scale is not None:
        if x_zero is not None and signed:
            raise ValueError("int8_conv2d: x_zero with signed codes, whose zero is 0; leave it out")
        zero = 128 if signed else 0 if x_zero is None else int(x_zero)
        if not 0 <= zero <= 255:
            raise ValueError(f"int8_conv2d: x_zero is {zero}, must be 0 to 255")
        if x_scale.numel() != 1:
            raise ValueError(f"int8_conv2d: x_scale has shape {tuple(x_scale.shape)}, must be one number")
        return x_scale.reshape(1).float(), zero
    if x_zero is not None:
        raise ValueError("int8_conv2d: x_zero without x_scale; give both or none")
    if x.numel() == 0:
        return torch.ones(1, device=x.device), 128 if signed else 0
    low, high = (edge.float().reshape(1) for edge in x.aminmax())
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = torch.maximum(-low, high) / 127 if signed else (high - low) / 255
    step = torch.where(step > 0, step, 1.0)
    return step, 128 if signed else int((-low / step).round().clamp(0, 255))


# --- what both share ------------------------------------------------------------------------------------------------


def _end(y: Tensor, scales: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """float32 from exact sums (n, out, h, w); scales (out) or (n, out)."""
    y = y.float().contiguous() * scales[..., None, None]
    return ACTIVATIONS[act](y if bias is None else y + bias[:, None, None])


def _run(
    kind, x, weight, scales, bias, stride, padding, dilation, groups, act, threads, isa, *, pad=0, factor=None, zero=0
):
    out = torch.empty(_shape(x, weight, stride, padding, dilation), dtype=torch.float32)
    flat, weight, scales = x.float().contiguous(), weight.contiguous(), scales.contiguous()
    native.module().conv(
        kind, flat.data_ptr(), flat.numel(), *x.shape, weight.data_ptr(), weight.view(-1).view(torch.int32).numel(),
        weight.shape[0], groups, weight.shape[1:3], stride, padding, dilation, out.data_ptr(), out.numel(),
        scales.data_ptr(), scales.numel(), bias.data_ptr() if bias is not None else 0,
        bias.numel() if bias is not None else 0, ACTS[act], pad, factor.data_ptr() if factor is not None else 0,
        factor.numel() if factor is not None else 0, zero, threads_of(threads), isa,
    )  # fmt: skip
    return out.to(x.dtype)


def _shape(x, weight, stride, padding, dilation):
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[1 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return (x.shape[0], weight.shape[0], *size)


def _pair(value: Pair) -> tuple[int, int]:
    pair = [value] if isinstance(value, int) else list(value)
    return pair[0], pair[-1]


def _check(op: str, x: Tensor, weight: Tensor, dtype: torch.dtype, groups: int, act: str) -> int:
    """Channels of a group."""
    if x.ndim != 4 or weight.ndim != 4 or weight.dtype != dtype:
        raise ValueError(
            f"{op}: x is (n, channels, height, width) and weight {dtype} (out, kh, kw, words); got "
            f"{tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    if groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups is {groups}, must divide {x.shape[1]} channels and {weight.shape[0]} of the output"
        )
    if act not in ACTS:
        raise ValueError(f"{op}: act={act!r}: one of {', '.join(ACTS)}")
    return x.shape[1] // groups


def _fake_binary_conv2d(
    x, weight, scale, bias=None, x_scale=None, *, stride=1, padding=0, dilation=1, groups=1, pad_value=0, act="none"
):
    return x.new_empty(_shape(x, weight, _pair(stride), _pair(padding), _pair(dilation)))


def _fake_int8_conv2d(
    x, weight, scale, bias=None, x_scale=None, x_zero=None, *, stride=1, padding=0, dilation=1, groups=1, signed=False, act="none"
):  # fmt: skip
    return x.new_empty(_shape(x, weight, _pair(stride), _pair(padding), _pair(dilation)))


for _name, _implementation, _fake in (
    ("binary_conv2d", binary_conv2d, _fake_binary_conv2d),
    ("int8_conv2d", int8_conv2d, _fake_int8_conv2d),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"laconic::{_name}", _fake, lib=_library)
