"""The claim of `residual_expansion`: a residual perceptron of 64 branches without norms, scaled by 1 / sqrt(n) or not.

Both arms start from the same weights (PyTorch's) and are trained by SGD with momentum at the same rate. A network
whose loss becomes no number has learned nothing: it counts as a guess among the ten digits.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.core.fit import NotFinite
from laconic.core.placement import Placement, Residual
from laconic.norm import scale_residuals
from laconic.tasks.small import small

BRANCHES, WIDTH = 64, 32
LR, MOMENTUM, EPOCHS = 0.01, 0.9, 8
GUESS = 1 / 10


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test digits."""
    task = small("digits", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        branches = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(BRANCHES)]
        blocks = [Residual(branch, Placement(), nn.Identity) for branch in branches]
        model = nn.Sequential(nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, 10))
    if arm == "one_over_sqrt_n":
        scale_residuals(model, "1/sqrt(n)")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    try:
        task.train(model, seed, optimizer=optimizer, epochs=1 if quick else EPOCHS)
    except NotFinite:
        return GUESS
    return task.evaluate(model).value
