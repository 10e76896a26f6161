"""What a stored element is: integers, small floats, named level tables, ternary and binary numbers, codebooks.

An element says which codes there are (unsigned, from 0 to `levels - 1`), what they cost, and how they print in the
string form of a `Scheme`. `Int` goes by an affine map, with or without a zero point (`affine.py`); the codes of all
others index a table, x^ = s T[q] (`codebook.py`): one that is known by the element's name, or, of a `Codebook`, one that
each tensor has for itself, whose entries may be vectors. How codes lie in bytes is said in `packing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, Protocol

import torch

from .floats import FLOATS, MiniFloat, float_values, mini_float
from .levels import TABLES

Rule = Literal["minmax", "percentile", "mse", "hqq", "absmean", "floor", "ct_round", "ceil"]


class _HasBits(Protocol):
    @property
    def bits(self) -> int: ...


class _Dense:
    """Elements whose codes of a whole number of bits lie one after the other."""

    @property
    def levels(self: _HasBits) -> int:
        """Number of codes, 2^b where a table says nothing else."""
        return 1 << self.bits

    def words(self: _HasBits, k: int) -> int:
        """32-bit words of a row of `k` codes, dense."""
        return words_per_row(k, self.bits)


@dataclass(frozen=True)
class Int(_Dense):
    """Integer element of `bits` bits, 2 to 8 (1 bit packs, but has no useful affine scheme)."""

    bits: int

    rules: ClassVar[tuple[Rule, ...]] = ("minmax", "percentile", "mse", "hqq")

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Int(bits={self.bits!r}): integer elements have 2 to 8 bits")

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class Levels(_Dense):
    """A table of levels by its name, `nf4` or `fp4`: x^ = s T[q], T normalized to max |T| = 1; prints as `levelsnf4`."""

    name: str

    rules: ClassVar[tuple[Rule, ...]] = ("minmax", "percentile", "mse")

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise ValueError(f"Levels(name={self.name!r}): one of {', '.join(TABLES)}")

    @property
    def table(self) -> tuple[float, ...]:
        """The level of each code, as float32 holds it."""
        return TABLES[self.name]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.levels - 1).bit_length()

    @property
    def levels(self) -> int:
        """Number of codes."""
        return len(self.table)

    def __str__(self) -> str:
        return f"levels{self.name}"


@dataclass(frozen=True)
class Ternary:
    """-1, 0 or +1 times the scale: x^ = s (q - 1), q in {0, 1, 2}, five to a byte (1.6 bits each)."""

    table: ClassVar[tuple[float, ...]] = (-1.0, 0.0, 1.0)
    bits: ClassVar[float] = 1.6
    levels: ClassVar[int] = 3
    rules: ClassVar[tuple[Rule, ...]] = ("absmean", "minmax", "percentile", "mse")

    def words(self, k: int) -> int:
        """32-bit words of a row of `k` codes, twenty to a word."""
        return -(-k // 20)

    def __str__(self) -> str:
        return "ternary"


@dataclass(frozen=True)
class Binary:
    """-1 or +1 times the scale: x^ = s (2 q - 1), q in {0, 1}; mean |x| is the scale of least squared error."""

    table: ClassVar[tuple[float, ...]] = (-1.0, 1.0)
    bits: ClassVar[int] = 1
    levels: ClassVar[int] = 2
    rules: ClassVar[tuple[Rule, ...]] = ("absmean",)

    def words(self, k: int) -> int:
        """32-bit words of a row of `k` codes, dense."""
        return words_per_row(k, 1)

    def __str__(self) -> str:
        return "binary"


@dataclass(frozen=True)
class Float(_Dense):
    """A float of a few bits by its name in `floats.py`: x^ = s f, the codes are bit patterns; prints as `floate2m1`."""

    name: str

    rules: ClassVar[tuple[Rule, ...]] = ("minmax", "floor", "ct_round", "ceil")

    def __post_init__(self) -> None:
        mini_float(self.name)

    @property
    def numbers(self) -> MiniFloat:
        """The float."""
        return mini_float(self.name)

    @property
    def table(self) -> tuple[float, ...]:
        """The number of each bit pattern; some have nan or infinity, which rounding never gives."""
        return _patterns(self.name)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.numbers.bits

    def __str__(self) -> str:
        return f"float{self.name}"


@cache
def _patterns(name: str) -> tuple[float, ...]:
    numbers = mini_float(name)
    return tuple(float_values(torch.arange(1 << numbers.bits, dtype=torch.uint8), numbers).tolist())


@dataclass(frozen=True)
class Codebook:
    """Runs of `dim` numbers of a row by codes of `width` bits into a table C that is stored with the tensor.

    x^ = s C[q], C (2^width, dim). Rows are whole runs. It costs width / dim bits a number, and its table; prints as
    `codebook4`, or with runs of 2 as `codebook8x2`.
    """

    width: int
    dim: int = 1

    rules: ClassVar[tuple[Rule, ...]] = ("minmax", "absmean")

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or not 1 <= self.width <= 8:
            raise ValueError(f"Codebook(width={self.width!r}): codes have 1 to 8 bits")
        if not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(f"Codebook(dim={self.dim!r}): a run has at least one number")

    @property
    def bits(self) -> float:
        """Bits of codes for each number."""
        return self.width if self.dim == 1 else self.width / self.dim

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.width

    def words(self, k: int) -> int:
        """32-bit words of a row of `k` numbers, dense."""
        return words_per_row(-(-k // self.dim), self.width)

    def __str__(self) -> str:
        return f"codebook{self.width}" + (f"x{self.dim}" if self.dim > 1 else "")


Element = Int | Levels | Ternary | Binary | Float | Codebook
Coded = Levels | Ternary | Binary | Float  # the elements whose codes index a table that all tensors share


def words_per_row(k: int, bits: int) -> int:
    """32-bit words that hold `k` codes of `bits` bits, dense."""
    return -(-k * bits // 32)


def parse_element(text: str) -> Element:
    """The element that printed as `text`.

    Raises:
        ValueError: no element prints like this.
    """
    if text == "ternary":
        return Ternary()
    if text == "binary":
        return Binary()
    if text.startswith("levels"):
        return Levels(text.removeprefix("levels"))
    if text.startswith("int") and text[3:].isdigit():
        return Int(int(text[3:]))
    if text.startswith("float"):
        return Float(text.removeprefix("float"))
    width, _, dim = text.removeprefix("codebook").partition("x")
    if text.startswith("codebook") and width.isdigit() and (dim or "1").isdigit():
        return Codebook(int(width), int(dim or 1))
    named = ", ".join([*(f"levels{name}" for name in TABLES), *(f"float{name}" for name in FLOATS)])
    raise ValueError(
        f"element {text!r} is not known (int2 to int8, {named}, ternary, binary, codebook4, codebook8x2 and the like)"
    )
