"""The claim of `muon`: bits per character after 200 steps of AdamW, and after 160 of Muon.

Both arms train the baseline network of `chars` from the same weights on the same batches, with the baseline's weight
decay. AdamW has the baseline's learning rate, for all parameters in one arm and for embeddings, norms, biases and the
output layer in the other. Muon's own is its published default, and is not tuned.
"""

from __future__ import annotations

import torch

from laconic.optim import Muon, muon_groups
from laconic.tasks.small import small

STEPS, SHARE = 200, 0.8
MUON_LR = 0.02


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=100 if quick else 3200)
    model, recipe = task.model(seed), task.baseline
    steps = 5 if quick else STEPS
    if arm == "muon":
        steps = round(SHARE * steps)
        groups = muon_groups(model, adam=["head.*"], lr=MUON_LR, adam_lr=recipe.lr)
        # On a CPU bfloat16 saves nothing; betas and eps are those of the other arm's AdamW.
        optimizer: torch.optim.Optimizer = Muon(
            groups, weight_decay=recipe.decay, precision="float32", betas=(0.9, 0.999), adam_eps=1e-8
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
    task.train(model, seed, optimizer=optimizer, steps=steps)
    return task.evaluate(model).value
