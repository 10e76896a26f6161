"""`shiftquant`: training in integers, forwards and backwards, with gradients whose channels differ by powers of two.

For a layer Y = X W^T, X (T, in), W (out, in), with the gradient G (T, out), three products are taken in integers:

    Y = s_X s_W Q_X Q_W^T              dX = G^ W^              dW = G^T X^
    s = max | . | / (2^(b-1) - 1)      of X as a whole, of W and G also; Q by rounding, of G stochastically

Channels c of G differ widely in size, and dX adds them up: a scale of its own for each could not be taken out of the sum of
integers, but a power of two can. With r_c = max |G_c|, r = max r_c, s = r / (2^(b-1) - 1) and K groups

    k_c = clamp(floor(log2(r / r_c)), 0, K - 1)         Q_c = stochastic_round(G_c 2^k_c / s)
    dX = s 2^-(K-1) s_W sum_c (Q_c << (K - 1 - k_c)) Q_W,c

so a channel that is 2^k smaller loses no bits to the largest, nothing is sorted, and one float scale is left. K = 1 is plain
quantization by tensor. A channel of zeros has k = K - 1. Bias and its gradient are floats. Rounding is straight through.

Source: "Towards Accurate and Efficient Sub-8-Bit Integer Training", Guo et al., 2024, arXiv 2411.10948. No official code
was found, and the paper's body could not be read: the rule for k_c above is the natural one, the paper chooses its groups
by the variance that they leave. Its L1 norms are `laconic.norm.L1BatchNorm2d` and `L1LayerNorm`, whose `quantizer` may be
an `IntRounding` of this file.

The integers are computed here as whole floats, which hold their sums exactly: this shows what training in integers gives, and
saves no time. Weights are kept as floats by the optimizer; at the end they are packed like any others (`rtn` at the same
bits, one scale to a tensor). First and last layers are best kept at 8 bits (`to_integer_`). Use it to train for hardware
that multiplies integers alone.

Example:
    >>> import torch
    >>> layer = IntLinear(16, 4, bits=(4, 4, 4))
    >>> x = torch.randn(8, 16)
    >>> codes, scale = int_codes(x, 4)
    >>> codes.abs().max().item() <= 7, layer(x).shape
    (True, torch.Size([8, 4]))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from laconic.core.card import Card
from laconic.core.fake_quant import rounded
from laconic.core.surgery import Swapped, swap
from laconic.errors import BadInput

Bits = tuple[int, int, int]
MODES = ("shift", "channel", "float")
ROUNDINGS = ("stochastic", "nearest")
EXACT = 1 << 24  # whole numbers up to this are exact in float32


# --- mathematics ------------------------------------------------------------------------------------


def int_codes(
    x: Tensor, bits: int, rounding: str = "nearest", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Whole numbers of the type of x, -(2^(b-1) - 1) to 2^(b-1) - 1, and their scale (): 1 where all of x is 0."""
    top = (1 << (bits - 1)) - 1
    largest = x.detach().abs().amax() if x.numel() else x.new_zeros(())
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / top)
    return rounded(x / scale, rounding, generator).clamp(-top, top), scale


@dataclass(frozen=True)
class ShiftCodes:
    """A gradient in integers, channel by channel.

    Attributes:
        codes: Q (rows, channels), whole numbers.
        shifts: k (channels,) int64.
        scale: s () of channels with k = 0.
        groups: K.
    """

    codes: Tensor
    shifts: Tensor
    scale: Tensor
    groups: int

    def shifted(self) -> Tensor:
        """Q << (K - 1 - k), whole numbers whose scale is that of `base`."""
        return self.codes * (2.0 ** (self.groups - 1 - self.shifts)).to(self.codes.dtype)

    @property
    def base(self) -> Tensor:
        """s 2^-(K-1)."""
        return self.scale / 2 ** (self.groups - 1)

    def dequantize(self) -> Tensor:
        """G^ (rows, channels)."""
        return self.shifted() * self.base


def shift_codes(
    gradient: Tensor, bits: int, groups: int = 4, rounding: str = "stochastic", generator: torch.Generator | None = None
) -> ShiftCodes:
    """A gradient (rows, channels) in integers under one scale and a power of two for each channel.

    Args:
        gradient: G.
        bits: b, with a sign.
        groups: K, how many powers.
        rounding: "stochastic" or "nearest".
        generator: randomness of the first; torch's own by default.
    """
    top = (1 << (bits - 1)) - 1
    sizes = gradient.detach().abs().amax(0) if len(gradient) else gradient.new_zeros(gradient.shape[1])
    largest = sizes.amax() if len(sizes) else gradient.new_zeros(())
    ratio = largest / torch.where(sizes == 0, torch.ones_like(sizes), sizes)
    # frexp is exact where a logarithm is not: ratio = m 2^e with 1/2 <= m < 1.
    shifts = (torch.frexp(ratio).exponent.long() - 1).clamp(0, groups - 1)
    shifts = torch.where(sizes == 0, groups - 1, shifts)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / top)
    wanted = gradient / scale * (2.0**shifts).to(gradient.dtype)
    return ShiftCodes(rounded(wanted, rounding, generator).clamp(-top, top), shifts, scale, groups)


class IntRounding:
    """x in integers of so many bits and back, one scale to a tensor; the `quantizer` of `laconic.norm`'s L1 norms."""

    def __init__(self, bits: int = 8, rounding: str = "nearest"):
        _check_bits("IntRounding", bits)
        self.bits, self.rounding = bits, rounding

    def __call__(self, x: Tensor) -> Tensor:
        """Of the shape and type of x, without a gradient."""
        codes, scale = int_codes(x.detach(), self.bits, self.rounding)
        return codes * scale


def _quantized_gradient(
    gradient: Tensor, bits: int, groups: int, mode: str, rounding: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Numbers whose product is taken for dX, scales (channels,) that cannot be taken out of it, and one that can."""
    if mode == "float":
        return gradient, None, gradient.new_ones(())
    if mode == "channel":
        top = (1 << (bits - 1)) - 1
        sizes = gradient.abs().amax(0) if len(gradient) else gradient.new_zeros(gradient.shape[1])
        scale = torch.where(sizes == 0, torch.ones_like(sizes), sizes / top)
        return rounded(gradient / scale, rounding).clamp(-top, top), scale, gradient.new_ones(())
    found = shift_codes(gradient, bits, groups, rounding)
    return found.shifted(), None, found.base


def _wide_enough(numbers: float, dtype: torch.dtype) -> torch.dtype:
    """A type that holds whole numbers of that size exactly."""
    return torch.float64 if numbers >= EXACT or dtype == torch.float64 else torch.float32


class _Product(torch.autograd.Function):
    """A layer's product in integers: `forward_` computes it, `to_input` and `to_weight` its two derivatives.

    All three are linear in each argument, so scales are taken out, and whole numbers go in.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: _Layer) -> Tensor:
        x_codes, x_scale = int_codes(x, how.bits[1])
        w_codes, w_scale = int_codes(weight, how.bits[0])
        ctx.save_for_backward(x_codes, x_scale, w_codes, w_scale)
        ctx.how = how
        bound = 2.0 ** (how.bits[0] + how.bits[1] - 2) * weight[0].numel()
        dtype = _wide_enough(bound, x.dtype)
        return (how.product(x_codes.to(dtype), w_codes.to(dtype)) * (x_scale * w_scale)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        how: _Layer = ctx.how
        rows = gradient.movedim(how.channel, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        codes, scales, scale = _quantized_gradient(flat, how.bits[2], how.groups, how.gradients, how.rounding)
        whole = how.gradients != "float"
        size = 2.0 ** (how.bits[2] - 1 + how.groups - 1) if whole else 0.0
        bound = size * 2.0 ** (max(how.bits[:2]) - 1) * max(len(flat), w_codes.numel() // w_codes.shape[1])
        dtype = _wide_enough(bound, gradient.dtype)
        codes = (codes if scales is None else codes * scales).to(dtype)
        g = codes.view(rows.shape).movedim(-1, how.channel)
        to_x = to_w = None
        if ctx.needs_input_grad[0]:
            to_x = (how.to_input(g, w_codes.to(dtype), x_codes.shape) * (scale * w_scale)).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_w = (how.to_weight(g, x_codes.to(dtype), w_codes.shape) * (scale * x_scale)).to(gradient.dtype)
        return to_x, to_w, None


@dataclass(frozen=True)
class _Layer:
    """What `_Product` has to know of a layer."""

    bits: Bits
    groups: int
    gradients: str
    rounding: str
    channel: int
    product: Callable[[Tensor, Tensor], Tensor]
    to_input: Callable[[Tensor, Tensor, torch.Size], Tensor]
    to_weight: Callable[[Tensor, Tensor, torch.Size], Tensor]


# --- the layers -------------------------------------------------------------------------------------


def _check_bits(who: str, *bits: int) -> None:
    if not all(isinstance(b, int) and 2 <= b <= 16 for b in bits):
        raise ValueError(f"{who}: integers have 2 to 16 bits, not {', '.join(map(str, bits))}")


class _Integer(nn.Module):
    """The options of both layers."""

    def _options(self, bits: Bits, shift_groups: int, gradients: str, rounding: str) -> None:
        _check_bits(type(self).__name__, *bits)
        if len(bits) != 3 or shift_groups < 1:
            raise ValueError(f"{type(self).__name__}: bits={bits} are those of W, X and G; shift_groups={shift_groups}")
        if gradients not in MODES or rounding not in ROUNDINGS:
            raise ValueError(
                f"{type(self).__name__}: gradients={gradients!r}, rounding={rounding!r}: one of {', '.join(MODES)}, and "
                f"of {', '.join(ROUNDINGS)}"
            )
        self.bits: Bits = (bits[0], bits[1], bits[2])
        self.shift_groups, self.gradients, self.rounding = shift_groups, gradients, rounding

    def _int_repr(self) -> str:
        return f"bits={self.bits}, shift_groups={self.shift_groups}, gradients={self.gradients!r}"


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class IntLinear(_Integer, nn.Linear):
    """`nn.Linear` whose products are of integers, forwards and backwards.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.
        bits: of W, X and G.
        shift_groups: K; 1 is one scale for all of G.
        gradients: "shift"; "channel" gives each channel a float scale, which integers cannot do, as a bound; "float" leaves
            them.
        rounding: of G, "stochastic" or "nearest".

    Raises:
        ValueError: bits, groups or names that there are not; in the call, an input of another shape.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, bits: Bits = (6, 6, 6), shift_groups: int = 4,
        rounding: str = "stochastic", *, gradients: str = "shift", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._options(bits, shift_groups, gradients, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError(f"IntLinear takes {self.in_features} features, found {tuple(input.shape)}")
        how = _Layer(
            self.bits, self.shift_groups, self.gradients, self.rounding, -1,
            lambda x, w: x @ w.t(),
            lambda g, w, shape: g @ w,
            lambda g, x, shape: g.reshape(-1, shape[0]).t() @ x.reshape(-1, shape[1]),
        )  # fmt: skip
        y = _Product.apply(_wide(input), _wide(self.weight), how)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._int_repr()}"


class IntConv2d(_Integer, nn.Conv2d):
    """`nn.Conv2d` whose products are of integers, forwards and backwards.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            torch.
        bits, shift_groups, gradients, rounding: see `IntLinear`; channels of G are the outputs.

    Raises:
        ValueError: as `IntLinear`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, bias: bool = True, padding_mode: Any = "zeros", bits: Bits = (6, 6, 6), shift_groups: int = 4,
        rounding: str = "stochastic", *, gradients: str = "shift", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype,
        )  # fmt: skip
        self._options(bits, shift_groups, gradients, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 4 or input.shape[1] != self.in_channels:
            raise ValueError(f"IntConv2d takes (N, {self.in_channels}, H, W), found {tuple(input.shape)}")
        x, padding = _wide(input), self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        geometry = (self.stride, padding, self.dilation, self.groups)
        how = _Layer(
            self.bits, self.shift_groups, self.gradients, self.rounding, 1,
            lambda x, w: F.conv2d(x, w, None, *geometry),
            lambda g, w, shape: conv2d_input(shape, w, g, *geometry),
            lambda g, x, shape: conv2d_weight(x, shape, g, *geometry),
        )  # fmt: skip
        y = _Product.apply(x, _wide(self.weight), how)
        return (y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, {self._int_repr()}"


def to_integer_(
    model: nn.Module, bits: Bits = (6, 6, 6), shift_groups: int = 4, *, ends: Bits | None = (8, 8, 8),
    gradients: str = "shift", rounding: str = "stochastic",
) -> Swapped:  # fmt: skip
    """Put `IntLinear` and `IntConv2d` in the places of a model's linear layers and convolutions, in place.

    Args:
        model: to be trained.
        bits, shift_groups, gradients, rounding: see `IntLinear`.
        ends: bits of the first and the last of them; None for those of the others.

    Returns:
        The report of `laconic.swap`.

    Raises:
        BadInput: the model has no such layer, or options that there are not.
    """
    paths = [path for path, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    if not paths:
        raise BadInput(f"{type(model).__name__} has no linear layer or convolution to compute in integers")
    ends_of = {model.get_submodule(paths[0]), model.get_submodule(paths[-1])} if ends is not None else set()
    try:
        _check_bits("to_integer_", *bits, *(ends or ()))
        IntLinear(1, 1, bits=bits, shift_groups=shift_groups, gradients=gradients, rounding=rounding)
    except ValueError as error:
        raise BadInput(str(error)) from error

    def made(old: Any) -> nn.Module:
        chosen: Any = ends if old in ends_of else bits
        options: Any = {
            "bits": chosen, "shift_groups": shift_groups, "gradients": gradients, "rounding": rounding,
            "bias": old.bias is not None,
        }  # fmt: skip
        if isinstance(old, nn.Linear):
            return IntLinear(old.in_features, old.out_features, **options)
        return IntConv2d(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            padding_mode=old.padding_mode, **options,
        )  # fmt: skip

    return swap(model, (nn.Linear, nn.Conv2d), made)


CARD = Card(
    id="shiftquant",
    title="Towards Accurate and Efficient Sub-8-Bit Integer Training",
    authors="Guo et al.",
    year=2024,
    source="arXiv 2411.10948",
    family="quant",
    summary="Trains in integers of few bits, forwards and backwards; channels of a gradient are scaled by powers of two.",
    objects={"IntLinear": "Layer", "IntConv2d": "Layer"},
    traits={"IntLinear": ("gradient:surrogate",), "IntConv2d": ("gradient:surrogate",)},
    use="To train for, or on, hardware that multiplies integers alone.",
    avoid="On hardware with floats: it trains a little worse there, and no faster.",
    composes=("l1_norm",),
    claim={
        "text": "With weights, inputs and gradients in 4 bits, a network whose gradients have four powers of two to choose "
        "from for each channel is more accurate than one whose gradients have one scale, by more than half a point.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("one_scale", "shiftquant"),
        "seeds": 5,
        "minutes": 2,
        "task": "digits",
    },
)
