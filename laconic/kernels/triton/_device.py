"""What the kernels share: reading codes, scales and zero points of packed rows, and the end of a product.

A row of packed codes is read by *units*, the smallest runs of codes that begin on a byte (`Format.per_unit` codes each):

    dense, 1, 2, 4 or 8 bits    a 32-bit word of 32 / b codes:   q_p = (word >> b p) & (2^b - 1)
    dense, 3, 5, 6 or 7 bits    b bytes of 8 codes:              q_p from one or two bytes, at b p bits
    base 3                      a byte of 5 codes:               q_p = (((byte 3^p) mod 256) 3) >> 8

A product with few rows sums over units, and unrolled over p: no word is read twice, and no code has to change its
place, for what is permuted is the order in which the activations are read. `_natural_code` reads codes by their number
instead, many of them from one word: that is what tiles for tensor cores are made of.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.numerics import Binary, Float, Int, Levels, Scheme, Ternary

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NO_GROUP = 0  # as GROUP: one scale for the whole row


@dataclass(frozen=True)
class Format:
    """How a kernel reads a scheme's codes; every field is a compile-time constant of the kernels.

    Attributes:
        kind: "int", "levels", "ternary" or "binary".
        bits: of a code in the dense layout; 0 in base 3.
        per_unit: codes of a unit.
        group: codes that share a scale, `NO_GROUP` if all of a row do.
        per_row: whether each row has scales of its own.
        zero: "none", "int" or "real".
    """

    kind: str
    bits: int
    per_unit: int
    group: int
    per_row: bool
    zero: str

    @property
    def by_words(self) -> bool:
        """Whether a unit is a 32-bit word."""
        return self.bits > 0 and 32 % self.bits == 0

    def units(self, k: int) -> int:
        """Units of a row of `k` codes."""
        return -(-k // self.per_unit)

    def constants(self) -> dict[str, object]:
        """The constants by the names that the kernels give them."""
        return {
            "KIND": self.kind,
            "BITS": self.bits,
            "PER_UNIT": self.per_unit,
            "GROUP": self.group,
            "PER_ROW": self.per_row,
            "ZERO": self.zero,
        }


def format_of(scheme: Scheme, k: int, per_row: bool) -> Format:
    """How the kernels read rows of `k` codes of this scheme.

    Raises:
        ValueError: the element is one that they do not know.
    """
    group = scheme.scale.group_of(k) if scheme.scale.granularity == "group" else NO_GROUP
    group = NO_GROUP if group >= k else group
    element = scheme.element
    if isinstance(element, Ternary):
        return Format("ternary", 0, 5, group, per_row, "none")
    kinds = {Int: "int", Levels: "levels", Float: "levels", Binary: "binary"}
    if type(element) not in kinds:
        raise ValueError(f"{scheme}: there is no Triton kernel for elements like {element}")
    bits = element.bits
    return Format(kinds[type(element)], bits, 32 // bits if 32 % bits == 0 else 8, group, per_row, scheme.zero)


def table_of(scheme: Scheme, device: torch.device) -> Tensor | None:
    """The levels of a `Levels` or `Float` element, float32, on the device; None for other elements."""
    return _table(scheme.element.table, device) if isinstance(scheme.element, Levels | Float) else None


@functools.lru_cache(maxsize=64)
def _table(table: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls
        return torch.tensor(table, dtype=torch.float32, device=device)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; of the interpreter's, a few, so that it splits sums as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# --- codes and what they stand for ----------------------------------------------------------------------------------


@triton.jit
def _load_unit(codes, at, unit, mask, KIND: tl.constexpr, BITS: tl.constexpr):
    """What all codes of a unit are cut from; nothing where they are read byte by byte."""
    if KIND == "ternary":
        return tl.load(codes + at + unit, mask=mask, other=0).to(tl.int32)
    elif 32 % BITS == 0:
        return tl.load(codes + at + unit, mask=mask, other=0).to(tl.uint32, bitcast=True)
    else:
        return unit


@triton.jit
def _unit_code(codes, at, unit, held, mask, row_bytes, P: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr):
    """Code number P of each unit, int32; `held` is what `_load_unit` gave."""
    if KIND == "ternary":
        power: tl.constexpr = 3**P
        return (((held * power) & 255) * 3) >> 8
    elif 32 % BITS == 0:
        return ((held >> (P * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
    else:
        shift: tl.constexpr = (P * BITS) % 8
        # The last unit of a row may reach beyond the row's words: what is there belongs to others, or to no one.
        byte = unit * BITS + (P * BITS) // 8
        q = tl.load(codes + at + byte, mask=mask & (byte < row_bytes), other=0).to(tl.int32) >> shift
        if shift + BITS > 8:
            high = tl.load(codes + at + byte + 1, mask=mask & (byte + 1 < row_bytes), other=0).to(tl.int32)
            q = q | (high << (8 - shift))
        return q & ((1 << BITS) - 1)


@triton.jit
def _natural_code(codes, at, k, mask, KIND: tl.constexpr, BITS: tl.constexpr):
    """Code number k of each row, int32: `codes` points to words where units are words, and else to bytes."""
    if KIND == "ternary":
        held = tl.load(codes + at + k // 5, mask=mask, other=0).to(tl.int32)
        digit = k % 5
        power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
        return (((held * power) & 255) * 3) >> 8
    elif 32 % BITS == 0:
        bit = k * BITS
        held = tl.load(codes + at + (bit >> 5), mask=mask, other=0)
        return (held >> (bit & 31)) & ((1 << BITS) - 1)  # the sign that moves in from above is masked off
    else:
        bit = k * BITS
        shift = bit & 7
        byte = at + (bit >> 3)
        q = tl.load(codes + byte, mask=mask, other=0).to(tl.int32) >> shift
        high = tl.load(codes + byte + 1, mask=mask & (shift + BITS > 8), other=0).to(tl.int32)
        q = q | (high << (8 - shift))
        return q & ((1 << BITS) - 1)


@triton.jit
def _scale_and_zero(
    scale, zero, row, group, groups, mask, BITS: tl.constexpr, ZERO: tl.constexpr, PER_ROW: tl.constexpr
):  # fmt: skip
    """Scale and zero point, float32, of rows and groups that broadcast; the zero point of a symmetric scheme is 2^(b-1).

    Integer zero points are packed along the rows: bit b r of column g, in words of stride G.
    """
    if not PER_ROW:
        row = row * 0
    s = tl.load(scale + row * groups + group, mask=mask, other=0.0).to(tl.float32)
    if ZERO == "int":
        bit = row * BITS
        shift = (bit & 31).to(tl.uint32)
        at = (bit >> 5) * groups + group
        q = tl.load(zero + at, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
        if 32 % BITS != 0:
            high = tl.load(zero + at + groups, mask=mask & (shift + BITS > 32), other=0).to(tl.uint32, bitcast=True)
            q = q | ((high << 1) << (31 - shift))  # in two steps: a shift by 32 has no defined result
        z = (q & ((1 << BITS) - 1)).to(tl.float32)
    elif ZERO == "real":
        z = tl.load(zero + row * groups + group, mask=mask, other=0.0).to(tl.float32)
    else:
        z = tl.full(s.shape, (1 << BITS) // 2, tl.float32)
    return s, z


@triton.jit
def _value(q, s, z, table, mask, KIND: tl.constexpr):
    """w = s (q - z), or s T[q], float32: the reference's own two operations, so its very bits."""
    if KIND == "int":
        return (q.to(tl.float32) - z) * s
    elif KIND == "levels":
        return tl.load(table + q, mask=mask, other=0.0) * s
    elif KIND == "ternary":
        return (q - 1).to(tl.float32) * s
    else:
        return (2 * q - 1).to(tl.float32) * s


# --- the end of a product -------------------------------------------------------------------------------------------


@triton.jit
def _activate(y, ACT: tl.constexpr):
    """act(y) in float32."""
    if ACT == "relu":
        return tl.where(y < 0, 0.0, y)  # nan stays nan
    elif ACT == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        return 0.5 * y * (2.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))  # tanh u = 1 - 2 / (exp 2u + 1)
    elif ACT == "silu":
        return y / (1.0 + tl.exp(-y))
    else:
        return y


@triton.jit
def _epilogue(y, bias, bias_at, residual, at, mask, ACT: tl.constexpr):
    """act(y + bias) + residual in float32, rounded once by whoever stores it."""
    if bias is not None:
        y += tl.load(bias + bias_at, mask=mask, other=0.0).to(tl.float32)
    y = _activate(y, ACT)
    if residual is not None:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _round(v):
    """Nearest integer, ties to even, of |v| < 2^22: beyond 2^23 a float has no fraction left.

    A caller must not make v by a multiplication that could be fused with this addition.
    """
    return (v + 12582912.0) - 12582912.0
