"""Just enough SVG: escaped elements, linear and logarithmic axes, round ticks. Colours are CSS classes.

Charts are drawn here and not by a plotting library so that the page stays small (the scripts of such a library take
megabytes in every report), follows the reader's light or dark theme, and prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Axis", "chart", "log_ticks", "num", "responsive", "tag", "ticks"]

WIDE, NARROW = 960, 380  # user units, which are CSS pixels in the widest page and on a phone


def num(x: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{x:.1f}".removesuffix(".0")


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; text is escaped, `None` attributes are left out, `class_` is class and `_` becomes `-`."""
    pairs = []
    for key, x in attributes.items():
        if x is not None:
            shown = num(x) if isinstance(x, float) else x
            pairs.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    inner = Markup("").join(children)
    return Markup(f"<{name}{''.join(pairs)}>{inner}</{name}>")


def chart(width: float, height: float, label: str, children: Iterable[str], **attributes: object) -> Markup:
    """An `<svg>` that scales with its column and says what it shows."""
    box = f"0 0 {num(width)} {num(height)}"
    return tag("svg", *children, viewBox=box, role="img", aria_label=label, **attributes)


def responsive(draw: Callable[[int], Markup]) -> Markup:
    """The same chart drawn for a wide and for a narrow column: text scaled down is unreadable on a phone."""
    wide, narrow = draw(WIDE), draw(NARROW)
    return tag("div", wide, class_="wide") + tag("div", narrow, class_="narrow")


@dataclass(frozen=True)
class Axis:
    """Maps values in `[low, high]` to positions in `[start, stop]`; values outside land on the edge."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, x: float) -> float:
        low, high = self.low, self.high
        if self.log:
            x, low, high = math.log10(max(x, low)), math.log10(low), math.log10(high)
        share = (x - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) within `[low, high]`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within `[low, high]`, every second or third where there are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = 1 + (last - first) // 6
    return [10.0**e for e in range(first, last + 1, stride)]
