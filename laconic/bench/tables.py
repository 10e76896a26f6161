"""What a run, and the list of works, look like in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from laconic.report import text

from .contest import OURS, contestants
from .machine import FLOAT32, INT8, READ
from .work import Work

__all__ = ["list_table", "run_table"]


def run_table(record: Mapping[str, Any]) -> RenderableType:
    """A table for each work, the fastest first, and under it the aims and who is missing."""
    parts: list[RenderableType] = []
    for work in record["works"]:
        parts += _work(work)
    load = [one for one in record["machine"]["load"] if one is not None]
    facts = f"{record['machine']['cpu']}, {record['machine']['threads']} threads, {record['rounds']} alternating rounds"
    if load:
        facts += f"; load {load[0]:.1f} before, {load[-1]:.1f} after"
    parts.append(Text(facts, style="dim"))
    if not record["enough_rounds"]:
        parts.append(Text("too few rounds for figures: this shows that it runs", style="yellow"))
    return Group(*parts)


def _work(work: Mapping[str, Any]) -> list[RenderableType]:
    title = Text.assemble((work["name"], "bold"), "  ", work["text"])
    if "absent" in work:
        return [title, Text(work["absent"], style="yellow"), Text("")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("ms", f"x {work['baseline']}", "GB/s", "of read", "GOP/s", "of peak", "cosine", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in work["contestants"]:
        style = "bold" if row["peer"] == OURS else ""
        table.add_row(*map(Text, _cells(row)), style=style)
    can = work["machine"]
    speeds = f"the machine in these rounds: {can[READ]['per_second'] / 1e9:.1f} GB/s read, "
    speeds += f"{can[FLOAT32]['per_second'] / 1e9:,.0f} GOP/s float32, {can[INT8]['per_second'] / 1e9:,.0f} GOP/s int8"
    return [title, table, Text(speeds, style="dim"), *map(_aim, work["aims"]), *_missing(work["missing"]), Text("")]


def _cells(row: Mapping[str, Any]) -> list[str]:
    speedup, read = row.get("speedup"), row.get("share_of_read")
    return [
        row["name"],
        text.amount(1000 * row["seconds"]),
        f"{speedup[0]:.2f} ({speedup[1]:.2f}-{speedup[2]:.2f})" if speedup else text.MISSING,
        f"{row['bytes_per_second'] / 1e9:.1f}" if read else text.MISSING,
        f"{read[0]:.0%}" if read else text.MISSING,
        text.amount(row["operations_per_second"] / 1e9),
        f"{row['share_of_peak'][0]:.0%}",
        f"{row['cosine']:.5f}" if "cosine" in row else text.MISSING,
        f"{row['max_error']:.2%}" if "cosine" in row else text.MISSING,
    ]


def _aim(aim: Mapping[str, Any]) -> Text:
    if aim["met"] is None:
        return Text(f"aim: {aim['aim']}: cannot be said, somebody is missing", style="yellow")
    low, high = aim["found"][1:]
    spread = f" ({low:.3g} to {high:.3g})" if low != high else ""
    word, style = ("met", "green") if aim["met"] else ("missed", "red")
    against = f" against {aim['against']}" if aim["against"] else ""
    return Text(f"aim: {aim['aim']}: {aim['by']} has {aim['found'][0]:.3g}{spread}{against}: {word}", style=style)


def _missing(missing: Sequence[Mapping[str, str]]) -> list[Text]:
    """Those who broke, each with its reason; those who are simply not meant for it are in the record."""
    broken = [one for one in missing if one["reason"].startswith("failed")]
    lines = [Text(f"{one['name']} {one['reason']}", style="yellow") for one in broken]
    absent = sorted({one["peer"] for one in missing if "not installed" in one["reason"]})
    return lines + ([Text(f"not installed: {', '.join(absent)}", style="dim")] if absent else [])


def list_table(works: Sequence[Work], peers: Sequence[str] | None = None) -> RenderableType:
    """Every work, and who would take part."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("Work", no_wrap=True)
    table.add_column("What")
    table.add_column("Who")
    for work in works:
        problem = work.problem()
        names = [one.name for one in contestants(problem, peers) if one.why_not(problem) is None]
        table.add_row(Text(work.name, style="bold"), Text(work.text), Text(", ".join(names)))
    return table
