"""The claim of `rmt_lr`: AdamW at 16 times the batch size that its learning rate was tuned at, scaled by two rules.

Both arms train the baseline network of the digits for the baseline's epochs, from its learning rate and weight decay.
"""

from __future__ import annotations

import torch

from laconic.optim import BatchSizeLR
from laconic.tasks.small import small

TIMES = 16


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=200 if quick else None)
    tuned_at, task.batch_size = task.batch_size, TIMES * task.batch_size
    model, recipe = task.model(seed), task.baseline
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
    schedule = BatchSizeLR(optimizer, task.batch_size, base=tuned_at, rule=arm)
    task.train(model, seed, optimizer=optimizer, schedule=schedule, epochs=2 if quick else None)
    return task.evaluate(model).value
