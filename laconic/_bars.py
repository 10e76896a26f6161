"""Progress on a terminal: one bar a stage, with the time left, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

__all__ = ["bars"]


@contextmanager
def bars(silent: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function that shows (stage, done, total) as bars while the context lasts; None if nothing is to be shown.

    Nothing is where standard error is no terminal: a file would get an empty line.
    """
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        shown: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = display.add_task(stage, total=total)
            display.update(shown[stage], completed=done, total=total)

        yield show
