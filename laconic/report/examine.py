"""What `laconic examine` prints: each thing that was looked for in calibration data, and what was found."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

__all__ = ["examine_lines"]

TONES = {"fine": "green", "warning": "bold yellow", "skipped": "dim"}


def examine_lines(record: Mapping) -> RenderableType:
    """A line for each check, under what was examined."""
    head = f"{record['task']} for {record['model']}: {record['examples']:,} examples to calibrate on"
    lines = [Text(head, style="bold"), *(Text(note) for note in record["notes"])]
    for one in record["checks"]:
        lines.append(Text.assemble((f"{one['state']:<8}", TONES[one["state"]]), f"{one['check']}: {one['sentence']}"))
    return Group(*lines)
