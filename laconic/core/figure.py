"""Plots of probes, as SVG text: lines, points, and tables of cells. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 560, 320, 64, 34, 46, 170
COLOURS = ("#1f5fd0", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#475569")
STYLE = (
    'text{font:12px system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif;fill:#1b1d21}'
    ".page{fill:#fff}.dim{fill:#5d636e}.axis{stroke:#c9ccd2;fill:none}.cell{font-size:11px}.bar{fill:#1f5fd0}.all{fill:#d8dbe1}"
    "@media (prefers-color-scheme:dark){text{fill:#e8e9eb}.page{fill:#1c1f23}.dim{fill:#9da3ad}.axis{stroke:#484e57}"
    ".bar{fill:#7fb0ff}.all{fill:#3a3f47}}"
)

Points = Sequence[tuple[float, float]]


BARS, ROW = 640, 22  # width of a plot of bars, height of a bar with its gap


def bars(
    rows: Sequence[tuple[str, float, str]], title: str, label: str, *, left: int, right: int, whole: bool = False
) -> str:
    """Horizontal bars, one below the other.

    Args:
        rows: what a bar is called, its share of the longest in [0, 1], and what stands behind it.
        title: what stands above.
        label: the plot in a sentence, for who cannot see it.
        left, right: room for names and for what stands behind, in pixels.
        whole: show behind each bar how long the longest would be.
    """
    height, scale = TOP + ROW * len(rows) + 12, BARS - left - right
    drawn = []
    for i, (name, share, behind) in enumerate(rows):
        y = TOP + ROW * i
        drawn.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        if whole:
            drawn.append(f'<rect class="all" x="{left}" y="{y + 2}" width="{scale}" height="{ROW - 8}"/>')
        drawn.append(
            f'<rect class="bar" x="{left}" y="{y + 2}" width="{scale * share:.1f}" height="{ROW - 8}"/>'
            f'<text x="{left + scale + 8}" y="{y + 13}">{escape(behind)}</text>'
        )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {BARS} {height}" role="img" aria-label="{escape(label)}">'
    page = f'<rect class="page" width="{BARS}" height="{height}"/><text x="20" y="20">{escape(title)}</text>'
    return f"{head}<style>{STYLE}</style>{page}{''.join(drawn)}</svg>"


def chart(
    series: Mapping[str, Points], title: str, across: str, up: str, *, joined: bool = True, log: bool = False
) -> str:
    """Series of points (x, y) by name, joined by lines or not.

    Args:
        series: points whose values are not finite are left out. Where colours come again, lines are broken and points
            hollow, from the third time on in broken outlines beside the names.
        title, across, up: what stands above, below and beside.
        joined: draw lines.
        log: x on a logarithmic axis; points at 0 or below are left out.
    """
    kept = {
        name: [(math.log10(x) if log else x, y) for x, y in points if math.isfinite(x + y) and (x > 0 or not log)]
        for name, points in series.items()
    }
    places = [point for points in kept.values() for point in points] or [(0.0, 0.0)]
    x0, x1 = _range([x for x, _ in places])
    y0, y1 = _range([y for _, y in places])
    height = max(HEIGHT, TOP + 18 * len(kept) + BOTTOM)
    right, bottom = WIDTH - RIGHT, height - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * (x - x0) / (x1 - x0), bottom - (bottom - TOP) * (y - y0) / (y1 - y0)

    parts = [
        f'<text x="{LEFT}" y="18">{escape(title)}</text>',
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        px, py = at(x, y)
        shown = 10**x if log else x
        parts.append(f'<text class="dim" text-anchor="middle" x="{px:.1f}" y="{bottom + 16}">{_tick(shown)}</text>')
        parts.append(f'<text class="dim" text-anchor="end" x="{LEFT - 6}" y="{py + 4:.1f}">{_tick(y)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="dim" text-anchor="middle" x="{middle}" y="{height - 8}">{escape(across)}</text>')
    parts.append(
        f'<text class="dim" text-anchor="middle" transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)">{escape(up)}</text>'
    )
    for i, (name, points) in enumerate(kept.items()):
        colour, again = COLOURS[i % len(COLOURS)], i // len(COLOURS)
        drawn = [at(x, y) for x, y in points]
        dashes = f' stroke-dasharray="{6 / again:.0f} 3"' if again else ""
        painted = f'class="page" stroke="{colour}" stroke-width="2"' if again else f'fill="{colour}"'
        if joined and len(drawn) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" {painted}><title>{escape(name)}: {a:.4g}, {b:.4g}</title></circle>'
            for (x, y), (a, b) in zip(drawn, points, strict=True)
        ]
        outline = dashes if again > 1 else ""  # else the third of a colour would look like the second
        parts.append(f'<rect x="{right + 14}" y="{TOP + 18 * i}" width="10" height="10" {painted}{outline}/>')
        parts.append(f'<text x="{right + 29}" y="{TOP + 9 + 18 * i}">{escape(name)}</text>')
    return _page(WIDTH, height, title, parts)


def cells(rows: Mapping[str, Sequence[float]], columns: Sequence[str], title: str, unit: float = 1.0) -> str:
    """A table whose cells are the darker the larger the value; what is not finite is empty.

    Args:
        rows: name -> a value for each column.
        columns: their names.
        title: stands above.
        unit: values are shown times this.
    """
    left, wide, tall = 150, 62, 22
    values = [value for row in rows.values() for value in row if math.isfinite(value)] or [0.0]
    low, high = _range(values)
    parts = [f'<text x="12" y="18">{escape(title)}</text>']
    for j, name in enumerate(columns):
        parts.append(
            f'<text class="dim" text-anchor="middle" x="{left + wide * (j + 0.5)}" y="40">{escape(name)}</text>'
        )
    for i, (name, row) in enumerate(rows.items()):
        y = 48 + tall * i
        parts.append(f'<text text-anchor="end" x="{left - 8}" y="{y + 15}">{escape(name)}</text>')
        for j, value in enumerate(row):
            if not math.isfinite(value):
                continue
            share = (value - low) / (high - low)
            parts.append(
                f'<rect x="{left + wide * j}" y="{y}" width="{wide - 2}" height="{tall - 2}" fill="#1f5fd0" '
                f'fill-opacity="{0.08 + 0.72 * share:.2f}"/><text class="cell" text-anchor="middle" '
                f'x="{left + wide * (j + 0.5)}" y="{y + 15}">{value * unit:.3g}</text>'
            )
    return _page(left + wide * len(columns) + 12, 60 + tall * len(rows), title, parts)


def _page(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    page = f'<rect class="page" width="{width}" height="{height}"/>'
    return f'{head} aria-label="{escape(label)}"><style>{STYLE}</style>{page}{"".join(parts)}</svg>'


def _tick(value: float) -> str:
    """A number beside an axis, in the room that there is: 1,024, 52.8, -0.0002."""
    if 1000 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
