"""The progress of a training, with the time left; silent where nobody looks at a terminal."""

from __future__ import annotations

from typing import Any

from .clock import Clock

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """A line on stderr that shows steps, epoch, loss and the time left.

    Args:
        clock: of the training.
        silent: show nothing; it also shows nothing where stderr is not a terminal.
    """

    def __init__(self, clock: Clock, *, silent: bool = False):
        self._clock = clock
        self._display: Any = None
        if silent:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left())
        self._display = Progress(*columns, console=console, transient=True)
        self._bar = self._display.add_task("training", total=clock.total, completed=clock.step)
        self._display.start()

    def show(self, loss: float, value: float | None = None) -> None:
        """Move to where the clock stands."""
        if self._display is None:
            return
        clock = self._clock
        text = f"epoch {clock.epoch + (clock.step_in_epoch > 0)}  loss {loss:.4g}"
        text += f"  {value:.4g}" if value is not None else ""
        self._display.update(self._bar, completed=clock.step, description=text)

    def close(self) -> None:
        """Take the line away."""
        if self._display is not None:
            self._display.stop()
