"""`a2q`: quantized weights whose sums of products cannot overflow a narrow accumulator, whatever the inputs.

With inputs of N bits, integers q of M bits and an accumulator of P bits, two's complement, no partial sum overflows if

    |q|_1 <= T = (2^(P-1) - 1) 2^(signed - N)             signed: 1 if inputs have a sign, else 0
    |q|_1 <= T = (2^P - 2) / (2^N - 1)                    A2Q+: where the q of a row sum to zero

Each row v (K,) of a weight has a learned scale s = 2^d and a learned norm g = 2^t:

    q = clamp(trunc(v min(g / s, T) / |v|_1), +-(2^(M-1) - 1))          w = s q

trunc rounds towards zero, so no row exceeds its norm. A2Q+ subtracts from v its mean first, in the numerator and in
|v|_1. It starts from s = max |v| / (2^(M-1) - 1) and g = |v|_1, of the row as it is. trunc and clamp are straight through;
where g / s > T no gradient reaches g, and `a2q_penalty` draws it back: sum over rows of relu(t - log2 T - d).

Source: "A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance", Colbert, Pappalardo, Petri-Koenig, 2023,
arXiv 2308.13504; A2Q+: "A2Q+: Improving Accumulator-Aware Weight Quantization", Colbert, Pappalardo, Petri-Koenig,
Umuroglu, 2024, arXiv 2401.10432. Official code: Xilinx/brevitas, BSD-3. We agree with it. Truncation leaves the sum of a
row of A2Q+ off zero by a little, and its bound then holds by a little less: `check_accumulator` reckons with the codes
themselves.

At inference the codes are packed (`laconic.core.qat.convert`), and s goes into the scale of the output. The bias is added
after the sum, outside of the accumulator. Use it where accumulators are narrow: FPGAs, microcontrollers, 16-bit SIMD lanes.
Elsewhere the plain `laconic.core.qat.FakeWeight` loses less. It also makes weights sparse.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.weight import accumulator_aware_, check_accumulator
    >>> model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> accumulator_aware_(model, weight_bits=4, acc_bits=10, input_bits=4)
    ['0', '2']
    >>> all(layer.fits for layer in check_accumulator(model, 10).values())
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.fake_quant import code_range, pass_through
from laconic.core.qat import INPUTS, FakeInput, PackableWeight, prepare, quantized_layers
from laconic.errors import BadInput
from laconic.nn import PackedParameterSpec, matrix_view, restore_view
from laconic.nn.packed import View, _is_conv1d
from laconic.numerics import Int, Scale, Scheme

LEAST = 1e-8  # of norms and scales, as in the official code: a row of zeros has neither


# --- mathematics ------------------------------------------------------------------------------------


def overflow_bound(acc_bits: int, input_bits: int, signed: bool = False, *, zero_centred: bool = False) -> float:
    """T: how large the sum of the magnitudes of a row of integer weights may be.

    >>> overflow_bound(16, 8), overflow_bound(16, 8, True), overflow_bound(16, 8, zero_centred=True)
    (127.99609375, 255.9921875, 256.99607843137255)

    Raises:
        ValueError: widths that hold no number.
    """
    if acc_bits < 2 or input_bits < 1 + signed:
        raise ValueError(f"an accumulator of {acc_bits} bits for inputs of {input_bits}: 2 and {1 + signed} are least")
    if zero_centred:
        return (2**acc_bits - 2) / (2**input_bits - 1)
    return (2 ** (acc_bits - 1) - 1) * 2.0 ** (signed - input_bits)


def accumulator_codes(
    rows: Tensor, scale: Tensor, norm: Tensor, bound: float, qmax: int, qmin: int | None = None,
    *, zero_centred: bool = False,
) -> Tensor:  # fmt: skip
    """q (rows, K), of the type of the rows; trunc and clamp are straight through.

    Args:
        rows: v (rows, K).
        scale: s (rows, 1).
        norm: g (rows, 1).
        bound: T.
        qmax: largest code.
        qmin: least one; -qmax by default.
        zero_centred: subtract the mean of each row (A2Q+).
    """
    if zero_centred:
        rows = rows - rows.mean(1, keepdim=True)
    allowed = torch.clamp(norm / scale, max=bound)
    divisor = _at_least(_at_least(rows.abs().sum(1, keepdim=True)) / allowed)
    wanted = rows / divisor
    return pass_through(wanted, wanted.detach().trunc().clamp(-qmax if qmin is None else qmin, qmax))


def _at_least(x: Tensor) -> Tensor:
    """max(x, 1e-8), with the gradient of x."""
    return pass_through(x, x.detach().clamp(min=LEAST))


def wrap_sums(sums: Tensor, bits: int) -> Tensor:
    """What an accumulator of `bits` bits holds after these sums, in two's complement: whole numbers, of any type.

    Wrapping commutes with adding, so it does not matter after which products an accumulator wraps.
    """
    half = 2 ** (bits - 1)
    return torch.remainder(sums + half, 2 * half) - half


# --- the parametrization ----------------------------------------------------------------------------


class A2Q(PackableWeight):
    """The parametrization, for `torch.nn.utils.parametrize.register_parametrization` or `accumulator_aware_`.

    Args:
        weight: v, as it is; the first scales and norms are made for it.
        weight_bits: M.
        acc_bits: P.
        input_bits: N.
        input_signed: whether inputs have a sign.
        zero_center: A2Q+.
        narrow: leave out the code -2^(M-1).
        view: how the weight becomes a matrix (rows, K).

    Raises:
        ValueError: widths that hold no number, or more than the 8 bits that can be packed.
    """

    def __init__(
        self, weight: Tensor, weight_bits: int = 8, acc_bits: int = 16, input_bits: int = 8, input_signed: bool = False,
        zero_center: bool = False, *, narrow: bool = True, view: View = "rows",
    ):  # fmt: skip
        super().__init__(Scheme(Int(weight_bits), Scale("channel", dtype="float32")), view)
        self.bound = overflow_bound(acc_bits, input_bits, input_signed, zero_centred=zero_center)
        self.acc_bits, self.input_bits, self.input_signed = acc_bits, input_bits, input_signed
        self.zero_center, self.narrow = zero_center, narrow
        self.qmin, self.qmax = code_range(weight_bits, narrow=narrow)
        with torch.no_grad():
            rows = _wide(matrix_view(weight, view))
            largest = rows.abs().amax(1, keepdim=True).clamp(min=LEAST)
            self.log2_scale = nn.Parameter((largest / self.qmax).log2())
            self.log2_norm = nn.Parameter(rows.abs().sum(1, keepdim=True).clamp(min=LEAST).log2())

    def forward(self, weight: Tensor) -> Tensor:
        q, scale = self._codes(_wide(matrix_view(weight, self.view)))
        spec = PackedParameterSpec(self.scheme, tuple(weight.shape), self.view)
        return restore_view((q * scale).to(weight.dtype), spec)

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        q, scale = self._codes(_wide(matrix_view(weight.detach(), self.view)))
        half = self.scheme.element.levels // 2
        return (q.detach() + half).to(torch.uint8), scale.detach().float(), None

    def penalty(self) -> Tensor:
        """sum over rows of relu(t - log2 T - d): how far the norms have run beyond what is used of them."""
        return F.relu(_wide(self.log2_norm) - math.log2(self.bound) - _wide(self.log2_scale)).sum()

    def _codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scale, norm = _at_least(_wide(self.log2_scale).exp2()), _wide(self.log2_norm).exp2()
        q = accumulator_codes(rows, scale, norm, self.bound, self.qmax, self.qmin, zero_centred=self.zero_center)
        return q, scale

    def extra_repr(self) -> str:
        signs = "signed" if self.input_signed else "unsigned"
        plus = ", zero_center=True" if self.zero_center else ""
        return f"{self.scheme.element}, acc_bits={self.acc_bits}, {signs} inputs of {self.input_bits} bits{plus}"


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def accumulator_aware_(
    model: nn.Module, weight_bits: int = 8, acc_bits: int = 16, input_bits: int = 8, *, input_signed: bool = False,
    zero_center: bool = False, select: Callable[[str, nn.Module], bool] | None = None, quantize_inputs: bool = True,
) -> list[str]:  # fmt: skip
    """Register `A2Q` on the weights of a model's linear layers and convolutions, in place.

    Args:
        model: to be trained, best from a trained start.
        weight_bits, acc_bits, input_bits, input_signed, zero_center: see `A2Q`.
        select: whether to take the layer at a path.
        quantize_inputs: round the layers' inputs to `input_bits`, too, by a learned scale (LSQ); without it the caller
            does.

    Returns:
        Paths of the layers.

    Raises:
        BadInput: no layer is left to take, or widths that hold no number.
    """

    def make(path: str, module: Any) -> A2Q:
        view: View = "transposed" if _is_conv1d(module) else "rows"
        return A2Q(module.weight, weight_bits, acc_bits, input_bits, input_signed, zero_center, view=view)

    def quantizer(path: str, module: nn.Module) -> nn.Module:
        return FakeInput(input_bits, input_signed)

    return prepare(model, make, inputs=quantizer if quantize_inputs else "", select=select).layers


def a2q_penalty(model: nn.Module) -> Tensor:
    """The regularization of all layers with `A2Q`, to be added to the loss with a small weight (the paper: 1e-3).

    Raises:
        BadInput: there is no such layer.
    """
    found = [last.penalty() for _, last in quantized_layers(model).values() if isinstance(last, A2Q)]
    if not found:
        raise BadInput(f"{type(model).__name__} has no layer with A2Q: see accumulator_aware_")
    return torch.stack(found).sum()


# --- what an accumulator does -----------------------------------------------------------------------


@dataclass(frozen=True)
class AccumulatorNeed:
    """What a layer asks of an accumulator.

    Attributes:
        fits: whether no partial sum can leave the accumulator, for any inputs in any order.
        bits: the least width of which this is true.
        largest: magnitude of the largest sum that any inputs give.
        l1: largest sum of magnitudes of a row's integer weights.
        zeros: share of integer weights that are 0.
    """

    fits: bool
    bits: int
    largest: int
    l1: int
    zeros: float


def check_accumulator(
    model: nn.Module, acc_bits: int, input_bits: int | None = None, input_signed: bool | None = None
) -> dict[str, AccumulatorNeed]:
    """Path of each layer that is trained in integers -> what it asks of an accumulator, exactly, from its codes.

    With inputs from a to b, a <= 0 <= b, no partial sum exceeds  max = sum q+ b + sum q- a  or falls below
    min = sum q+ a + sum q- b,  since inputs may be zero.

    Args:
        model: with layers that `laconic.core.qat.prepare` or `accumulator_aware_` made.
        acc_bits: width of the accumulator.
        input_bits, input_signed: of inputs; by default what each layer was made for, or its input quantizer says.

    Raises:
        BadInput: no layer, weights with several scales or zero points to a row, or nothing says how wide inputs are.
    """
    found = {}
    for path, (module, last) in _integer_layers(model).items():
        bits, signed = _input_width(path, module, last, input_bits, input_signed)
        q = _signed_codes(module, last).long()
        low, high = code_range(bits, signed=signed)
        positive, negative = q.clamp(min=0).sum(1), q.clamp(max=0).sum(1)
        top = int((positive * high + negative * low).max())
        bottom = int((positive * low + negative * high).min())
        need = 1 + max(top.bit_length(), (-bottom - 1).bit_length() if bottom < 0 else 0)
        found[path] = AccumulatorNeed(
            need <= acc_bits, need, max(top, -bottom), int(q.abs().sum(1).max()), float((q == 0).double().mean())
        )
    return found


@contextmanager
def simulated_accumulator(model: nn.Module, acc_bits: int) -> Iterator[dict[str, int]]:
    """Inside, layers trained in integers add up their products in accumulators of that width, which wrap around.

    Gives path -> how many sums have overflowed so far. Only for layers whose inputs a `FakeInput` rounds.

    Raises:
        BadInput: there is no such layer.
    """
    overflows: dict[str, int] = {}
    with ExitStack() as stack:
        for path, (module, last) in _integer_layers(model).items():
            if isinstance(getattr(module, INPUTS, None), FakeInput):
                overflows[path] = 0
                hook = _WrappedSums(path, last, acc_bits, overflows)
                stack.callback(module.register_forward_hook(hook).remove)
        if not overflows:
            raise BadInput(f"{type(model).__name__} has no layer that multiplies integers: see accumulator_aware_")
        yield overflows


class _WrappedSums:
    """A forward hook: the layer's output anew, from sums of integer products that wrap around."""

    def __init__(self, path: str, last: PackableWeight, bits: int, overflows: dict[str, int]):
        self.path, self.last, self.bits, self.overflows = path, last, bits, overflows

    @torch.no_grad()
    def __call__(self, module: Any, arguments: tuple, output: Tensor) -> Tensor:
        step = getattr(module, INPUTS).step().double()
        x = (arguments[0].double() / step).round()
        original = module.parametrizations["weight"].original
        _, scale, _ = self.last.codes(original)
        spec = PackedParameterSpec(self.last.scheme, tuple(original.shape), self.last.view)
        q = restore_view(_signed_codes(module, self.last).double(), spec)
        # Doubles hold these sums exactly.
        if isinstance(module, nn.modules.conv._ConvNd):
            sums = module._conv_forward(x, q, None)
            where = (-1, *[1] * (sums.ndim - 2))
        else:
            sums = x @ (q if self.last.view == "transposed" else q.t())
            where = (-1,)
        held = wrap_sums(sums, self.bits)
        self.overflows[self.path] += int((held != sums).sum())
        result = held * (scale.double().expand(spec.matrix[0], 1).reshape(where) * step)
        return (result if module.bias is None else result + module.bias.double().view(where)).to(output.dtype)


def _integer_layers(model: nn.Module) -> dict[str, tuple[nn.Module, PackableWeight]]:
    found = quantized_layers(model)
    if not found:
        raise BadInput(f"{type(model).__name__} has no layer that is trained in integers: see accumulator_aware_")
    for path, (_, last) in found.items():
        scheme = last.scheme
        if not isinstance(scheme.element, Int) or scheme.zero != "none" or scheme.scale.granularity == "group":
            raise BadInput(f"{path}: {scheme} has no integers that one accumulator adds up for a row")
    return found


def _signed_codes(module: Any, last: PackableWeight) -> Tensor:
    """q (rows, K) int16, around 0."""
    return last.codes(module.parametrizations["weight"].original)[0].to(torch.int16) - last.scheme.element.levels // 2


def _input_width(
    path: str, module: nn.Module, last: PackableWeight, bits: int | None, signed: bool | None
) -> tuple[int, bool]:
    known: Any = last if isinstance(last, A2Q) else None
    quantizer = getattr(module, INPUTS, None)
    if bits is None:
        bits = known.input_bits if known else getattr(quantizer, "bits", None)
    if signed is None:
        signed = known.input_signed if known else getattr(quantizer, "signed", None)
    if bits is None or signed is None:
        raise BadInput(f"{path}: nothing says how wide its inputs are: give input_bits and input_signed")
    return bits, signed


CARD = Card(
    id="a2q",
    title="A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance",
    authors="Colbert, Pappalardo, Petri-Koenig",
    year=2023,
    source="arXiv 2308.13504; A2Q+: arXiv 2401.10432",
    family="weight",
    summary="Trains quantized weights whose sums of products cannot overflow a narrow accumulator, whatever the inputs.",
    objects={"A2Q": "Weight"},
    traits={"A2Q": ("gradient:surrogate",)},
    use="Integer hardware with narrow accumulators, or where weights shall be sparse, too.",
    avoid="Accumulators of 32 bits: nothing overflows there, and plain quantization-aware training loses less.",
    vectors=("a2q",),
    code="github.com/Xilinx/brevitas, BSD-3",
    claim={
        "text": "With weights and inputs of 4 bits and accumulators of 9 that wrap around, training under the bound is "
        "more accurate than quantization-aware training without it, by more than five points.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.05,
        "arms": ("unbounded", "a2q"),
        "seeds": 5,
        "minutes": 2,
        "task": "digits",
    },
)
