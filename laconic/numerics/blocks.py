"""Blocks of small floats under shared scales: MX, NVFP4 and FP8, as values (`BlockScheme`) and functions on matrices.

Each run of `block` elements of a row has a scale X, and x^ = X f, f a number of the element (`floats.py`):

    scale     X of a block with a = max |x|, and what is stored
    e8m0      2^E, one byte E + 127: E = floor(log2 a) - emax (rule `floor`, OCP MX 1.0: a of more than largest / 2^emax
              of its power of two saturates); the same after a is rounded up by half a step of the element's mantissa
              (`ct_round`, compressed-tensors: 1.75 for e2m1); the least E under which nothing saturates (`ceil`)
    e4m3      s / g, with g = 448 largest / max |tensor| once for the matrix and s = e4m3(g a / largest), one byte, 1/8
              where that would be 0 (NVFP4); g is stored, as compressed-tensors does: others store 1 / g
    float32   a / largest (FP8), by row or block or for the matrix; 1 where a = 0

f = round(x / X), saturated. E lies in -127 .. 127; a block of zeros has E = -127.

A `BlockScheme` stands beside `Scheme`: its codes are floats, and its scales may be of two levels. It prints and parses:

    >>> str(MXFP4), str(NVFP4)
    ('b1/e2m1/block32/e8m0/floor/even', 'b1/e2m1/block16/e4m3/amax/even')
    >>> BlockScheme.parse(str(MXFP4)) == MXFP4
    True
    >>> NVFP4.bits_per_weight(rows=64, k=4096)
    4.5001220703125
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .affine import ScaleOutOfRange
from .elements import words_per_row
from .finite import check_finite
from .floats import MiniFloat, Round, float_codes, float_values, mini_float, round_float
from .packing import pack, unpack

__all__ = [
    "FP8_E4M3", "FP8_E5M2", "MXFP4", "MXFP6_E2M3", "MXFP6_E3M2", "MXFP8_E4M3", "MXFP8_E5M2", "MXINT8", "NVFP4",
    "BlockScheme", "Blocks", "quantize_blocks",
]  # fmt: skip

VERSION = "b1"
SCALE_TOP = 448.0  # the largest e4m3
NO_SCALE = 0.125  # what an e4m3 scale of 0 becomes

Scales = Literal["e8m0", "e4m3", "float32"]
ScaleRule = Literal["floor", "ct_round", "ceil", "amax"]
RULES: dict[str, tuple[str, ...]] = {"e8m0": ("floor", "ct_round", "ceil"), "e4m3": ("amax",), "float32": ("amax",)}


@dataclass(frozen=True)
class BlockScheme:
    """How a matrix is stored in blocks of small floats. Frozen, hashable, and equal to `parse(str(scheme))`.

    Args:
        element: name of the float, see `floats.py`.
        block: elements of a row that share a scale; None: a row does; 0: the matrix does (float32 scales only).
        scale: e8m0, e4m3 or float32.
        rule: how e8m0 scales are chosen: floor, ct_round or ceil; amax for the others.
        rounding: of elements: even, away or zero.
    """

    element: str = "e2m1"
    block: int | None = 32
    scale: Scales = "e8m0"
    rule: ScaleRule = "floor"
    rounding: Round = "even"

    def __post_init__(self) -> None:
        mini_float(self.element)
        if self.scale not in RULES:
            raise ValueError(f"BlockScheme(scale={self.scale!r}): one of {', '.join(RULES)}")
        if self.rule not in RULES[self.scale]:
            raise ValueError(f"BlockScheme(rule={self.rule!r}): {self.scale} goes by {' or '.join(RULES[self.scale])}")
        if self.block is not None and (self.block < 0 or (self.block == 0 and self.scale != "float32")):
            raise ValueError(f"BlockScheme(block={self.block}): a block has at least one element")
        if self.rounding not in ("even", "away", "zero"):
            raise ValueError(f"BlockScheme(rounding={self.rounding!r}): one of even, away, zero")

    @property
    def numbers(self) -> MiniFloat:
        """The element."""
        return mini_float(self.element)

    def with_(self, **changes: object) -> BlockScheme:
        """A copy with fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def block_of(self, k: int) -> int:
        """Elements that share a scale in a row of k."""
        return max(1, k if not self.block else min(self.block, k))

    def blocks(self, k: int) -> int:
        """Scales to a row of k elements, at least one."""
        return max(1, -(-k // self.block_of(k)))

    def __str__(self) -> str:
        share = "row" if self.block is None else f"block{self.block}" if self.block else "tensor"
        return "/".join([VERSION, self.element, share, self.scale, self.rule, self.rounding])

    @staticmethod
    def parse(text: str) -> BlockScheme:
        """The scheme that printed as `text`.

        Raises:
            ValueError: none prints like this.
        """
        parts = text.split("/")
        if len(parts) != 6 or parts[0] != VERSION:
            raise ValueError(f"scheme {text!r}: expected {VERSION} and 5 parts more, separated by '/'")
        share = parts[2]
        number = share.removeprefix("block")
        if share not in ("row", "tensor") and (number == share or not number.isdigit()):
            raise ValueError(f"scheme {text!r}: {share!r} is none of row, tensor, and block with its length")
        block = None if share == "row" else 0 if share == "tensor" else int(number)
        scheme = BlockScheme(parts[1], block, parts[3], parts[4], parts[5])  # type: ignore[arg-type]
        if str(scheme) != text:
            raise ValueError(f"scheme {text!r}: spelled {str(scheme)!r}")
        return scheme

    def tensors(self, rows: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of what is stored for a (rows, k) matrix."""
        shape = (1, 1) if self.block == 0 else (rows, self.blocks(k))
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.int32, (rows, words_per_row(k, self.numbers.bits))),
            "scale": (torch.float32 if self.scale == "float32" else torch.uint8, shape),
        }
        if self.scale == "e4m3":
            stored["global_scale"] = (torch.float32, (1,))
        return stored

    def nbytes(self, rows: int, k: int) -> int:
        """Bytes of everything that is stored for a (rows, k) matrix."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.tensors(rows, k).values())

    def bits_per_weight(self, rows: int, k: int) -> float:
        """Stored bits per element, scales included."""
        return 8 * self.nbytes(rows, k) / max(1, rows * k)


MXFP4 = BlockScheme()
MXFP6_E2M3 = BlockScheme("e2m3")
MXFP6_E3M2 = BlockScheme("e3m2")
MXFP8_E4M3 = BlockScheme("e4m3")
MXFP8_E5M2 = BlockScheme("e5m2")
MXINT8 = BlockScheme("int8")
NVFP4 = BlockScheme("e2m1", 16, "e4m3", "amax")
FP8_E4M3 = BlockScheme("e4m3", None, "float32", "amax")
FP8_E5M2 = BlockScheme("e5m2", None, "float32", "amax")


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        scheme: how it is stored.
        codes: (rows, k) uint8, the floats' bit patterns.
        scale: X (rows, G) float32 without g, or (1, 1); powers of two, numbers of e4m3, or any.
        global_scale: g (1,) float32 with e4m3 scales, else None.
    """

    scheme: BlockScheme
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None = None

    def values(self) -> Tensor:
        """f (rows, k) float32."""
        return float_values(self.codes, self.scheme.numbers)

    def dequantize(self) -> Tensor:
        """x^ = X f (rows, k) float32, rounded once."""
        rows, k = self.codes.shape
        x = self.values().double() * _spread(self.scale.double(), self.scheme, rows, k)
        return (x if self.global_scale is None else x / self.global_scale.double()).float()

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, as `BlockScheme.tensors` says: dense codes, and scales as their bytes."""
        stored = {"packed": pack(self.codes, self.scheme.numbers.bits), "scale": self.scale}
        if self.scheme.scale == "e8m0":
            stored["scale"] = (torch.frexp(self.scale.double()).exponent - 1 + 127).to(torch.uint8)
        elif self.scheme.scale == "e4m3":
            stored["scale"] = float_codes(self.scale, mini_float("e4m3"))
        if self.global_scale is not None:
            stored["global_scale"] = self.global_scale
        return stored

    @staticmethod
    def of_tensors(stored: dict[str, Tensor], scheme: BlockScheme, k: int) -> Blocks:
        """The matrix of what is stored: the inverse of `tensors`.

        Raises:
            ValueError: shapes or types do not belong to `k` columns of this scheme, or a scale is nan.
        """
        rows = stored["packed"].shape[0]
        for name, (dtype, shape) in scheme.tensors(rows, k).items():
            if name not in stored or stored[name].dtype != dtype or tuple(stored[name].shape) != shape:
                found = (stored[name].dtype, tuple(stored[name].shape)) if name in stored else "nothing"
                raise ValueError(f"{name}: {scheme} stores {dtype} of shape {shape}, got {found}")
        scale = stored["scale"]
        if scheme.scale == "e8m0":
            if bool((scale == 255).any()):
                raise ValueError(f"scale: a byte of 255 stands for nan in {scheme}")
            scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float64), scale.int() - 127).float()
        elif scheme.scale == "e4m3":
            scale = float_values(scale, mini_float("e4m3"))
        return Blocks(scheme, unpack(stored["packed"], scheme.numbers.bits, k), scale, stored.get("global_scale"))


def quantize_blocks(
    x: Tensor, scheme: BlockScheme, *, largest: float | None = None, scale_bits: int = 8, subnormals: bool = True,
    flush: bool = False, name: str = "tensor",
) -> Blocks:  # fmt: skip
    """A matrix in blocks, each rounded under its own scale.

    Args:
        x: (rows, k) floating; the last block of a row may be short.
        scheme: how.
        largest: max |x| over what shares g, with e4m3 scales: that of x by default (q, k and v fused share one).
        scale_bits: of e8m0 scales: E lies in -(2^(bits - 1) - 1) .. 2^(bits - 1) - 1.
        subnormals: whether elements below the least normal number are kept; else they become 0.
        flush: whether blocks of numbers that float32 holds as subnormal ones alone become 0.
        name: the parameter's path, for messages.

    Raises:
        NotFinite: inf or nan in x.
        ScaleOutOfRange: a power of two is above what the scale holds.
        ValueError: x is no matrix.
    """
    if x.ndim != 2:
        raise ValueError(f"{name}: blocks are runs of a matrix's rows, got shape {tuple(x.shape)}")
    check_finite(x, name)
    rows, k = x.shape
    wide = x.detach().double()
    amax = _amax(wide, scheme)
    if flush:
        kept = amax >= torch.finfo(torch.float32).tiny
        wide = wide * _spread(kept.double(), scheme, rows, k)
    element, shared = scheme.numbers, None
    if scheme.scale == "e8m0":
        top = (1 << (scale_bits - 1)) - 1
        exponent = _exponents(amax, element, scheme.rule)
        if amax.numel() and int(exponent.max()) > top:
            raise ScaleOutOfRange(
                f"{name}: a block's scale 2^{int(exponent.max())} is above 2^{top}, which is the most"
            )
        scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(min=-top)).float()
    elif scheme.scale == "e4m3":
        # In float32, as what reads such files does: a scale that lies on a tie must fall the same way.
        most = (
            torch.tensor(float(wide.abs().max()) if wide.numel() else 0.0) if largest is None else torch.tensor(largest)
        )
        shared = torch.where(most > 0, SCALE_TOP * element.largest / most.float(), 1.0).view(1)
        if not bool(torch.isfinite(shared)):
            raise ScaleOutOfRange(f"{name}: its largest magnitude {float(most):.3g} is too small for a global scale")
        scale = round_float(shared * (amax.float() / element.largest), mini_float("e4m3"))
        scale = torch.where(scale == 0, NO_SCALE, scale)
    else:
        scale = torch.where(amax > 0, amax / element.largest, 1.0).float()
        if not bool((scale > 0).all()):
            raise ScaleOutOfRange(f"{name}: a scale is below what float32 holds")
    spread = _spread(scale.double(), scheme, rows, k)
    if shared is not None:
        spread = (spread.float() / shared).double()
    values = round_float(wide / spread, element, scheme.rounding, subnormals=subnormals)
    return Blocks(scheme, float_codes(values, element), scale, shared)


def _exponents(amax: Tensor, element: MiniFloat, rule: str) -> Tensor:
    """E (rows, G) int32 of largest magnitudes in float64."""
    if rule == "ct_round":
        power = torch.ldexp(torch.ones_like(amax), torch.frexp(amax).exponent - 1)
        amax = amax + power * 2.0 ** -(element.mantissa + 1)
    mantissa, exponent = torch.frexp(amax if rule != "ceil" else amax / element.largest)
    # Up to the next power of two, or to itself where it is one; else down.
    found = exponent - (mantissa == 0.5).int() if rule == "ceil" else exponent - 1 - element.emax
    return torch.where(amax == 0, -127, found)


def _amax(x: Tensor, scheme: BlockScheme) -> Tensor:
    """max |x| (rows, G) of each block, or (1, 1)."""
    rows, k = x.shape
    if scheme.block == 0:
        return x.abs().max().view(1, 1) if x.numel() else x.new_zeros(1, 1)
    block, count = scheme.block_of(k), scheme.blocks(k)
    padded = torch.nn.functional.pad(x.abs(), (0, block * count - k))
    return padded.view(rows, count, block).amax(-1) if rows else x.new_zeros(0, count)


def _spread(scale: Tensor, scheme: BlockScheme, rows: int, k: int) -> Tensor:
    """Scales (rows, k) of the elements."""
    if scheme.block == 0:
        return scale.expand(rows, k)
    return scale.repeat_interleave(scheme.block_of(k), dim=1)[:, :k]
