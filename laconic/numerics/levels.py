"""Tables of levels, by name: what each code of a `Levels` element stands for, normalized to largest size 1.

- `nf4`, NormalFloat (Dettmers et al., QLoRA, arXiv 2305.14314): quantiles of a normal distribution, half of them for
  each side of an exact 0, code 7. With Q its quantile function and d = 0.9677083 (the mean of 1 - 1/30 and 1 - 1/32),
  the levels are -Q(p) for 8 numbers p from d to 1/2 and Q(p) for 9 numbers p from 1/2 to d, evenly spaced, over Q(d).
- `nf2`, `nf3` and `nf8`, the same of b bits: 2^(b-1) numbers on the negative side, 2^(b-1) + 1 on the other.
- `fp4`, the float with one sign, two exponent and one mantissa bit (e2m1, OCP Microscaling Formats 1.0): 0, 1/2, 1,
  3/2, 2, 3, 4 and 6, over 6. The code is the float's own bit pattern, so 8 is -0, which rounding never gives.

- `fp4_bnb`, what bitsandbytes calls FP4: as `fp4`, but the codes of the sizes are in another order and the smallest
  size is 1/192 in place of 1/12.

The values are those of float32: every reader of a file must multiply by the same ones.
"""

from __future__ import annotations

import struct
from statistics import NormalDist

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def float32(x: float) -> float:
    """The float32 nearest to x."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


OFFSET = 0.9677083  # d


def normal_float(bits: int, offset: float = OFFSET, *, extra: bool = True) -> tuple[float, ...]:
    """The levels of NormalFloat, rising, as float32 holds them: 2^b of them, or 2^b - 1 that are the same on both sides.

    Args:
        bits: b.
        offset: d.
        extra: one more number on the positive side.

    Raises:
        ValueError: less than 2 bits, or more than 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"NormalFloat has 2 to 8 bits, not {bits}")
    quantile, half = NormalDist().inv_cdf, 1 << (bits - 1)
    counts = {-1: half - 1, 1: half if extra else half - 1}
    sides = {sign: [quantile(offset - i * (offset - 0.5) / n) for i in range(n)] for sign, n in counts.items()}
    levels = (*(-x for x in sides[-1]), 0.0, *reversed(sides[1]))
    return tuple(float32(x / quantile(offset)) for x in levels)


TABLES: dict[str, tuple[float, ...]] = {
    "nf2": normal_float(2),
    "nf3": normal_float(3),
    "nf8": normal_float(8),
    "nf4": _NF4,
    "fp4": tuple(float32(sign * x / 6) for sign in (1, -1) for x in _E2M1),
    "fp4_bnb": tuple(float32(sign * x / 12) for sign in (1, -1) for x in _BNB),
}
