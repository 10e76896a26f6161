"""What `laconic reproduce` prints: one claim that was run, and all claims with their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from laconic.catalog.source import Method
from laconic.report import text

from .reproduce import Outcome
from .verdict import CONFIRMED, INCONCLUSIVE, REFUTED

__all__ = ["outcome_table", "verdict_table"]

TONES = {CONFIRMED: "green", REFUTED: "red", INCONCLUSIVE: "yellow"}


def outcome_table(outcome: Outcome) -> RenderableType:
    """The verdict, every seed, what it took, and where the record is."""
    record, claim = outcome.record, outcome.record["claim"]
    values = {(run["arm"], run["seed"]): run["value"] for run in record["runs"]}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("Seed", justify="right")
    for arm in (*claim["arms"], "Better by"):
        table.add_column(Text(arm), justify="right")
    sign = 1 if claim["direction"] == "higher" else -1
    for seed in range(record["seeds"]):
        pair = [values[arm, seed] for arm in claim["arms"]]
        row = [*pair, sign * (pair[1] - pair[0])]
        table.add_row(str(seed), *(Text(text.amount(value, 4)) for value in row))
    facts = f"{claim['metric']} on {claim['task']}; took {text.seconds(record['seconds'])}"
    word, _, rest = record["sentence"].partition(":")
    return Group(
        Text.assemble((record["id"], "bold"), "  ", claim["text"]),
        Text.assemble((word, f"bold {TONES[word]}"), ":", rest),
        Text("a quick run shows that the experiment works; it says nothing of the claim")
        if record["quick"]
        else Text(""),
        table,
        Text(facts, style="dim"),
        Text.assemble(("Record ", "dim"), (str(outcome.path), "cyan"), overflow="fold"),
        Text.assemble(("Plot   ", "dim"), (str(outcome.plot), "cyan"), overflow="fold"),
    )


def verdict_table(rows: Sequence[tuple[Method, Mapping[str, Any] | None, Sequence[str]]]) -> RenderableType:
    """Every claim, its verdict, effect, interval and margin, a line each; what exactly is claimed, `laconic show` says."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("Method", "Verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("Effect", "95 %", "Margin"):
        table.add_column(name, justify="right")
    table.add_column("Metric", min_width=16)
    counts: dict[str, int] = {}
    for method, record, changed in rows:
        claim = method.card.claim or {}
        word = str(record["verdict"]) if record else "not run"
        counts[word] = counts.get(word, 0) + 1
        verdict = Text(word, style=TONES.get(word, "dim"))
        if changed:
            verdict.append(" *", style="bold")
        effect, interval = Text(text.MISSING), Text(text.MISSING)
        if record:
            effect = Text(text.amount(record["effect"]))
            interval = Text(" to ".join(text.amount(end) for end in record["interval"]))
        said = Text(f"{claim['metric']}, {claim['direction']}")
        table.add_row(
            Text(method.id, style="bold"), verdict, effect, interval, Text(text.amount(claim["margin"])), said
        )
    parts: list[RenderableType] = [table] if rows else []
    total = ", ".join(f"{n} {word}" for word, n in counts.items())
    parts.append(
        Text(f"{len(rows)} claim{'' if len(rows) == 1 else 's'}" + (f": {total}" if total else ""), style="dim")
    )
    if any(changed for _, _, changed in rows):
        parts.append(Text("* the claim, the experiment or the method has changed since: run it again", style="dim"))
    return Group(*parts)
