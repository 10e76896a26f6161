"""Recorded vectors: what official implementations computed, with the tolerance that the file itself states.

The folder is `LACONIC_VECTORS` (default `tests/vectors`), so that another set with other shapes and options
drops in.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("LACONIC_VECTORS") or Path(__file__).parents[1] / "vectors")


@dataclass(frozen=True)
class Golden:
    """One file of vectors: `cases` as written, `arrays` by name."""

    cases: list[dict[str, Any]]
    arrays: dict[str, Tensor]
    tolerance: dict[str, Any]

    def case(self, name: str) -> dict[str, Any]:
        """The case of that name."""
        return next(case for case in self.cases if case["name"] == name)

    def of(self, case: dict[str, Any], role: str) -> list[Tensor]:
        """All arrays that play a role in a case; none if the case has no such role."""
        names = case["arrays"].get(role, [])
        return [self.arrays[name] for name in ([names] if isinstance(names, str) else names)]

    def check(self, role: str, got: Tensor, want: Tensor) -> None:
        """Compare within the tolerance that the file gives for this role."""
        tolerance = {**self.tolerance, **self.tolerance.get("except", {}).get(role, {})}
        torch.testing.assert_close(
            got.double(),
            want.double(),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
            msg=lambda m: f"{role}: {m}",
        )


def load(name: str) -> Golden:
    """The vectors `name.json` and `name.npz`."""
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = {key: torch.from_numpy(np.array(stored[key])) for key in stored.files}
    return Golden(about["cases"], arrays, about["tolerance"])
