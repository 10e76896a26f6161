"""`bitplane`: products of numbers of any few bits, by counting bits in planes.

A bipolar integer of n bits has no sign bit and no zero: with bits u_i of the unsigned code u,

    v = sum_i (2 u_i - 1) 2^i = 2u - (2^n - 1)                     odd, from -(2^n - 1) to 2^n - 1
    s (u - z) = (s/2) (v + 2^n - 1 - 2z)                           any affine code is bipolar and a constant

so a product of p-bit rows x and q-bit rows w of length K needs one plane product for each pair of planes, and no term is
negative because of a sign bit:

    x w^T = sum_{i<p} sum_{j<q} 2^(i+j) (K - 2 popcount(x_i xor w_j))

Planes (n, rows, ceil(K / 32)) lead, so that each pair streams through memory once; bits past K are 0 in both and count
nothing. `BitPlaneLinear` keeps its weight as planes with a scale for each row, rounds its input row by row, and gives

    y = s_x s_w (V_x V_w^T) + b,        s = max|.| / 2^n           no error exceeds s; with one bit s = mean|.|

The gradient is that of a float layer with the stored weight, straight through the rounding of the input: dx = dy W^.
Planes are not trained. Rounding has no zero, so zeros of the input become +s, and what ReLU left out counts again.

Source: "Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores", Ma, Fang, Shao, Wang,
2024, arXiv 2409.17870; no code was found. Theirs are kernels for tensor cores; here bits are counted on the CPU
(`laconic.kernels.binary`), four planes a side at once, and the work grows with p q: beyond some eight pairs, 8-bit products
(`llm_int8`) are no slower.

Example:
    >>> import torch
    >>> x, w = torch.tensor([[3, 0, 1]], dtype=torch.uint8), torch.tensor([[1, 1, 0]], dtype=torch.uint8)
    >>> product = bitplane_matmul(pack_bitplanes(x, 2), pack_bitplanes(w, 1), 3, 2, 1)
    >>> product.item()                       # (3, -3, -1) and (1, 1, -1)
    1
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from laconic.core.card import Card
from laconic.errors import BadInput
from laconic.kernels.binary import MAX_BITS, bit_product, bit_serial_linear, pack_planes, plane_values, quantize_planes
from laconic.numerics import check_finite

# --- mathematics ------------------------------------------------------------------------------------


def pack_bitplanes(codes: Tensor, bits: int) -> Tensor:
    """Planes (bits, rows, ceil(K/32)) int32 of unsigned codes (rows, K) uint8, of 1 to 8 bits."""
    return pack_planes(codes, bits)


def bitplane_matmul(a_planes: Tensor, w_planes: Tensor, k: int, bits_a: int, bits_w: int) -> Tensor:
    """V_a V_w^T (m, n) int32, exact, of bipolar integers.

    Args:
        a_planes: (bits_a, m, words).
        w_planes: (bits_w, n, words).
        k: true length of the rows.
        bits_a, bits_w: planes of each; said again, since a plane too few gives other numbers and no error.

    Raises:
        ValueError: the planes are not as said.
    """
    for name, planes, bits in (("a_planes", a_planes, bits_a), ("w_planes", w_planes, bits_w)):
        if planes.shape[0] != bits:
            raise ValueError(f"bitplane_matmul: {name} has {planes.shape[0]} planes, and {bits} bits were said")
    return bit_product(a_planes, w_planes, k)


class Bipolar(NamedTuple):
    """An affine code as a bipolar one: s (u - z) = scale (v + offset)."""

    scale: Tensor
    offset: Tensor


def bipolar_of_affine(scale: Tensor, zero: Tensor | float, bits: int) -> Bipolar:
    """scale s/2 and offset 2^n - 1 - 2z, in the shape of s; the offset is 0 for z = (2^n - 1) / 2."""
    return Bipolar(scale / 2, 2**bits - 1 - 2 * torch.as_tensor(zero, dtype=scale.dtype).expand(scale.shape))


def affine_product(a_planes: Tensor, w_planes: Tensor, k: int, a: Bipolar, w: Bipolar) -> Tensor:
    """Y (m, n) = A W^T of matrices of affine codes, in the type of the scales.

    Y = s_a s_w [V_a V_w^T + c_w (V_a 1) + c_a (V_w 1)^T + K c_a c_w]

    Args:
        a_planes, w_planes: see `bitplane_matmul`.
        k: true length of the rows.
        a, w: scale s and offset c of each row, (m) and (n).
    """
    sums_a, sums_w = (plane_values(planes, k, "bipolar").sum(1) for planes in (a_planes, w_planes))
    total = bit_product(a_planes, w_planes, k).to(a.scale.dtype)
    total = total + sums_a[:, None] * w.offset + a.offset[:, None] * sums_w + k * a.offset[:, None] * w.offset
    return total * a.scale[:, None] * w.scale


# --- the layer --------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """The op, with the gradient of the float layer that has the stored weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None, k: int, bits: int) -> Tensor:
        ctx.save_for_backward(planes, scale)
        ctx.k, ctx.biased = k, None if bias is None else bias.dtype
        return bit_serial_linear(x, planes, scale, bias, bits=bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        planes, scale = ctx.saved_tensors
        weight = plane_values(planes, ctx.k, "bipolar") * scale[:, None]
        to_x = (gradient.float() @ weight).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.reshape(-1, len(scale)).sum(0).to(ctx.biased) if ctx.needs_input_grad[3] else None
        return to_x, None, None, to_bias, None, None


class BitPlaneLinear(nn.Module):
    """A linear layer whose weight lies in planes, and whose input is rounded to few bits as it comes.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        bits_w: of the weight, 1 to 8.
        bits_a: of the input, 1 to 8.
        device, dtype: of the bias, the weight's first values and the outputs of whole numbers.

    Raises:
        BadInput: numbers of bits that cannot be.
    """

    planes: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, bits_w: int = 2, bits_a: int = 4,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        for name, bits in (("bits_w", bits_w), ("bits_a", bits_a)):
            if not 1 <= bits <= MAX_BITS:
                raise BadInput(f"BitPlaneLinear: {name} is {bits}, must be 1 to {MAX_BITS}")
        self.in_features, self.out_features, self.bits_w, self.bits_a = in_features, out_features, bits_w, bits_a
        words = -(-in_features // 32)
        self.register_buffer("planes", torch.zeros((bits_w, out_features, words), dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.ones(out_features, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Values as `nn.Linear` draws them, rounded."""
        if self.planes.is_meta:
            return
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        drawn = torch.empty((self.out_features, self.in_features), device=self.planes.device).uniform_(-bound, bound)
        self.round_(drawn)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def round_(self, weight: Tensor, name: str = "weight") -> None:
        """Take a float weight (out_features, in_features), rounded to the planes."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise BadInput(f"{name} has shape {tuple(weight.shape)}, not {(self.out_features, self.in_features)}")
        check_finite(weight, name)
        planes, scale = quantize_planes(weight, self.bits_w, "bipolar")
        self.planes.copy_(planes)
        self.scale.copy_(scale)

    @classmethod
    def from_float(cls, linear: nn.Linear, *, bits_w: int = 2, bits_a: int = 4, name: str = "weight") -> BitPlaneLinear:
        """The layer that stands for a float one; `name` is its path, for messages."""
        made = cls(
            linear.in_features, linear.out_features, linear.bias is not None, bits_w=bits_w, bits_a=bits_a,
            device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        made.round_(linear.weight.detach(), name)
        if linear.bias is not None:
            with torch.no_grad():
                made.bias.copy_(linear.bias)
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """W^ (out_features, in_features) float32, as the planes have it."""
        return plane_values(self.planes, self.in_features, "bipolar") * self.scale.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the type of the input."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self} takes {self.in_features} features and got an input of shape {tuple(x.shape)}")
        scale = self.scale.float()
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _Product.apply(x, self.planes, scale, self.bias, self.in_features, self.bits_a)
        return torch.ops.laconic.bit_serial_linear(x, self.planes, scale, self.bias, bits=self.bits_a)

    def extra_repr(self) -> str:
        """What was given."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits_w={self.bits_w}, bits_a={self.bits_a}"
        )


CARD = Card(
    id="bitplane",
    title="Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores",
    authors="Ma, Fang, Shao, Wang",
    year=2024,
    source="arXiv 2409.17870",
    family="quant",
    summary="Multiplies numbers of any few bits by counting bits in planes of a signless code without a zero.",
    objects={"BitPlaneLinear": "Layer"},
    traits={"BitPlaneLinear": ("gradient:surrogate", "batch_independent_eval")},
    use="Weights and inputs of one to three bits, where memory bounds the product.",
    avoid="From about eight pairs of planes on, or where zeros of ReLU should stay zeros: multiply in 8 bits.",
    composes=("layer_bits",),
    code="none found",
    claim={
        "text": "A vector times a matrix of 4096 x 4096 takes less than half the time of float32 with 2-bit inputs and "
        "2-bit weights in planes.",
        "metric": "log2 of microseconds a product",
        "direction": "lower",
        "margin": 1.0,
        "arms": ("float32", "w2a2"),
        "seeds": 5,
        "minutes": 1,
        "task": "gemv 4096 x 4096",
    },
)
