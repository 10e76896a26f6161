"""What the numbers look like: a small histogram of each unit's weights and activations, outliers in red."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from .. import text
from ..svg import Axis, chart, num, tag

__all__ = ["Figure", "histograms"]

WIDTH, HEIGHT, BASE = 300, 96, 78
BULK = 0.999  # of all values; what lies in bins beyond it on either side is drawn as outliers


class Figure(NamedTuple):
    """One histogram with the words around it."""

    name: str
    what: str  # "weight" or "activation"
    caption: str
    outlier_ratio: float
    svg: Markup


def _bulk(counts: list[float]) -> tuple[int, int]:
    """First and last bin of the middle that holds `BULK` of all values."""
    total, spare = sum(counts), (1 - BULK) / 2 * sum(counts)
    first, last, seen = 0, len(counts) - 1, 0.0
    while first < last and seen + counts[first] <= spare:
        seen += counts[first]
        first += 1
    seen = 0.0
    while last > first and seen + counts[last] <= spare and total:
        seen += counts[last]
        last -= 1
    return first, last


def _draw(histogram: Mapping, label: str) -> Markup | None:
    """Bars of log(1 + count), so that a single outlier can be seen next to a million others."""
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    if len(edges) != len(counts) + 1 or not counts or not sum(counts) or not edges[-1] > edges[0]:
        return None
    x = Axis(edges[0], edges[-1], 2, WIDTH - 2)
    y = Axis(0, math.log1p(max(counts)), BASE, 4)
    first, last = _bulk(counts)
    paths = {"h-bulk": "", "h-out": ""}
    for i, n in enumerate(counts):
        if n:
            left, right = x(edges[i]), x(edges[i + 1])
            shade = "h-bulk" if first <= i <= last else "h-out"
            paths[shade] += (
                f"M{num(left)} {BASE}V{num(min(y(math.log1p(n)), BASE - 1.5))}H{num(right)}V{BASE}Z"
            )
    items = [tag("path", d=d, class_=shade) for shade, d in paths.items() if d]
    items.append(tag("line", x1=0, x2=WIDTH, y1=BASE, y2=BASE, class_="l-axis"))
    items.append(tag("text", text.amount(edges[0], 2), x=2, y=HEIGHT - 4, class_="t-small"))
    items.append(tag("text", text.amount(edges[-1], 2), x=WIDTH - 2, y=HEIGHT - 4, class_="t-small t-end"))
    if edges[0] < 0 < edges[-1] and 40 < x(0) < WIDTH - 40:
        items.append(tag("text", "0", x=x(0), y=HEIGHT - 4, class_="t-small t-mid"))
    return chart(WIDTH, HEIGHT, label, items)


def _figure(unit: Mapping, key: str, what: str) -> Figure | None:
    histogram: Any = unit.get(key)
    if not histogram:
        return None
    ratio = histogram.get("outlier_ratio")
    caption = f"largest {text.amount(histogram.get('absmax'))}"
    if ratio is not None:
        caption += f", outlier ratio {text.amount(ratio)}"
    svg = _draw(histogram, f"Histogram of the {what} of {unit.get('name')}: {caption}")
    return Figure(str(unit.get("name")), what, caption, ratio or 0.0, svg) if svg else None


def histograms(record: Mapping) -> list[Figure]:
    """All histograms, the worst outlier ratio first."""
    pairs = (("histogram", "weight"), ("activation", "activation"))
    found = [_figure(unit, key, what) for unit in record.get("units") or [] for key, what in pairs]
    return sorted((f for f in found if f), key=lambda f: -f.outlier_ratio)
