"""The claim of `mesa`: the gradient of a character model whose saved activations are in 4 bits.

A model is trained for a while without loss; then its gradient on further batches is taken exactly and from packed activations,
whose ranges have settled over some batches. The arms differ in the groups that have ranges of their own: tensors, or heads
and 32 groups of channels.
"""

from __future__ import annotations

import math

import torch

from laconic.quant import SavedTensorQuant
from laconic.tasks.small import small

WINDOWS, BITS, SETTLE, BATCHES, ROWS = 2000, 4, 20, 20, 16
GROUPS = {"layer_wise": 1, "group_wise": 32}


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean signal to noise of one arm from one seed, in dB; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    rows = task.train_data()
    saved = SavedTensorQuant(model, BITS, GROUPS[arm], seed=seed)
    generator, found = torch.Generator().manual_seed(seed), []
    for step in range(2 if quick else SETTLE + BATCHES):
        batch = rows[torch.randperm(len(rows), generator=generator)[:ROWS]]
        with saved:
            loss = task.loss(model, batch)
        got = _gradient(model, loss)
        want = _gradient(model, task.loss(model, batch))
        if quick or step >= SETTLE:
            found.append(20 * math.log10(float(want.norm() / (got - want).norm())))
    return sum(found) / len(found)


def _gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
