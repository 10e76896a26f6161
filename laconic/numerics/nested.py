"""Scales that are stored in 8 bits themselves (double quantization, QLoRA, arXiv 2305.14314).

Scales s (n,) vary little and are not negative: their mean o is taken off, and what is left goes in runs of `block` to
the nearest of 256 levels T,

    a_j = max |s - o| of run j         q_i = argmin |T_q - (s_i - o) / a_j|         s^_i = a_j T[q_i] + o

T is the dynamic map of 8-bit optimizers (Dettmers et al., arXiv 2110.02861): per sign, decade by decade towards 0 and
with half as many levels in each, the middles of even steps between 0.1 and 1; and 0 and 1. 64 weights to a scale and
256 scales to a run cost 8 / 64 + 32 / (64 * 256) = 0.127 bits a weight instead of 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .finite import check_finite

__all__ = ["Nested", "dynamic_map", "nest"]


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


def nest(scale: Tensor, block: int = 256, *, name: str = "tensor") -> Nested:
    """Scales in 8 bits.

    Args:
        scale: (...), read in row-major order.
        block: to a run.
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
    relative = left / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes = torch.bucketize(relative, _middles().to(flat.device)).to(torch.uint8)
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
    edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
    middles = [top * float(m) for m in (edges[:-1] + edges[1:]) / 2]
    return middles + ([-m for m in middles] if signed else [])


@lru_cache(maxsize=1)
def _middles() -> Tensor:
    """Between neighbouring levels of the map of 8 bits."""
    with torch.inference_mode(False):
        levels = dynamic_map()
        return (levels[1:] + levels[:-1]) / 2
