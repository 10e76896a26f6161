"""Where a training's metrics go: rows of a CSV file, scalars of TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from laconic.errors import BadInput

from .checkpoint import write_whole

__all__ = ["CsvLog", "MetricsLog", "TensorBoardLog", "open_logs"]


class MetricsLog(Protocol):
    """Takes a row of metrics at a step."""

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; it has a `step`."""

    def close(self) -> None:
        """Nothing more comes."""


class CsvLog:
    """One row a line, columns as they first occur; rows after `last_step` are of a run that was cut off, and go.

    Args:
        path: the file.
        last_step: the step that is resumed from; 0 starts a new file.
    """

    def __init__(self, path: Path, last_step: int = 0):
        self.path = path
        self.columns: list[str] = []
        rows: list[dict[str, str]] = []
        if last_step and path.exists():
            # A line that was cut off by the end of the process is of a step that comes again.
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if _number(row.get("step")) <= last_step]
                self.columns = list(reader.fieldnames or ())
        self._replace(rows)

    def write(self, row: Mapping[str, float]) -> None:
        if not set(row) <= set(self.columns):
            rows = self._rows() if self.columns else []
            self.columns += [name for name in row if name not in self.columns]
            self._replace(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(dict(row))

    def close(self) -> None:
        """Every row is on disk already."""

    def _rows(self) -> list[dict[str, str]]:
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _replace(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
        if self.columns:
            writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue().encode())


class TensorBoardLog:
    """Scalars under the columns' names; what an earlier run wrote after `last_step` is hidden.

    Raises:
        BadInput: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, last_step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput("log='tensorboard' needs TensorBoard: pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else None)

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


def open_logs(names: tuple[str, ...], out: Path, last_step: int) -> list[MetricsLog]:
    """The logs by name, in the run's folder.

    Raises:
        BadInput: a name is not known.
    """
    logs: list[MetricsLog] = []
    for name in names:
        if name == "csv":
            logs.append(CsvLog(out / "metrics.csv", last_step))
        elif name == "tensorboard":
            logs.append(TensorBoardLog(out / "tensorboard", last_step))
        else:
            raise BadInput(f"log={name!r} is not known; there are 'csv' and 'tensorboard'")
    return logs


def _number(text: str | None) -> float:
    """A step read from a file; a torn one counts as later than any."""
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")
