"""Per unit, in the model's order: bytes before and after, bits, and the loss, under one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from .. import text
from ..svg import Axis, chart, log_ticks, num, tag, ticks

__all__ = ["shade_of", "unit_panels", "widths"]

LEFT, RIGHT, TOP, GAP = 58, 10, 32, 46
PANELS = {"bytes": 170, "bits": 90, "loss": 120}  # and their heights
SMALL = 1e-3  # of all bytes: what is smaller and left alone is in the ledger, and not drawn


def shade_of(unit: Mapping) -> str:
    """The colour class of a unit's width: one per number of bits, grey for what was left alone."""
    bits = unit.get("bits")
    if not unit.get("scheme") or bits is None:
        return "b-float"
    return f"b-{min(max(round(bits), 1), 8)}"


def widths(record: Mapping) -> list[tuple[str, str]]:
    """The legend: the colour class and name of every width that occurs."""
    found = {shade_of(unit): unit.get("bits") for unit in record.get("units") or []}
    named = sorted((bits, shade) for shade, bits in found.items() if shade != "b-float")
    rows = [(shade, f"{text.amount(bits)} bits") for bits, shade in named]
    return rows + [("b-float", "left alone")] if "b-float" in found else rows


def tip_of(unit: Mapping) -> str:
    """What the pointer shows on a unit."""
    scheme = unit.get("scheme")
    lines = [
        str(unit.get("name")),
        str(scheme) if scheme else f"left alone: {unit.get('reason') or 'no reason recorded'}",
        f"{text.bytes_(unit.get('bytes_before'))} → {text.bytes_(unit.get('bytes_after'))}",
    ]
    if unit.get("bits") is not None:
        lines.append(
            f"{text.amount(unit['bits'])} bits" + (f", {unit['method']}" if unit.get("method") else "")
        )
    if unit.get("loss") is not None:
        lines.append(f"relative error {text.amount(unit['loss'])}")
    if scheme and unit.get("reason"):
        lines.append(str(unit["reason"]))
    if unit.get("calls") is not None and unit["calls"] != 1:
        lines.append("never called" if unit["calls"] == 0 else f"called {unit['calls']} times")
    return "\n".join(lines)


def _frame(width: float, y: Axis, marks: Sequence[tuple[float, str]], title: str) -> list[Markup]:
    """Title, grid lines, their labels and the floor of one panel."""
    items = [tag("text", title, x=0, y=y.stop - 16, class_="t-small t-strong")]
    for at, label in marks:
        items.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=y(at), y2=y(at), class_="l-grid"))
        items.append(tag("text", label, x=LEFT - 7, y=y(at) + 4, class_="t-small t-end"))
    items.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=y.start, y2=y.start, class_="l-axis"))
    return items


def _bar(x: float, pitch: float, y: Axis, amount: float, shade: str) -> Markup:
    """One bar in the middle of its column, never so low that it can't be seen."""
    wide = max(0.76 * pitch, 1.0)
    top = min(y(amount), y.start - 0.8)
    left, tall = num(x + (pitch - wide) / 2), num(y.start - top)
    return tag("rect", x=left, y=num(top), width=num(wide), height=tall, class_=shade)


def _drawn(record: Mapping) -> tuple[list[dict], int]:
    """The units with a column of their own, and how many small ones left alone have none."""
    units = [u for u in record.get("units") or [] if u.get("bytes_before")]
    least = SMALL * sum(u["bytes_before"] for u in units)
    drawn = [u for u in units if u.get("scheme") or u["bytes_before"] >= least]
    return drawn, len(units) - len(drawn)


def _axes(units: list[dict]) -> tuple[dict[str, Axis], float]:
    """The vertical axis of each panel, from its floor to its top, and the height of the whole drawing."""
    sizes = [size for u in units for size in (u.get("bytes_before"), u.get("bytes_after")) if size]
    loss = max((u["loss"] for u in units if u.get("loss") is not None), default=0)
    ranges = {
        "bytes": (10.0 ** (len(str(int(min(sizes)))) - 1), 1.2 * max(sizes)),
        "bits": (0, max([8, *(u.get("bits") or 0 for u in units if u.get("scheme"))])),
        "loss": (0, 1.08 * (loss or 1)),
    }
    axes, top = {}, TOP
    for name, tall in PANELS.items():
        low, high = ranges[name]
        axes[name] = Axis(low, high, top + tall, top, log=name == "bytes")
        top += tall + GAP
    return axes, top - GAP + 38


def _frames(width: float, y: dict[str, Axis]) -> list[Markup]:
    """Titles, grids and axes of the three panels."""
    size, bits, loss = y["bytes"], y["bits"], y["loss"]
    return [
        *_frame(
            width,
            size,
            [(t, text.tick(t)) for t in log_ticks(size.low, size.high)],
            "Bytes before (pale) and after, logarithmic",
        ),
        *_frame(width, bits, [(t, str(t)) for t in (0, 4, 8, 16, 32) if t <= bits.high], "Bits per weight"),
        *_frame(
            width,
            loss,
            [(t, text.amount(t)) for t in ticks(0, loss.high, 4)],
            "Loss: relative error of the unit's output or weight",
        ),
    ]


def unit_panels(record: Mapping) -> Markup | None:
    """Three panels over one row of units; hovering a column names the unit. `None` without units.

    The drawing has at least four pixels per unit; where that is wider than its column, it scrolls sideways.
    """
    units, small = _drawn(record)
    if not units:
        return None
    width = max(960, LEFT + RIGHT + 4 * len(units))
    pitch = (width - LEFT - RIGHT) / len(units)
    y, height = _axes(units)
    items = _frames(width, y)
    for i, unit in enumerate(units):
        x = LEFT + i * pitch
        bars = [_bar(x, pitch, y["bytes"], unit["bytes_before"], "s-ghost")]
        for panel, key in (("bytes", "bytes_after"), ("bits", "bits"), ("loss", "loss")):
            if unit.get(key) and (panel != "bits" or unit.get("scheme")):
                bars.append(_bar(x, pitch, y[panel], unit[key], shade_of(unit)))
        hit = tag(
            "rect",
            x=num(x),
            y=TOP,
            width=num(pitch),
            height=num(y["loss"].start - TOP),
            class_="hit",
            data_tip=tip_of(unit),
        )
        items.append(tag("g", *bars, hit))
    many = f"{len(units)} units in the model's order" if len(units) > 1 else "1 unit"
    many += f", {small} small ones left alone not drawn" if small else ""
    items.append(tag("text", many, x=width - RIGHT, y=height - 6, class_="t-small t-end"))
    label, floor = f"Bytes, bits and loss of {many}", max(720, 3 * len(units))
    drawing = chart(width, height, label, items, style=f"min-width:{floor}px")
    return tag(
        "div", drawing, class_="scroll", tabindex=0, role="region", aria_label="Bars per unit, scrollable"
    )
