"""What `laconic plan` prints: what would happen, known from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import text
from .path import Path
from .record import clean, get

__all__ = ["plan_table"]

ROWS = 40  # units shown one by one; more are summed up per block


def _together(units: list[dict]) -> list[dict]:
    """Units with one scheme that differ in nothing but the numbers in their path, summed up as one row."""
    groups: dict[tuple, list[dict]] = {}
    for unit in units:
        alike = re.sub(r"(?<=\.)\d+(?=\.)", "*", str(unit.get("name")))
        groups.setdefault((alike, unit.get("op"), unit.get("scheme"), unit.get("kernel")), []).append(unit)
    rows = []
    for (name, op, scheme, kernel), members in groups.items():
        single = len(members) == 1
        rows.append(
            {
                "name": members[0].get("name") if single else name,
                "op": op,
                "scheme": scheme,
                "kernel": kernel,
                "count": len(members),
                "reason": members[0].get("reason"),
                "bytes_before": sum(m.get("bytes_before") or 0 for m in members),
                "bytes_after": sum(m.get("bytes_after") or 0 for m in members),
            }
        )
    return rows


def _units(units: list[dict], summed: bool) -> Table:
    """One row per unit, or per group of units that are alike; a path alone means its `weight`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    if summed:
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("Unit", min_width=18)
    table.add_column("Stored as", no_wrap=True)
    table.add_column("Before", justify="right", no_wrap=True)
    table.add_column("After", justify="right", no_wrap=True)
    with_kernel = any(u.get("kernel") for u in units)
    if with_kernel:
        table.add_column("Kernel", max_width=14)
    for unit in units:
        cells: list[Any] = [f"{unit['count']}x"] if summed else []
        cells.append(Path(str(unit.get("name")).removesuffix(".weight")))
        cells.append(Text(text.scheme(unit["scheme"]) if unit.get("scheme") else "as it is"))
        cells += [text.bytes_(unit.get("bytes_before")), text.bytes_(unit.get("bytes_after"))]
        if with_kernel:
            cells.append(Text(str(unit.get("kernel") or text.MISSING).removeprefix("laconic::")))
        table.add_row(*cells)
    return table


def _headline(plan: Mapping) -> Table:
    """The figures that decide whether to go on."""
    before, after = plan.get("size_before"), plan.get("size_after")
    size = text.bytes_(after)
    if before and after:
        size += f", {text.ratio(before / after)} smaller than {text.bytes_(before)}"
    least = text.bytes_(plan.get("least"))
    if before and plan.get("least"):
        least += f", {text.ratio(before / plan['least'])} smaller"
    rows = [
        ("Size after", size),
        ("Least reachable", least),
        ("Weights and cache", text.memory(plan.get("memory"))),
        (
            "Peak memory",
            text.bytes_(plan.get("peak_rss_estimate")) + " (estimate)"
            if plan.get("peak_rss_estimate")
            else None,
        ),
        (
            "Time",
            text.seconds(plan["seconds_estimate"]) + " (estimate)"
            if plan.get("seconds_estimate") is not None
            else None,
        ),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, shown in rows:
        if shown:
            grid.add_row(label, Text(shown))
    return grid


def plan_table(plan: Mapping) -> RenderableType:
    """The plan: sizes, memory, time, every unit (summed up above 40), and what can't be done.

    Args:
        plan: any of `model` (a name), `size_before`, `size_after`, `least`, `peak_rss_estimate` (in bytes),
            `seconds_estimate`, `memory` (of a memory ceiling, as in report.json), `notes`, `units`
            (each `name`, `op`, `scheme`, `bytes_before`, `bytes_after`, `kernel`, `reason`), `impossible`
            (each `name`, `reason`; else units with a reason and no scheme).
    """
    plan = clean(plan)
    units = plan.get("units") or []
    impossible = plan.get("impossible")
    if impossible is None:
        impossible = [u for u in units if not u.get("scheme") and u.get("reason")]
    left = {u.get("name") for u in impossible}
    doable = [u for u in units if u.get("name") not in left]
    summed = len(doable) > ROWS
    parts: list[RenderableType] = []
    name = get(plan, "model", "name") or plan.get("model")
    if name:
        parts.append(Text(str(name), style="bold"))
    parts += [_headline(plan), Text(""), _units(_together(doable) if summed else doable, summed)]
    if impossible:
        reasons: dict[str, list[str]] = {}
        for unit in impossible:
            reasons.setdefault(str(unit.get("reason") or "no reason recorded"), []).append(
                str(unit.get("name"))
            )
        parts += [Text(""), Text("Left as they are", style="bold")]
        for reason, names in reasons.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            parts.append(Text.assemble((f"{len(names)} ", "bold"), reason, (f": {some}", "dim")))
    for note in plan.get("notes") or []:
        parts.append(Text(f"Note: {note}"))
    return Group(*parts)
