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

from laconic.numerics import Scheme, affine, affine_params

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


def official_scales(x: Tensor, scheme: Scheme, name: str = "tensor") -> tuple[Tensor, Tensor | None]:
    """`affine_params`, but with the two cases of IST-DASLab/gptq that the library does not follow.

    - symmetric, no negative weight in the row: the range stays [0, max], so s = max / (2^b - 1) while the zero point
      stays 2^(b-1), and the upper half of the range is clipped;
    - only zeros in the row: the range is [-1, 1].

    Args:
        x: (rows, k), each row with a scale of its own.
        scheme: per row or per tensor.
        name: for messages.
    """
    scale, zero = affine_params(x, scheme, name)
    rows = x.reshape(scale.shape[0], -1).float()
    top, half = scheme.element.levels - 1, scheme.element.levels // 2
    for r, row in enumerate(rows):
        if not bool((row != 0).any()):
            scale[r] = 2 / top
            if zero is not None:
                zero[r] = (1 / scale[r]).round()  # in float32: 3, 7, 127 of 3, 4, 8 bits
        elif scheme.zero == "none" and bool((row >= 0).all()):
            steps = int(affine.MSE_SHRINK * affine.MSE_GRID) if scheme.scale.rule == "mse" else 1
            candidates = torch.tensor([1 - i / affine.MSE_GRID for i in range(steps)]) * row.max() / top
            codes = (row / candidates[:, None]).round().clamp(-half, top - half)
            errors = (candidates[:, None] * codes - row).abs().pow(affine.MSE_NORM).sum(1)
            scale[r] = candidates[errors.argmin()]
    return scale, zero
