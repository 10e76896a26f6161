"""The claim of `snn`: a plain perceptron of 32 layers on digits, with SELU or with ReLU.

Both arms have the same widths, standardised pixels, no norms and no dropout, and are trained by SGD with momentum at
the same rate; ReLU starts from the weights that He et al. (2015) made for it. A network whose loss becomes no number
has learned nothing: it counts as a guess among the ten digits.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.core.fit import NotFinite
from laconic.norm import lecun_normal_, to_self_normalizing
from laconic.tasks.small import Rows, small

DEPTH, WIDTH = 32, 64
LR, MOMENTUM, EPOCHS = 0.01, 0.9, 12
GUESS = 1 / 10


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test digits."""
    task = small("digits", seed=seed)
    pixels = task.data["train"].columns[0]
    mean, deviation = pixels.mean(0), pixels.std(0).clamp_min(0.05)  # some pixels are always blank
    for split, rows in task.data.items():
        task.data[split] = Rows((rows.columns[0] - mean) / deviation, rows.columns[1])
    widths = [64] + [WIDTH] * (DEPTH - 1)
    layers = [part for a in widths[:-1] for part in (nn.Linear(a, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    generator = torch.Generator().manual_seed(seed)
    if arm == "selu":
        to_self_normalizing(model, generator=generator)
    else:
        lecun_normal_(model, generator)
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(2**0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    try:
        task.train(model, seed, optimizer=optimizer, epochs=1 if quick else EPOCHS)
    except NotFinite:
        return GUESS
    return task.evaluate(model).value
