"""What a finished run and a comparison look like in a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import text
from .record import badges, before_after, clean, get, time_sentence, verdict_sentence

__all__ = ["comparison_table", "summary_table"]

TONES = {"good": "bold green", "warn": "bold yellow", "bad": "bold red"}


def _table(record: Mapping, first: str, second: str) -> Table:
    """The before/after rows; figures stay whole, the words around them wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", min_width=12, max_width=40)
    table.add_column(first, justify="right", overflow="fold")
    table.add_column(second, justify="right", style="bold", overflow="fold")
    table.add_column("Change", overflow="fold", min_width=14)
    for row in before_after(record):
        tone = "" if row.better is None else "green" if row.better else "red"
        cells = (row.label, row.before, row.after)
        table.add_row(*(Text(cell) for cell in cells), Text(row.change, style=tone))
    return table


def _verdict(record: Mapping) -> Text:
    """The verdict, its words coloured and bold where they end the sentence."""
    tones = [tone for _, tone in badges(record)]
    worst = next((t for t in ("bad", "warn", "good") if t in tones), None)
    return Text(verdict_sentence(record), style=TONES.get(worst or "", "bold"))


def summary_table(record: Mapping) -> RenderableType:
    """A finished run: verdict, before and after, the sentence about time, what was covered, passes left out, the paths.

    Other notes stay in the report; a pass that was asked for and not done makes another method of it, so it is said here.
    """
    record = clean(record)
    parts: list[RenderableType] = [
        Text(str(get(record, "model", "name") or "model"), style="bold"),
        _verdict(record),
        Text(""),
        _table(record, "Before", "After"),
        Text(""),
    ]
    sentence = time_sentence(record)
    if sentence:
        parts.append(Text(sentence))
    if within := text.memory(get(record, "budget", "memory")):
        parts.append(Text(f"Weights and cache: {within}."))
    facts = []
    if record.get("coverage") is not None:
        facts.append(f"{text.amount(100 * record['coverage'], 4)} % of the elements are stored in fewer bits")
    if record.get("flips") is not None:
        among = get(record, "task", "verify_n")
        of = f" of {among:,}" if among else ""
        facts.append(f"{record['flips']:,}{of} answers changed")
    if facts:
        parts.append(Text("; ".join(facts) + "."))
    total, reused = get(record, "seconds", "total"), record.get("units_reused")
    if total is not None:
        line = f"Took {text.seconds(total)}"
        if record.get("peak_rss_bytes"):
            line += f", at most {text.bytes_(record['peak_rss_bytes'])} of memory"
        if reused:
            of = f" of {record['units_total']}" if record.get("units_total") else ""
            line += f"; {reused}{of} units were taken over from an earlier run"
        parts.append(Text(line + ".", style="dim"))
    parts += [Text(f"Note: {note}") for note in record.get("notes") or [] if "was left out: " in note]
    parts += [
        Text.assemble((f"{label:<7}", "dim"), (str(record[key]), "cyan"), overflow="fold")
        for label, key in (("Model", "out"), ("Report", "report"))
        if record.get(key)
    ]
    return Group(*parts)


def comparison_table(record: Mapping) -> RenderableType:
    """Two models side by side on the same examples.

    Args:
        record: a measured record whose `before` and `after` are the two models, each with its `name`.
    """
    record = clean(record)
    first, second = (get(record, side, "name") or side.capitalize() for side in ("before", "after"))
    parts: list[RenderableType] = [_table(record, str(first), str(second))]
    sentence = get(record, "latency", "sentence")
    if sentence:
        parts += [Text(""), Text(str(sentence))]
    if record.get("flips") is not None:
        among = get(record, "task", "verify_n")
        of = f" of {among:,}" if among else ""
        parts.append(Text(f"{record['flips']:,}{of} answers differ."))
    return Group(*parts)
