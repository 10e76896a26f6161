"""The claim of `norm_loss`: how far accuracy moves with the strength of the regularization.

Both arms train a perceptron with batch normalization by SGD with momentum, once for each strength. Weight decay gets
twice the strength, so that both pull a long row by 2 lambda w; it is applied to the same weights.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.core.hooks import Hook
from laconic.tasks.small import small
from laconic.weight import NormLoss

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LR, MOMENTUM, HIDDEN = 0.1, 0.9, 64
STEPS = 300


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Best less worst accuracy on the test rows, over the strengths."""
    task = small("digits", seed=seed)
    accuracies = []
    for strength in STRENGTHS[::2] if quick else STRENGTHS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        decay = 2 * strength if arm == "weight_decay" else 0.0
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others}]
        hooks: list[Hook] = [NormLoss(strength)] if arm == "norm_loss" else []
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
        task.train(model, seed, optimizer=optimizer, steps=20 if quick else STEPS, hooks=hooks)
        accuracies.append(task.evaluate(model).value)
    return max(accuracies) - min(accuracies)
