"""What a stored element is: integers, named level tables, ternary and binary numbers.

An element says which codes there are (unsigned, from 0 to `levels - 1`), what they cost, and how they print in the
string form of a `Scheme`. `Int` goes by an affine map, with or without a zero point (`affine.py`); the codes of all
others index a short table, x^ = s T[q] (`codebook.py`). How codes lie in bytes is said in `packing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .levels import TABLES

Rule = Literal["minmax", "percentile", "mse", "absmean"]


@dataclass(frozen=True)
class Int:
    """Integer element of `bits` bits, 2 to 8 (1 bit packs, but has no useful affine scheme)."""

    bits: int

    rules: ClassVar[tuple[Rule, ...]] = ("minmax", "percentile", "mse")

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Int(bits={self.bits!r}): integer elements have 2 to 8 bits")

    @property
    def levels(self) -> int:
        """Number of codes, 2^b."""
        return 1 << self.bits

    def words(self, k: int) -> int:
        """32-bit words of a row of `k` codes, dense."""
        return words_per_row(k, self.bits)

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class Levels:
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

    def words(self, k: int) -> int:
        """32-bit words of a row of `k` codes, dense."""
        return words_per_row(k, self.bits)

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


Element = Int | Levels | Ternary | Binary
Coded = Levels | Ternary | Binary  # the elements whose codes index a table


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
    named = ", ".join(f"levels{name}" for name in TABLES)
    raise ValueError(f"element {text!r} is not known (int2 to int8, {named}, ternary, binary)")
