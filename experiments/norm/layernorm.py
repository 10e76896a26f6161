"""The claim of `layernorm`: how far a GRU over characters has come after some hundred steps, with and without norms.

Both arms have an embedding, one recurrent layer of the same size and a linear layer, and see the same windows of the
book in the same order with the same learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.norm import LayerNormGRU
from laconic.tasks.small import small

WIDTH, STEPS, LR = 64, 300, 4e-3


class Reader(nn.Module):
    """ids (n, t) -> logits (n, t, vocabulary) of what follows each."""

    def __init__(self, vocabulary: int, cell: nn.Module):
        super().__init__()
        self.characters, self.cell, self.head = nn.Embedding(vocabulary, WIDTH), cell, nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.characters(ids))[0])


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character on the test windows."""
    task = small("chars", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = arm == "gru"
        cell = nn.GRU(WIDTH, WIDTH, batch_first=True) if plain else LayerNormGRU(WIDTH, WIDTH, batch_first=True)
        model = Reader(len(task.alphabet) + 1, cell)
    task.train(model, seed, optimizer=torch.optim.Adam(model.parameters(), lr=LR), steps=5 if quick else STEPS)
    return task.evaluate(model).value
