"""What `laconic normalize` prints: which norms became what, and the model before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["normalize_table"]

SHOWN = 3  # norms that stay, with their reasons


def normalize_table(record: Mapping) -> RenderableType:
    """A table of before and after, between what was done and where it lies."""
    said = [f"{count} norms: {what}" for what, count in Counter(record["norms"].values()).items()]
    said += [f"{name} is a parameter of its own now" for name in record["untied"]]
    left = list(record["left"].items())
    said += [f"{path} stays: {reason}" for path, reason in left[:SHOWN]]
    said += [f"{len(left) - SHOWN} more stay"] * (len(left) > SHOWN)
    folding = record["folding"]
    unfolded = list(folding["unfolded"].items()) if folding is not None else []
    said += [f"{path} is not folded: {reason}" for path, reason in unfolded[:SHOWN]]
    said += [f"{len(unfolded) - SHOWN} more are not folded"] * (len(unfolded) > SHOWN)
    if folding is not None and folding["folded"]:
        said.append(f"folding moved the output by {folding['relative_error']:.1e} of its largest value")
    said += record["notes"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    if record["metric"] is not None:
        table.add_row(record["metric"], *(f"{record[side]['value']:.4g}" for side in ("before", "after")))
    table.add_row("latency, ms", *(f"{record[side]['latency_ms']:.2f}" for side in ("before", "after")))
    table.add_row("bytes of weights", *(f"{size:,}" for size in record["bytes"]))
    training = record["training"]
    how = (
        "exact"
        if training is None
        else f"trained on for {training['steps']} steps, loss {training['loss_first']:.3g} to {training['loss_last']:.3g}"
    )
    end = f"{how}; the largest error of the output is {record['relative_error']:.1e} of its largest value; {record['out']}"
    return Group(*(Text(line) for line in said), Text(), table, Text(), Text(end))
