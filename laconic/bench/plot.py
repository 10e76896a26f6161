"""The roofline of a run, an SVG that stands alone.

Across: operations for each byte that has to be read. Up: operations a second. Memory bounds from the left, at
(operations per byte) times the read bandwidth, arithmetic from above; both as measured in the run. A point on a roof uses the
machine up; one far below it leaves time on the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from markupsafe import Markup

from laconic.report import text
from laconic.report.svg import Axis, chart, log_ticks, tag

from .contest import OURS, PEERS
from .machine import FLOAT32, INT8, READ

__all__ = ["draw"]

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 74.0, 640.0, 64.0, 462.0
LEGEND = 664.0
SHAPES = ("circle", "square", "diamond", "triangle", "down", "cross", "plus")
WHO = (OURS, *PEERS)

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #1b1d21 }
.page { fill: #ffffff } .dim { fill: #5d636e } .small { font-size: 11.5px } .title { font-size: 15px; font-weight: 600 }
.mid { text-anchor: middle } .end { text-anchor: end } .axis { stroke: #c9ccd2 } .grid { stroke: #eceef1 }
.roof { stroke: #8a5300; stroke-width: 2; fill: none } .roof-text { fill: #8a5300 }
.ours { fill: #1f5fd0; stroke: #1f5fd0 } .peer { fill: none; stroke: #6b717b; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e8e9eb } .page { fill: #1c1f23 } .dim { fill: #9da3ad } .axis { stroke: #484e57 } .grid { stroke: #2b2f35 }
  .roof { stroke: #f0b95a } .roof-text { fill: #f0b95a }
  .ours { fill: #7fb0ff; stroke: #7fb0ff } .peer { stroke: #9da3ad }
}
"""


def draw(record: Mapping[str, Any]) -> str:
    """The plot of a record."""
    points = [
        (work, row, work["operations"] / row["bytes"], row["operations_per_second"])
        for work in record["works"]
        for row in work["contestants"]
        if "bytes" in row
    ]
    can = _machine(record)
    items = [tag("style", Markup(STYLE)), tag("rect", width=WIDTH, height=HEIGHT, class_="page")]
    items.append(tag("text", "Operations a second against operations per byte", x=20, y=28, class_="title"))
    threads = record["machine"]["threads"]
    where = f"{record['machine']['cpu']}, {threads} thread{'s' * (threads > 1)}; medians of {record['rounds']} rounds"
    items.append(tag("text", where, x=20, y=48, class_="dim small"))
    if points and can:
        x, y = _axes(points, can)
        items += [*_grid(x, y), *_roofs(x, y, can)]
        for work, row, intensity, speed in points:
            tip = f"{work['name']}, {row['name']}: {text.ms(1000 * row['seconds'])}, {text.count(speed)} operations/s"
            items.append(_mark(WHO.index(row["peer"]), x(intensity), y(speed), tip))
        items += _legend({row["peer"] for _, row, _, _ in points})
    else:
        items.append(tag("text", "nothing was measured", x=WIDTH / 2, y=HEIGHT / 2, class_="dim mid"))
    label = f"Roofline: {len(points)} measurements of {len(record['works'])} works"
    return f"{chart(WIDTH, HEIGHT, label, items, xmlns='http://www.w3.org/2000/svg')}\n"


def _machine(record: Mapping[str, Any]) -> dict[str, float]:
    """What the machine did, the median over the works."""
    measured = [work["machine"] for work in record["works"] if "machine" in work]
    names = (READ, FLOAT32, INT8)
    return {name: median(one[name]["per_second"] for one in measured) for name in names} if measured else {}


def _axes(points: list[tuple[Any, Any, float, float]], can: Mapping[str, float]) -> tuple[Axis, Axis]:
    ridge = can[INT8] / can[READ]
    across = [intensity for _, _, intensity, _ in points] + [ridge]
    up = [speed for _, _, _, speed in points] + [can[INT8], can[FLOAT32]]
    low, high = 10 ** math.floor(math.log10(min(across))), 10 ** math.ceil(math.log10(max(across) * 1.2))
    bottom, top = 10 ** math.floor(math.log10(min(up))), 10 ** math.ceil(math.log10(max(up) * 1.2))
    return Axis(low, high, LEFT, RIGHT, log=True), Axis(bottom, top, BOTTOM, TOP, log=True)


def _grid(x: Axis, y: Axis) -> list[Markup]:
    items = []
    for tick in log_ticks(y.low, y.high):
        items.append(tag("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        items.append(tag("text", text.count(tick), x=LEFT - 8, y=y(tick) + 4, class_="small dim end"))
    for tick in log_ticks(x.low, x.high):
        items.append(tag("line", x1=x(tick), x2=x(tick), y1=TOP, y2=BOTTOM, class_="grid"))
        items.append(tag("text", text.amount(tick), x=x(tick), y=BOTTOM + 18, class_="small dim mid"))
    items.append(tag("line", x1=LEFT, x2=LEFT, y1=TOP, y2=BOTTOM, class_="axis"))
    items.append(tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    items.append(tag("text", "operations per byte read", x=(LEFT + RIGHT) / 2, y=BOTTOM + 40, class_="mid"))
    return items


def _roofs(x: Axis, y: Axis, can: Mapping[str, float]) -> list[Markup]:
    """The bandwidth up to the int8 peak, and each peak from where memory allows it."""
    start = max(x.low, y.low / can[READ])
    ridge = can[INT8] / can[READ]
    path = f"{x(start):.1f},{y(start * can[READ]):.1f} {x(ridge):.1f},{y(can[INT8]):.1f} {RIGHT:.1f},{y(can[INT8]):.1f}"
    items = [tag("polyline", points=path, class_="roof")]
    knee = can[FLOAT32] / can[READ]
    level = y(can[FLOAT32])
    items.append(tag("line", x1=x(knee), x2=RIGHT, y1=level, y2=level, class_="roof", stroke_dasharray="5 4"))
    for name, value in (
        (f"int8 {text.count(can[INT8])}/s", can[INT8]),
        (f"float32 {text.count(can[FLOAT32])}/s", can[FLOAT32]),
    ):
        items.append(tag("text", name, x=RIGHT - 4, y=y(value) - 6, class_="small roof-text end"))
    middle = math.sqrt(start * ridge)
    said = f"{text.bytes_(can[READ])}/s"
    items.append(tag("text", said, x=x(middle) - 8, y=y(middle * can[READ]) - 8, class_="small roof-text end"))
    return items


def _mark(number: int, x: float, y: float, tip: str) -> Markup:
    """The mark of a peer, ours filled, with what the pointer shows."""
    look, title, r = "ours" if number == 0 else "peer", tag("title", tip), 5.0
    shape = SHAPES[number]
    if shape == "circle":
        return tag("circle", title, cx=x, cy=y, r=r, class_=look)
    if shape == "square":
        return tag("rect", title, x=x - r + 1, y=y - r + 1, width=2 * r - 2, height=2 * r - 2, class_=look)
    paths = {
        "diamond": ((0, -r), (r, 0), (0, r), (-r, 0), (0, -r)),
        "triangle": ((0, -r), (r, r), (-r, r), (0, -r)),
        "down": ((0, r), (r, -r), (-r, -r), (0, r)),
        "cross": ((-r, -r), (r, r), (0, 0), (-r, r), (r, -r)),
        "plus": ((0, -r), (0, r), (0, 0), (-r, 0), (r, 0)),
    }
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in paths[shape])
    return tag("polyline", title, points=points, class_=look)


def _legend(who: set[str]) -> list[Markup]:
    items = []
    for line, name in enumerate(name for name in WHO if name in who):
        y = TOP + 14 + 24 * line
        items.append(_mark(WHO.index(name), LEGEND + 6, y - 4, name))
        items.append(tag("text", name, x=LEGEND + 22, y=y))
    return items
