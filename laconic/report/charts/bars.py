"""The small charts: size before and after, where the bytes are, the drop against its budget, the seconds."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from .. import text
from ..record import get, unit_of
from ..svg import Axis, chart, responsive, tag, ticks

__all__ = ["drop_strip", "kind_bars", "size_bars", "stage_bar"]

KINDS = 6  # colours that can be told apart; the rest is "other"


def size_bars(record: Mapping) -> Markup | None:
    """Two bars of honest length, before and after, with the size budget as a line."""
    before, after = get(record, "before", "size"), get(record, "after", "size")
    if not before or not after:
        return None
    limit = get(record, "budget", "size", "bytes")
    width, left, right = 460, 56, 84
    x = Axis(0, max(before, after), left, width - right)
    items = []
    for i, (name, size, shade) in enumerate((("before", before, "s-before"), ("after", after, "s-after"))):
        y = 8.0 + 40 * i
        items.append(tag("text", name, x=0, y=y + 19, class_="t-label"))
        items.append(tag("rect", x=float(left), y=y, width=x(size) - left, height=28, rx=3, class_=shade))
        end = x(size)
        if limit and end - 4 <= x(limit) <= end + 70:  # the figure would stand on the budget's line
            end = x(limit)
        items.append(tag("text", text.bytes_(size), x=end + 8, y=y + 19, class_="t-value"))
    if limit and limit <= x.high:
        items.append(tag("line", x1=x(limit), x2=x(limit), y1=2, y2=82, class_="l-budget"))
        items.append(tag("text", f"budget {text.bytes_(limit)}", x=x(limit), y=98, class_="t-small t-mid"))
    label = f"Size before {text.bytes_(before)}, after {text.bytes_(after)}"
    return chart(width, 104, label, items)


def drop_strip(record: Mapping) -> Markup | None:
    """The drop as a point on its interval, on a line with zero and the budget; the allowed side is tinted."""
    drop = record.get("drop")
    if drop is None:
        return None
    low, high = record.get("drop_low"), record.get("drop_high")
    budget, unit = get(record, "budget", "drop"), unit_of(record)
    known = [v for v in (0.0, drop, low, high, budget) if v is not None]
    pad = 0.12 * (max(known) - min(known) or 1.0)
    width, line = 460, 44.0
    x = Axis(min(known) - pad, max(known) + pad, 12, width - 12)
    items = []
    if budget is not None:
        items.append(tag("rect", x=12.0, y=line - 22, width=x(budget) - 12, height=44, class_="f-allowed"))
        items.append(tag("line", x1=x(budget), x2=x(budget), y1=line - 22, y2=line + 22, class_="l-budget"))
        side = (
            {"x": width - 12, "class_": "t-small t-end"}
            if x(budget) > 0.7 * width
            else {"x": x(budget), "class_": "t-small t-mid"}
        )
        items.append(tag("text", f"budget {text.drop(budget, unit)}", y=line - 28, **side))
    items.append(tag("line", x1=12, x2=width - 12, y1=line, y2=line, class_="l-axis"))
    for tick in ticks(x.low, x.high, 6):
        items.append(tag("line", x1=x(tick), x2=x(tick), y1=line - 3, y2=line + 3, class_="l-axis"))
        items.append(tag("text", text.amount(tick), x=x(tick), y=line + 38, class_="t-small t-mid"))
    if low is not None and high is not None:
        span = tag("line", x1=x(low), x2=x(high), y1=line, y2=line, class_="l-interval")
        items.append(span)
    items.append(tag("circle", cx=x(drop), cy=line, r=7, class_="p-chosen"))
    items.append(
        tag(
            "text", f"drop in {unit}; to the left is better", x=width / 2, y=line + 57, class_="t-small t-mid"
        )
    )
    spread = text.interval(low, high)
    return chart(width, 104, f"Drop {text.drop(drop, unit)} {spread}", items)


def kind_bars(record: Mapping) -> tuple[Markup, list[tuple[int, str, float, float]]] | None:
    """Where the bytes are, by operation: two stacked bars on one scale, and the legend's rows.

    Returns:
        The chart and, per kind, its colour number, name, bytes before and bytes after; `None` without units.
    """
    sums: dict[str, list[float]] = {}
    for unit in record.get("units") or []:
        pair = sums.setdefault(str(unit.get("op") or unit.get("kind") or "other"), [0.0, 0.0])
        pair[0] += unit.get("bytes_before") or 0
        pair[1] += unit.get("bytes_after") or 0
    ranked = sorted(sums.items(), key=lambda item: -item[1][0])
    rows = [(i, name, pair[0], pair[1]) for i, (name, pair) in enumerate(ranked[:KINDS])]
    if len(ranked) > KINDS:
        rest = [pair for _, pair in ranked[KINDS:]]
        rows.append((KINDS, "all others", sum(p[0] for p in rest), sum(p[1] for p in rest)))
    longest = max(sum(r[2] for r in rows), sum(r[3] for r in rows)) if rows else 0
    if not longest:
        return None

    def draw(width: int) -> Markup:
        x = Axis(0, longest, 52, width - 4)
        items = []
        for line, name in enumerate(("before", "after")):
            y, at = 4.0 + 40 * line, 52.0
            items.append(tag("text", name, x=0, y=y + 19, class_="t-label"))
            for row in rows:
                size = row[3] if line else row[2]
                long = x(size) - 52
                tip = f"{row[1]}, {name}\n{text.bytes_(size)}"
                if long > 0:
                    items.append(
                        tag(
                            "rect",
                            x=at,
                            y=y,
                            width=max(long - 1, 0.3),
                            height=28.0,
                            class_=f"k{row[0]}",
                            data_tip=tip,
                        )
                    )
                at += long
        return chart(width, 76, "Bytes by kind of operation, before and after", items)

    return responsive(draw), rows


def stage_bar(record: Mapping) -> Markup | None:
    """The seconds of each stage as one bar."""
    stages = {k: v for k, v in (get(record, "seconds", "stages") or {}).items() if v}
    total = sum(stages.values())
    if not total:
        return None

    def draw(width: int) -> Markup:
        at, items = 0.0, []
        for i, (name, spent) in enumerate(stages.items()):
            long = width * spent / total
            tip = f"{name}\n{text.seconds(spent)}, {100 * spent / total:.0f} %"
            items.append(
                tag(
                    "rect",
                    x=at,
                    y=0,
                    width=max(long - 1, 0.3),
                    height=26,
                    class_=f"k{i % (KINDS + 1)}",
                    data_tip=tip,
                )
            )
            at += long
        return chart(width, 26, "Seconds by stage", items)

    return responsive(draw)
