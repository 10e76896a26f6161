"""The claim of `aging_evolution`: 300 cells of NAS-Bench-201, chosen by evolution or at random.

Both arms know the accuracy on CIFAR-10's validation images after 12 epochs of training, and are judged by the accuracy
of their best cell on the test images after 200 epochs. All trainings are looked up: `nb201.npz` beside this file has
both figures, in per cent, of each of the 15,625 cells of 6 edges with one of 5 operations. They are those of
"NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search", Dong and Yang, 2020, arXiv 2001.00326
(MIT), as github.com/hzf1174/RoBoT (Apache-2.0) ships them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from laconic.search import AgingEvolution, Space, study

EVALUATIONS = 300
OPERATIONS = ("none", "skip", "conv 1x1", "conv 3x3", "average pool")
SPACE = Space({f"{a} to {b}": OPERATIONS for b in (1, 2, 3) for a in range(b)})


@functools.cache
def table() -> dict[tuple[int, ...], tuple[float, float]]:
    """Cell -> (validation accuracy after 12 epochs, test accuracy after 200), both as fractions."""
    data = np.load(Path(__file__).with_name("nb201.npz"), allow_pickle=False)
    cells = map(tuple, data["cell"].tolist())
    figures = zip((data["validation"] / 100).tolist(), (data["test"] / 100).tolist(), strict=True)
    return dict(zip(cells, figures, strict=True))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of the cell that one arm likes best; `quick` tests the code and shows nothing."""
    cells, evaluations = table(), 30 if quick else EVALUATIONS
    if arm == "aging":
        strategy = AgingEvolution(SPACE, seed, population=20, tournament=5)
        study(strategy, lambda cell: cells[cell][0], evaluations)
        best = strategy.best()
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = [SPACE.sample(generator) for _ in range(evaluations)]
        best = max(drawn, key=lambda cell: cells[cell][0])
    return cells[best][1]
