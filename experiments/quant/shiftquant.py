"""The claim of `shiftquant`: a perceptron on digits that is trained in integers of 4 bits from its first step.

First and last layers have 8 bits, as is usual. The arms differ in the powers of two that a channel of a gradient may be scaled
by: none but 1, or four.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.quant import to_integer_
from laconic.tasks.small import small

BITS, HIDDEN = (4, 4, 4), (64, 64, 64)
GROUPS = {"one_scale": 1, "shiftquant": 4}


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=100 if quick else None)
    widths = (64, *HIDDEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [part for a, b in zip(widths, HIDDEN, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(HIDDEN[-1], 10))
    to_integer_(model, BITS, GROUPS[arm])
    task.train(model, seed, epochs=1 if quick else None)
    return task.evaluate(model).value
