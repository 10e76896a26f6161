"""Small tasks `table-NAME`: classification of the rows of a KEEL table.

The tables are CSV files without a header; the last column is the class. Columns of numbers are standardised
by the training rows, other columns become one input for each value that occurs.
"""

from __future__ import annotations

import csv
import difflib
import os
from pathlib import Path

import numpy as np
import torch

from laconic.errors import BadInput

from .base import Baseline, ClassTask, Rows, three_ways
from .networks import mlp
from .sources import locate

__all__ = ["load", "read_table"]

GROUPS = ("balanced", "imbalanced")
SIZE = 4000
# Of table-magic, the table that the test of the baseline trains on; others reach what they reach.
BASELINE = Baseline(epochs=10, lr=3e-3, value=0.84, spread=0.012)


def read_table(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A table as numbers.

    Returns:
        inputs (n, d), which of the d are numbers as they stand in the file (the others are 0 or 1), classes (n,).

    Raises:
        BadInput: a line has another number of fields than the first, or there is no line.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = [[field.strip() for field in line] for line in csv.reader(file) if line]
    if not lines:
        raise BadInput(f"{path} is empty; fetch keel again")
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            raise BadInput(f"{path}:{number} has {len(line)} fields and the first line {len(lines[0])}")
    *columns, answers = (np.array(column) for column in zip(*lines, strict=True))
    inputs, numeric = [], []
    for column in columns:
        try:
            inputs.append(column.astype(np.float64)[:, None])
            numeric.append(True)
        except ValueError:
            values = np.unique(column)
            inputs.append((column[:, None] == values).astype(np.float64))
            numeric += [False] * len(values)
    return np.concatenate(inputs, axis=1), np.array(numeric), np.unique(answers, return_inverse=True)[1]


def load(
    name: str, *, seed: int = 0, size: int | None = None, cache: str | os.PathLike[str] | None = None
) -> ClassTask:
    """The task: rows (inputs, class); trains on 60 % of the table by default, at most 4,000 rows.

    Raises:
        BadInput: there is no such table.
    """
    folder, table = locate("keel", name, cache), name.removeprefix("table-")
    paths = {path.stem: path for group in GROUPS for path in sorted((folder / group / "raw").glob("*.dat"))}
    if table not in paths:
        near = ", ".join(f"table-{other}" for other in difflib.get_close_matches(table, paths, n=3, cutoff=0.4))
        raise BadInput(f"KEEL has no table {table!r}" + (f"; the nearest are {near}" if near else ""))
    inputs, numeric, labels = read_table(paths[table])
    splits = three_ways(name, labels, min(SIZE, int(0.6 * len(labels))) if size is None else size, seed)
    known = inputs[splits["train"]]
    mean = np.where(numeric, known.mean(0), 0.0)
    deviation = np.where(numeric, known.std(0), 1.0)
    deviation[deviation == 0] = 1.0  # a constant column says nothing; it becomes zeros
    values = torch.from_numpy(((inputs - mean) / deviation).astype(np.float32))
    classes = torch.from_numpy(labels.astype(np.int64))
    data = {split: Rows(values[i], classes[i]) for split, i in splits.items()}
    width, count = values.shape[1], int(labels.max()) + 1
    return ClassTask(name, data, lambda: mlp(width, (64, 64), count), BASELINE, seed)
