"""Floats of a few bits: rounding to them, their bit patterns, and back.

A number with e exponent and m mantissa bits and bias b = 2^(e-1) - 1 is, by its exponent field E and mantissa field M,

    (-1)^s 2^(E - b) (1 + M / 2^m)    E > 0            (-1)^s 2^(1 - b) M / 2^m    E = 0 (subnormal)

    name    bits   largest     what the highest codes are
    e2m1    4      6           numbers (OCP Microscaling Formats 1.0)
    e2m3    6      7.5         numbers
    e3m2    6      28          numbers
    e4m3    8      448         nan for E = 15, M = 7, no infinity (the "fn" of torch.float8_e4m3fn)
    e5m2    8      57344       infinity and nan, as IEEE 754 has them
    int8    8      127 / 64    whole numbers over 64, in two's complement; -128 is never given

Rounding is to the nearest, ties to even (`even`) or away from zero (`away`), or towards zero (`zero`), and saturates.
Everything is worked out in float64, where each step is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["FLOATS", "MiniFloat", "Round", "float_codes", "float_values", "mini_float", "round_float"]

Round = Literal["even", "away", "zero"]


@dataclass(frozen=True)
class MiniFloat:
    """A float of a few bits.

    Attributes:
        name: as in the table above.
        exponent: e; 0 for evenly spaced numbers.
        mantissa: m; of evenly spaced numbers the bits behind the point.
        largest: the largest finite number.
    """

    name: str
    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.exponent == 0 else 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """b."""
        return (1 << (self.exponent - 1)) - 1 if self.exponent else 0

    @property
    def emax(self) -> int:
        """Exponent of the largest number's power of two."""
        return int(torch.frexp(torch.tensor(self.largest, dtype=torch.float64)).exponent) - 1

    @property
    def emin(self) -> int:
        """Exponent of the least normal number, 0 of evenly spaced numbers."""
        return 1 - self.bias if self.exponent else 0


FLOATS: dict[str, MiniFloat] = {
    one.name: one
    for one in (
        MiniFloat("e2m1", 2, 1, 6.0),
        MiniFloat("e2m3", 2, 3, 7.5),
        MiniFloat("e3m2", 3, 2, 28.0),
        MiniFloat("e4m3", 4, 3, 448.0),
        MiniFloat("e5m2", 5, 2, 57344.0),
        MiniFloat("int8", 0, 6, 127 / 64),
    )
}


def mini_float(name: str) -> MiniFloat:
    """The float of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FLOATS:
        raise ValueError(f"float {name!r} is not known: one of {', '.join(FLOATS)}")
    return FLOATS[name]


def round_float(
    x: Tensor, element: MiniFloat, rounding: Round = "even", *, saturate: bool = True, subnormals: bool = True
) -> Tensor:
    """The numbers of `element` that x rounds to, in the type of x; nan stays.

    Args:
        x: any shape; float16 and bfloat16 hold the results only where these fit.
        element: what to round to.
        rounding: `even`, `away` or `zero`.
        saturate: what is too large becomes the largest number, else infinity.
        subnormals: whether there are numbers below the least normal one; without them what lies below becomes 0.
    """
    wide = x.double()
    if not subnormals and element.exponent:
        wide = torch.where(wide.abs() < 2.0**element.emin, 0.0, wide)
    exponent = torch.frexp(wide).exponent - 1
    exponent = exponent.clamp(min=element.emin) if element.exponent else torch.zeros_like(exponent)
    steps = torch.ldexp(wide, element.mantissa - exponent)
    if rounding == "even":
        whole = steps.round()
    elif rounding in ("away", "zero"):
        whole = steps.sign() * torch.floor(steps.abs() + (0.5 if rounding == "away" else 0.0))
    else:
        raise ValueError(f"round_float: rounding={rounding!r}: one of even, away, zero")
    y = torch.ldexp(whole, exponent - element.mantissa)
    # ldexp takes exponents of inf and nan for any: what is not finite is decided apart.
    above = wide.isinf() | (y.abs() > element.largest)
    y = torch.where(above, wide.sign() * (element.largest if saturate else torch.inf), y)
    return torch.where(wide.isnan(), wide, y).to(x.dtype)


def float_codes(values: Tensor, element: MiniFloat) -> Tensor:
    """Bit patterns uint8 of numbers of `element`.

    Raises:
        ValueError: a value is none of its numbers.
    """
    wide = values.double()
    if not bool((round_float(wide, element) == wide).all()):
        raise ValueError(f"float_codes: a value is no number of {element.name}: round it first")
    if element.exponent == 0:
        return torch.ldexp(wide, torch.tensor(element.mantissa)).to(torch.int8).view(torch.uint8)
    size = wide.abs()
    exponent = (torch.frexp(size).exponent - 1).clamp(min=element.emin)
    # Subnormal numbers have steps below 2^m and the field 0; the hidden bit of the others raises the field by one.
    steps = torch.ldexp(size, element.mantissa - exponent).to(torch.int32)
    field = (exponent - element.emin) * (1 << element.mantissa)
    code = torch.where(size == 0, 0, field + steps)
    return (code + (torch.signbit(wide).int() << (element.bits - 1))).to(torch.uint8)


def float_values(codes: Tensor, element: MiniFloat) -> Tensor:
    """The numbers float32 of bit patterns uint8; nan and infinity where the element has them."""
    if element.exponent == 0:
        return codes.view(torch.int8).float() / (1 << element.mantissa)
    wide = codes.int()
    size = wide & ((1 << (element.bits - 1)) - 1)
    field, rest = size >> element.mantissa, size & ((1 << element.mantissa) - 1)
    steps = (rest + torch.where(field > 0, 1 << element.mantissa, 0)).double()
    value = torch.ldexp(steps, field.clamp(min=1) - element.bias - element.mantissa)
    if element.name == "e4m3":
        value = torch.where(size == 0x7F, torch.nan, value)
    elif element.name == "e5m2":
        value = torch.where(size == 0x7C, torch.inf, value)
        value = torch.where(size > 0x7C, torch.nan, value)
    return torch.where(wide >> (element.bits - 1) > 0, -value, value).float()
