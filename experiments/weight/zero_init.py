"""The claim of `zero_init`: the rank of what a wide layer learns behind one that widens.

Both arms train a perceptron 64-64-256-256-10 without biases from weights that hold no random numbers. They differ in
the layer from 64 to 256 alone: its weight is a partial identity, or a block of a Hadamard matrix.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.tasks.small import small
from laconic.weight import zero_init_

WIDTHS = (64, 64, 256, 256, 10)
LR, STEPS = 0.1, 1000
ZERO = 1e-4  # singular values up to this are none


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Rank of W - I for the weight W (256, 256) after training; it starts at I, with rank 0."""
    task = small("digits", seed=seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    model = zero_init_(nn.Sequential(*layers[:-1]))
    if arm == "partial_identity":
        nn.init.eye_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    task.train(model, seed, optimizer=optimizer, steps=20 if quick else STEPS)
    update = model[4].weight.detach() - torch.eye(WIDTHS[2])
    return float((torch.linalg.svdvals(update) > ZERO).sum())
