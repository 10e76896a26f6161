"""Figures as people read them: bytes, times, drops and their intervals. `None` becomes a dash everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "MISSING",
    "amount",
    "bytes_",
    "count",
    "drop",
    "interval",
    "memory",
    "ms",
    "plain",
    "ratio",
    "scheme",
    "seconds",
    "size_ticks",
    "tick",
    "value",
]

MISSING = "–"


def amount(x: float | None, digits: int = 3) -> str:
    """`x` with about `digits` significant digits, never in exponent form between 1e-4 and 1e7."""
    if x is None:
        return MISSING
    if x == 0:
        return "0"
    size = math.floor(math.log10(abs(x)))
    if size < -4 or size >= 7:
        return f"{x:.{digits - 1}e}"
    text = f"{x:,.{max(digits - 1 - size, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def bytes_(n: float | None) -> str:
    """Bytes in decimal units, as file managers show them: 22.6 MB."""
    if n is None:
        return MISSING
    if abs(n) < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n /= 1000
        if abs(n) < 999.5 or unit == "TB":
            break
    return f"{n:.{2 if abs(n) < 10 else 1 if abs(n) < 100 else 0}f} {unit}"


def tick(n: float) -> str:
    """Bytes on an axis: like `bytes_`, without zeros that say nothing."""
    figure, unit = bytes_(n).split(" ")
    return f"{figure.rstrip('0').rstrip('.') if '.' in figure else figure} {unit}"


def size_ticks(sizes: Sequence[float]) -> list[str]:
    """Different bytes on one axis, as `tick` says them; where two would read alike, all with as many digits as it takes."""
    labels = [tick(n) for n in sizes]
    if len(set(labels)) == len(set(sizes)):
        return labels
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, power = next((one for one in units if one[1] <= max(sizes)), ("B", 1.0))
    for digits in range(1, 16):
        labels = [f"{n / power:.{digits}f} {unit}" for n in sizes]
        if len(set(labels)) == len(set(sizes)):
            break
    return labels


def count(n: float | None) -> str:
    """A whole number, large ones shortened: 22.7 M."""
    if n is None:
        return MISSING
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(n) >= limit:
            return f"{amount(n / limit)} {unit}"
    return f"{n:,.0f}"


def seconds(s: float | None) -> str:
    """A duration in its two largest units: 3 min 24 s."""
    if s is None:
        return MISSING
    if s < 10:
        return f"{amount(s, 2)} s"
    whole = round(s)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def ms(x: float | None) -> str:
    """A latency in milliseconds."""
    return MISSING if x is None else f"{amount(x)} ms"


def ratio(x: float | None) -> str:
    """A factor: 4.02x."""
    return MISSING if x is None else f"{x:.2f}x"


def value(x: float | None, bounded: bool) -> str:
    """A metric's value; a bounded one in per cent, so that a drop in points can be read off it."""
    if x is None:
        return MISSING
    return f"{100 * x:.2f} %" if bounded else amount(x, 4)


def _decimals(x: float) -> str:
    """Two decimals at most, one where the second is zero; more for what would otherwise read as zero."""
    text = f"{x:.2f}" if abs(x) >= 0.005 or x == 0 else f"{x:.1g}"
    return text[:-1] if text.endswith("0") and "." in text else text


def drop(x: float | None, unit: str) -> str:
    """A drop with its unit: 0.1 points, 2.3 %."""
    return MISSING if x is None else f"{_decimals(x)} {unit}"


def interval(low: float | None, high: float | None) -> str:
    """The interval of a drop: 95 %: -0.2 to 0.5."""
    return "" if low is None or high is None else f"95 %: {_decimals(low)} to {_decimals(high)}"


def scheme(x: str | None) -> str:
    """What tells most of a scheme's versioned name: v1/int4/group64/float16/... is int4 group64."""
    if not x:
        return MISSING
    parts = [part for part in x.split("/") if not (part[:1] == "v" and part[1:].isdigit())]
    return " ".join(parts[:2])


def plain(x: Any) -> str:
    """Any recorded setting as one line."""
    if x is None:
        return MISSING
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, float):
        return amount(x, 4)
    if isinstance(x, dict):
        return str(x["text"]) if x.get("text") else ", ".join(f"{k} {plain(v)}" for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return ", ".join(plain(v) for v in x)
    return str(x)


def memory(told: Mapping | None) -> str | None:
    """Weights and cache of a `memory=` ceiling in one line, as report.json has them; None where there is none."""
    if not told:
        return None
    whole = f"{bytes_(told['weights'] + told['cache'])} of {bytes_(told['bytes'])}"
    if not told["cache"]:
        return f"{whole}, weights alone"
    cache = f"{bytes_(told['cache'])} cache in {told.get('cache_bits') or 'floats'}"
    return f"{whole}: {bytes_(told['weights'])} weights + {cache} for {told['batch']} x {told['tokens']:,} tokens"
