"""Scales that are stored in few bits themselves (double quantization): how, as `NestedScales` of a `Scale`.

Instead of scales s (n,), read row by row, there are codes q, the size a of each run of `block` of them, and one offset o
that is taken off before: s^ = o + a T[q]. Two papers have settings of their own for this, and print so in a scheme:

    dynamic8x256            o = mean s; T: 256 levels from -1 to 1 that lie closer near 0 (QLoRA, arXiv 2305.14314)
    linear3x16bfloat16      o = min s; T = 0, 1 / (2^b - 1), ..., 1; here of 3 bits, runs of 16, a in bfloat16
                            (LQ-LoRA, arXiv 2311.12023)

Weights are rounded under s in the first, and under s^ in the second, as the papers' own programs do.

The first in full: scales vary little and are not negative; their mean is taken off, and what is left goes in runs to the
nearest of 256 levels T,

    a_j = max |s - o| of run j         q_i = argmin |T_q - (s_i - o) / a_j|         s^_i = a_j T[q_i] + o

T is the dynamic map of 8-bit optimizers (Dettmers et al., arXiv 2110.02861): per sign, decade by decade towards 0 and
with half as many levels in each, the middles of even steps between 0.1 and 1; and 0 and 1. 64 weights to a scale and
256 scales to a run cost 8 / 64 + 32 / (64 * 256) = 0.127 bits a weight instead of 0.5.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .elements import words_per_row
from .finite import check_finite
from .levels import float32
from .packing import pack, unpack

__all__ = ["SCALE_DTYPES", "Nested", "NestedScales", "dynamic_map", "nest"]

# Types that scales are stored in as numbers.
SCALE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Nested:
    """Scales in 8 bits.

    Attributes:
        codes: (n,) uint8.
        absmax: a (ceil(n / block),) float32.
        offset: o () float32.
        block: scales to a run.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block: int

    def scales(self) -> Tensor:
        """s^ (n,) float32."""
        levels = dynamic_map().to(self.codes.device)[self.codes.int()]
        return levels * self.absmax.repeat_interleave(self.block)[: len(levels)] + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


@dataclass(frozen=True)
class NestedScales:
    """How scales are stored.

    Args:
        levels: "dynamic" or "linear", see above.
        bits: of a code; 8 of dynamic ones.
        block: scales to a run.
        dtype: of a.

    Raises:
        ValueError: no such levels, width, run or type.
    """

    levels: Literal["dynamic", "linear"] = "dynamic"
    bits: int = 8
    block: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.levels not in ("dynamic", "linear"):
            raise ValueError(f"levels of scales are 'dynamic' or 'linear', not {self.levels!r}")
        if not 1 <= self.bits <= 8 or (self.levels == "dynamic" and self.bits != 8):
            raise ValueError(f"{self.levels} scales cannot have {self.bits} bits")
        if self.block < 1 or self.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"runs of {self.block} scales, type {self.dtype!r}: 1 at least, of {', '.join(SCALE_DTYPES)}"
            )
        if self.levels == "dynamic" and self.dtype != "float32":
            raise ValueError("dynamic scales have float32 sizes")

    def tensors(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape of what is stored for so many scales."""
        return {
            "scale_codes": (torch.int32, (1, words_per_row(count, self.bits))),
            "scale_absmax": (SCALE_DTYPES[self.dtype], (math.ceil(count / self.block),)),
            "scale_offset": (torch.float32, ()),
        }

    def nbytes(self, count: int) -> int:
        """Bytes of everything that is stored for so many scales."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors(count).values())

    def encode(self, scale: Tensor, name: str = "tensor") -> dict[str, Tensor]:
        """What is stored, by suffix, for scales of any shape, read in row-major order.

        Raises:
            NotFinite: inf or nan among them.
        """
        if self.levels == "dynamic":
            made = nest(scale, self.block, name=name)
            codes, absmax, offset = made.codes, made.absmax, made.offset
        else:
            codes, absmax, offset = self._linear(scale.detach().float().reshape(-1))
        return {"scale_codes": pack(codes[None], self.bits), "scale_absmax": absmax, "scale_offset": offset}

    def decode(self, stored: Mapping[str, Tensor], count: int) -> Tensor:
        """s^ (count,) float32."""
        codes = unpack(stored["scale_codes"], self.bits, count)[0]
        absmax, offset = stored["scale_absmax"], stored["scale_offset"]
        if self.levels == "dynamic":
            return Nested(codes, absmax, offset, self.block).scales()
        step = absmax.float() / ((1 << self.bits) - 1)
        return codes.float() * step.repeat_interleave(self.block)[:count] + offset

    def _linear(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = (1 << self.bits) - 1
        offset = scale.min() if len(scale) else scale.new_zeros(())
        left = torch.nn.functional.pad(scale - offset, (0, -len(scale) % self.block)).view(-1, self.block)
        absmax = left.amax(1).to(SCALE_DTYPES[self.dtype])
        wide = absmax.float()
        codes = (left * (top / torch.where(wide == 0, 1.0, wide))[:, None]).round().clamp_(0, top)
        return codes.view(-1)[: len(scale)].to(torch.uint8), absmax, offset

    def __str__(self) -> str:
        return f"{self.levels}{self.bits}x{self.block}{'' if self.dtype == 'float32' else self.dtype}"

    @staticmethod
    def parse(text: str) -> NestedScales | None:
        """What printed as `text`; None where nothing prints like this.

        Raises:
            ValueError: no such width, run or type.
        """
        found = _SPELLED.fullmatch(text)
        if found is None:
            return None
        levels: Any = found[1]
        return NestedScales(levels, int(found[2]), int(found[3]), found[4] or "float32")


_SPELLED = re.compile(r"(dynamic|linear)(\d)x(\d+)(\w*)")


def nest(scale: Tensor, block: int = 256, *, grid: int | None = None, name: str = "tensor") -> Nested:
    """Scales in 8 bits.

    Args:
        scale: (...), read in row-major order.
        block: to a run.
        grid: look for the level not of v = (s - o) / a but of what v is in so many even steps from -1 to 1, and give runs of
            which all are o the code 0. With 65535 codes are those of bitsandbytes on a CPU; of a thousand one differs.
        name: the parameter's path, for messages.

    Raises:
        NotFinite: inf or nan among them.
        ValueError: the block is empty.
    """
    if block < 1:
        raise ValueError(f"{name}: nest(block={block}): a run has at least one scale")
    check_finite(scale, name)
    flat = scale.detach().float().reshape(-1)
    offset = flat.mean() if len(flat) else torch.zeros(())
    left = torch.nn.functional.pad(flat - offset, (0, -len(flat) % block)).view(-1, block)
    absmax = left.abs().amax(1) if len(left) else left.new_zeros(0)
    middles, constant = _middles().to(flat.device), (absmax == 0)[:, None]
    if grid is None:
        codes = torch.bucketize(left / torch.where(constant, 1.0, absmax[:, None]), middles)
    else:
        relative = (left * (1 / absmax[:, None])).clamp(-1, 1).nan_to_num(0)
        steps = -1 + 2 * torch.arange(grid + 1, dtype=torch.float32, device=flat.device) / grid
        codes = torch.bucketize(steps, middles)[((relative + 1) * 0.5 * grid + 0.5).long()].where(~constant, 0)
    codes = codes.to(torch.uint8)
    return Nested(codes.view(-1)[: len(flat)].clone(), absmax, offset, block)


@lru_cache(maxsize=8)
def dynamic_map(bits: int = 8, exponents: int = 7, signed: bool = True) -> Tensor:
    """T (2^bits,) float32, rising; not to be written to.

    Args:
        bits: of a code.
        exponents: decades.
        signed: whether half of the levels are negative.

    Raises:
        ValueError: the decades do not fit in the bits.
    """
    if not 1 <= exponents < bits:
        raise ValueError(f"dynamic_map(bits={bits}, exponents={exponents}): one decade at least, and fewer than bits")
    spare = bits - 1 - exponents
    levels = [0.0, 1.0]
    with torch.inference_mode(False):  # kept for later calls
        for decade in range(exponents):
            count = 1 << (decade + spare + (0 if signed else 1))
            levels += _sides(count, 10.0 ** (decade + 1 - exponents), signed)
        if (extra := (1 << spare) - 1) > 0:  # what is left over goes to the topmost decade
            levels += _sides(extra, 1.0, signed)
        levels += [0.0] * ((1 << bits) - len(levels))
        return torch.tensor(sorted(levels), dtype=torch.float32)


def _sides(count: int, top: float, signed: bool) -> list[float]:
    """The middles of `count` even steps between top / 10 and top, on both sides of 0 or on one."""
    # By hand, as torch.linspace has it where multiplying and adding is one step: readers of files have to agree to the bit.
    low, high = float32(0.1), 1.0
    step = float32((high - low) / count)
    edges = [float32(low + step * i if i < (count + 1) // 2 else high - step * (count - i)) for i in range(count + 1)]
    middles = [top * float32(float32(a + b) / 2) for a, b in itertools.pairwise(edges)]
    return middles + ([-m for m in middles] if signed else [])


@lru_cache(maxsize=1)
def _middles() -> Tensor:
    """Between neighbouring levels of the map of 8 bits."""
    with torch.inference_mode(False):
        levels = dynamic_map()
        return (levels[1:] + levels[:-1]) / 2


dynamic_map()  # kept from now on: first used while a model is traced, it would have no values
