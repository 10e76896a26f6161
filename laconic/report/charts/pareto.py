"""Everything that was tried: size against drop with intervals, the budget's lines, the chosen one marked."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from .. import text
from ..record import get, unit_of
from ..svg import Axis, chart, responsive, tag, ticks

__all__ = ["pareto"]

CLIP = 4.0  # a drop this many times beyond what matters is drawn at the edge, with an arrow


def frontier(tried: list[dict]) -> list[dict]:
    """Those that nothing else beats in both size and drop, by size."""
    best, found = float("inf"), []
    for point in sorted(tried, key=lambda p: (p["size"], p["drop"])):
        if point["drop"] < best:
            best = point["drop"]
            found.append(point)
    return found


def _ceiling(tried: list[dict], budget: float | None) -> float:
    """The top of the drop axis: all points, unless a few far ones would flatten the others."""
    highest = max(p["high"] if p.get("high") is not None else p["drop"] for p in tried)
    chosen = [p.get("high") or p["drop"] for p in tried if p.get("chosen")]
    matters = max([0.0, budget or 0.0, *chosen]) or sorted(p["drop"] for p in tried)[len(tried) // 2]
    return CLIP * matters if matters > 0 and highest > 1.5 * CLIP * matters else highest


def _tip(p: dict, unit: str) -> str:
    """What the pointer shows on one try."""
    spread = text.interval(p.get("low"), p.get("high"))
    lines = (
        str(p.get("name") or "unnamed") + (" (chosen)" if p.get("chosen") else ""),
        text.bytes_(p["size"]),
        f"drop {text.drop(p['drop'], unit)}" + (f" ({spread})" if spread else ""),
        f"{p['split']} split" if p.get("split") else "",
    )
    return "\n".join(line for line in lines if line)


def _point(p: dict, px: float, y: Axis, unit: str, ring: bool) -> list[Markup]:
    """One try: whisker, marker, a ring if it was chosen; an arrow and the figure if it is off the axis."""
    py, low, high = y(p["drop"]), p.get("low"), p.get("high")
    shade = "p-verify" if p.get("split") == "verify" else "p-tried"
    drawn = []
    if p["drop"] > y.high:
        path = f"M{px - 6:.1f} {py + 10:.1f}L{px + 6:.1f} {py + 10:.1f}L{px:.1f} {py:.1f}Z"
        drawn.append(tag("path", d=path, class_=shade))
        drawn.append(tag("text", text.amount(p["drop"], 2), x=px + 9, y=py + 11, class_="t-small"))
    else:
        if low is not None and high is not None:
            drawn.append(tag("line", x1=px, x2=px, y1=y(low), y2=y(high), class_=f"l-whisker {shade}-l"))
        drawn.append(tag("circle", cx=px, cy=py, r=4.5, class_=shade))
        if ring:
            drawn.append(tag("circle", cx=px, cy=py, r=9, class_="p-ring"))
    tip = _tip(p, unit)
    drawn.append(tag("circle", cx=px, cy=py, r=13, class_="hit", data_tip=tip, tabindex=0, aria_label=tip))
    return drawn


def pareto(record: Mapping) -> Markup | None:
    """Size across, drop up; down and left is better. `None` if nothing with both figures was tried."""
    tried = [p for p in record.get("tried") or [] if p.get("size") is not None and p.get("drop") is not None]
    if not tried:
        return None
    verified = any(p.get("chosen") and p.get("split") == "verify" for p in tried)
    size, budget, unit = (
        get(record, "budget", "size", "bytes"),
        get(record, "budget", "drop"),
        unit_of(record),
    )
    sizes = [p["size"] for p in tried] + ([size] if size else [])
    spare = 0.08 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    bottom = min([0.0] + [p["low"] if p.get("low") is not None else p["drop"] for p in tried])
    top = _ceiling(tried, budget)
    rise = 0.08 * (top - bottom) or 1.0

    def draw(width: int) -> Markup:
        narrow = width < 500
        height, left, right, head, foot = (340 if narrow else 420), 48, 14, 26, 46
        x = Axis(min(sizes) - spare, max(sizes) + spare, left, width - right)
        y = Axis(bottom - rise, top + rise, height - foot, head)
        items = []
        edge_x, edge_y = x(size) if size else width - right, y(budget) if budget is not None else head
        if size or budget is not None:
            items.append(
                tag(
                    "rect",
                    x=float(left),
                    y=float(edge_y),
                    width=float(edge_x - left),
                    height=float(height - foot - edge_y),
                    class_="f-allowed",
                )
            )
        for tick in ticks(y.low, y.high, 6):
            items.append(
                tag(
                    "line",
                    x1=left,
                    x2=width - right,
                    y1=y(tick),
                    y2=y(tick),
                    class_="l-zero" if tick == 0 else "l-grid",
                )
            )
            items.append(tag("text", text.amount(tick), x=left - 7, y=y(tick) + 4, class_="t-small t-end"))
        places = ticks(x.low, x.high, 4 if narrow else 10)
        for tick, label in zip(places, text.size_ticks(places), strict=True):
            items.append(
                tag("line", x1=x(tick), x2=x(tick), y1=height - foot, y2=height - foot + 4, class_="l-axis")
            )
            items.append(tag("text", label, x=x(tick), y=height - foot + 18, class_="t-small t-mid"))
        items.append(
            tag("line", x1=left, x2=width - right, y1=height - foot, y2=height - foot, class_="l-axis")
        )
        if size:
            items.append(tag("line", x1=edge_x, x2=edge_x, y1=head, y2=height - foot, class_="l-budget"))
            side = "t-small t-end" if edge_x > width / 2 else "t-small"
            items.append(
                tag(
                    "text",
                    f"size budget {text.bytes_(size)}",
                    x=edge_x + (-6 if "end" in side else 6),
                    y=head + 11,
                    class_=side,
                )
            )
        if budget is not None and budget <= y.high:
            items.append(tag("line", x1=left, x2=width - right, y1=edge_y, y2=edge_y, class_="l-budget"))
            items.append(
                tag(
                    "text",
                    f"drop budget {text.drop(budget, unit)}",
                    x=left + 6,
                    y=edge_y - 6,
                    class_="t-small",
                )
            )
        steps = [(x(p["size"]), y(p["drop"])) for p in frontier(tried) if p["drop"] <= y.high]
        if len(steps) > 1:
            items.append(
                tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in steps), class_="l-frontier")
            )
        # Candidates of one size stand side by side, not one over the other: the verified one where its size is, the
        # others to its left, where no budget is passed.
        last_first = sorted(tried, key=lambda p: p.get("split") != "verify")
        for number, p in reversed(list(enumerate(last_first))):
            aside = 11 * sum(other["size"] == p["size"] for other in last_first[:number])
            ring = bool(p.get("chosen")) and (p.get("split") == "verify" or not verified)
            items.extend(_point(p, x(p["size"]) - aside, y, unit, ring))
        items.append(tag("text", f"drop in {unit}", x=2, y=14, class_="t-small t-strong"))
        items.append(
            tag("text", "size on disk", x=width - right, y=height - 6, class_="t-small t-strong t-end")
        )
        return chart(width, height, f"{len(tried)} tries: size against drop; down and left is better", items)

    return responsive(draw)
