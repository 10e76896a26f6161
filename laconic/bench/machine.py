"""What the machine itself can do, measured in the same rounds as the contestants: reading, and multiplying.

- **read**: bytes a second of summing a float32 buffer that no cache holds, with torch's threads. A sum needs no more than
  one operation for each number, so memory bounds it.
- **float32**: operations a second of a square float32 product through torch.
- **int8**: those of a square int8 product, through torch's own (`torch._int_mm`) or oneDNN's linear layer of uint8 and int8,
  whichever is faster here.

These are what was measured, not what the chip could do: somebody with a better kernel may well pass them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from .measure import LEAST, Timed, alternate

__all__ = ["FLOAT32", "INT8", "READ", "cache_bytes", "how", "probes"]

READ, FLOAT32, INT8 = "read", "float32", "int8"
SIDE = 1024  # of the square products: 2 GOP, long enough to be at speed and short enough for every round
BUFFER = 8  # last-level caches that the buffer to read fills
UNKNOWN_CACHE = 32 << 20


@functools.cache
def cache_bytes() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=UNKNOWN_CACHE)


def probes() -> dict[str, tuple[Timed, float]]:
    """What to time to learn what the machine can do: name -> (what, bytes or operations of one turn)."""
    size = BUFFER * cache_bytes() // 4
    buffer = torch.ones(size)
    a = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    operations = 2.0 * SIDE**3
    return {
        READ: (Timed(lambda: torch.sum(buffer)), 4.0 * size),
        FLOAT32: (Timed(lambda: torch.mm(a, a)), operations),
        INT8: (Timed(_fastest_int8()[1]), operations),
    }


def how() -> dict[str, str]:
    """How each is measured, in words."""
    size = BUFFER * cache_bytes()
    return {
        READ: f"torch.sum of {size >> 20} MiB of float32; the last-level cache has {cache_bytes() >> 20} MiB",
        FLOAT32: f"torch.mm of {SIDE}x{SIDE} float32",
        INT8: f"{_fastest_int8()[0]} of {SIDE}x{SIDE}",
    }


@functools.cache
def _fastest_int8():
    """(name, call) of the faster of torch's two int8 products, by a few alternating rounds."""
    signed = torch.randint(-127, 128, (SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    ways = {"torch._int_mm": lambda: torch._int_mm(signed, signed)}
    try:
        unsigned = signed.view(torch.uint8)
        weight = torch.ops.onednn.qlinear_prepack(signed.t(), [SIDE, SIDE])
        scale, zero = torch.full((SIDE,), 0.01), torch.zeros(SIDE, dtype=torch.int32)

        def linear():
            return torch.ops.onednn.qlinear_pointwise(
                unsigned, 0.1, 0, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )

        linear()
        ways["oneDNN's linear layer (uint8 by int8)"] = linear
    except (AttributeError, RuntimeError):
        pass  # a torch without oneDNN: its own product stands alone
    times = alternate({name: Timed(call) for name, call in ways.items()}, 5, least=LEAST, settle=0.0)
    best = min(ways, key=lambda name: sorted(times[name])[len(times[name]) // 2])
    return best, ways[best]
