"""The plot of a claim, an SVG that stands alone: each seed in both arms, and the differences with their interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from laconic.report import text
from laconic.report.svg import Axis, chart, tag, ticks

from .verdict import differences

__all__ = ["draw"]

WIDTH, HEIGHT = 720, 330
TOP, BOTTOM = 76, 276  # of both panels
PAIRS = (64.0, 330.0)  # left panel
EFFECT = (430.0, 690.0)  # right panel

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #1b1d21 }
.page { fill: #ffffff } .dim { fill: #5d636e } .small { font-size: 11.5px } .title { font-size: 15px; font-weight: 600 }
.mid { text-anchor: middle } .end { text-anchor: end }
.axis { stroke: #c9ccd2 } .pair { stroke: #a1a5ad } .zero { stroke: #a1a5ad }
.margin { stroke: #8a5300; stroke-dasharray: 5 4 } .interval { stroke: #1f5fd0; stroke-width: 3; stroke-linecap: round }
.dot { fill: #1f5fd0 } .seed { fill: #1f5fd0; opacity: .45 }
.base { fill: #8b909a } .marginal { fill: #8a5300 }
@media (prefers-color-scheme: dark) {
  text { fill: #e8e9eb } .page { fill: #1c1f23 } .dim { fill: #9da3ad } .axis { stroke: #484e57 }
  .pair, .zero { stroke: #6b717b }
  .interval { stroke: #7fb0ff } .dot, .seed { fill: #7fb0ff } .base { fill: #9da3ad } .margin { stroke: #f0b95a }
  .marginal { fill: #f0b95a }
}
"""


def draw(record: Mapping[str, Any]) -> str:
    """The plot of a record."""
    claim = record["claim"]
    values = {arm: [run["value"] for run in record["runs"] if run["arm"] == arm] for arm in claim["arms"]}
    first, second = (values[arm] for arm in claim["arms"])
    title = f"{record['id']}: {record['verdict']}" + (" (quick run, no verdict)" if record["quick"] else "")
    items = [
        tag("style", Markup(STYLE)),
        tag("rect", width=WIDTH, height=HEIGHT, class_="page"),
        tag("text", title, x=20, y=28, class_="title"),
        tag("text", _short(claim["text"], 96), x=20, y=49, class_="dim"),
        *_pairs(claim, first, second),
        *_effect(record, differences(first, second, claim["direction"]).tolist()),
    ]
    label = f"{record['id']}: {record['sentence']}"
    return f"{chart(WIDTH, HEIGHT, label, items, xmlns='http://www.w3.org/2000/svg')}\n"


def _short(line: str, most: int) -> str:
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _vertical(values: list[float]) -> Axis:
    low, high = min(values), max(values)
    pad = 0.08 * ((high - low) or abs(high) or 1.0)
    return Axis(low - pad, high + pad, BOTTOM, TOP)


def _scale(axis: Axis, x: float) -> list[Markup]:
    """An axis at the left of a panel: its line, and round numbers."""
    items = [tag("line", x1=x, x2=x, y1=TOP, y2=BOTTOM, class_="axis")]
    for tick in ticks(axis.low, axis.high, 5):
        items.append(tag("line", x1=x - 4, x2=x, y1=axis(tick), y2=axis(tick), class_="axis"))
        items.append(tag("text", text.amount(tick, 4), x=x - 7, y=axis(tick) + 4, class_="small dim end"))
    return items


def _pairs(claim: Mapping[str, Any], first: list[float], second: list[float]) -> list[Markup]:
    """The metric of each seed in both arms, joined by a line."""
    axis = _vertical([*first, *second])
    left, right = PAIRS[0] + 60, PAIRS[1] - 60
    items = _scale(axis, PAIRS[0])
    for seed, (a, b) in enumerate(zip(first, second, strict=True)):
        items.append(tag("line", x1=left, x2=right, y1=axis(a), y2=axis(b), class_="pair"))
        for x, value, shade in ((left, a, "base"), (right, b, "dot")):
            tip = tag("title", f"seed {seed}: {text.amount(value, 5)}")
            items.append(tag("circle", tip, cx=x, cy=axis(value), r=5, class_=shade))
    for x, arm in ((left, claim["arms"][0]), (right, claim["arms"][1])):
        items.append(tag("text", _short(arm, 22), x=x, y=BOTTOM + 22, class_="mid"))
    metric = f"{claim['metric']} ({claim['direction']} is better)"
    return [*items, tag("text", _short(metric, 48), x=(left + right) / 2, y=BOTTOM + 42, class_="small dim mid")]


def _effect(record: Mapping[str, Any], found: list[float]) -> list[Markup]:
    """The difference of each pair, their mean and its interval, against zero and the margin."""
    low, high = record["interval"]
    ends = [value for value in (low, high) if value is not None]
    margin = record["claim"]["margin"]
    axis = _vertical([*found, *ends, 0.0, margin])
    start, stop = EFFECT
    items = _scale(axis, start)
    items.append(tag("line", x1=start, x2=stop, y1=axis(0.0), y2=axis(0.0), class_="zero"))
    items.append(tag("line", x1=start, x2=stop, y1=axis(margin), y2=axis(margin), class_="margin"))
    if margin:
        said = f"claimed: more than {text.amount(margin)}"
        items.append(tag("text", said, x=stop, y=axis(margin) - 5, class_="small marginal end"))
    at, mean = start + 70, start + 160
    for seed, value in enumerate(found):
        tip = tag("title", f"seed {seed}: {text.amount(value, 4)}")
        items.append(tag("circle", tip, cx=at, cy=axis(value), r=5, class_="seed"))
    if len(ends) == 2:
        items.append(tag("line", x1=mean, x2=mean, y1=axis(low), y2=axis(high), class_="interval"))
    items.append(tag("circle", cx=mean, cy=axis(record["effect"]), r=6, class_="dot"))
    items.append(tag("text", "seeds", x=at, y=BOTTOM + 22, class_="mid"))
    items.append(tag("text", "mean, 95 %", x=mean, y=BOTTOM + 22, class_="mid"))
    better = "how much better the method is"
    return [*items, tag("text", better, x=(start + stop) / 2, y=BOTTOM + 42, class_="small dim mid")]
