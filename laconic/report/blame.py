"""What `laconic blame` prints: the parameters that cost most, and what their repair costs and gives back."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

__all__ = ["blame_lines"]


def blame_lines(record: Mapping) -> RenderableType:
    """What the whole costs, and a line for each culprit, worst first: names of parameters are too long for a table."""
    span = "" if record["low"] is None else f" (95 %: {record['low']:.2f} to {record['high']:.2f})"
    lines = [
        f"{record['artifact']} against {record['model']}: {record['drop']:.2f} {record['unit']} of {record['metric']}{span}, "
        f"on {record['n']} examples of the {record['split']} split",
        f"{record['distance_is']}: {record['distance']:.3g}, over {record['packed']} packed parameters; the model was "
        f"measured {record['measured']} times",
        *record["notes"],
    ]
    if not record["culprits"]:
        lines.append("no packed parameter was found whose float values bring the outputs nearer to the float model's")
    found = [Text(line) for line in lines]
    for one, sentence in zip(record["culprits"], record["sentences"], strict=True):
        share = Text(f"{100 * one['share']:3.0f} % of the distance at {one['bits']:g} bits: ", style="bold")
        found.append(share + Text(sentence))
    return Group(*found)
