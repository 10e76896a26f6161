"""A module path in a terminal, broken after its dots and not within a name."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

__all__ = ["Path"]


class Path:
    """A dotted path that takes as many lines as it needs; a name longer than the column is cut.

    Args:
        dotted: the path, such as `encoder.layer.0.attention.self.query`.
    """

    def __init__(self, dotted: str) -> None:
        self.dotted = dotted

    def lines(self, width: int) -> list[str]:
        """The path in lines of at most `width` characters, if its names allow that."""
        *front, last = self.dotted.split(".")
        found = [""]
        for part in [f"{name}." for name in front] + [last]:
            if found[-1] and len(found[-1]) + len(part) > width:
                found.append("")
            found[-1] += part
        return found

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(len(part) for part in self.dotted.split(".")) + 1
        return Measurement(longest, len(self.dotted)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines(options.max_width):
            yield Text(line, no_wrap=True, overflow="ellipsis")
