"""What probes found, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["calibration_table", "finding_table"]

MOST_ROWS = 100


def finding_table(record: Mapping) -> RenderableType:
    """A probe's table, and what it cost."""
    rows = record["table"]
    shown = _table(f"{record['probe']}: {record['model']} on {record['data']}", rows[:MOST_ROWS])
    more = [Text(f"and {len(rows) - MOST_ROWS} more rows: --json has all")] if len(rows) > MOST_ROWS else []
    cost = record["cost"]
    said = cost if isinstance(cost, str) else ", ".join(f"{name} {_value(value)}" for name, value in cost.items())
    return Group(shown, *more, Text(said, style="dim"), *(Text(note) for note in record["notes"]))


def calibration_table(record: Mapping) -> RenderableType:
    """Calibrators before and after, and where the kept one lies."""
    title = f"{record['name']}: fitted on {record['fitted_on']} examples, judged on {record['judged_on']} others"
    kept = (
        Text(f"{record['kept']} is saved in {record['out']}") if record["out"] else Text("nothing is saved: pass --out")
    )
    return Group(_table(title, record["table"]), kept, *(Text(note) for note in record["notes"]))


def _table(title: str, rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        numbers = all(isinstance(row[name], (int, float)) or row[name] is None for row in rows)
        # A path that is cut is no path: text goes on below.
        table.add_column(str(name).replace("_", " "), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_value(value) for value in row.values()))
    return table


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"
