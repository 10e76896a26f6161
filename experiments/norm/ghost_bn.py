"""The claim of `ghost_bn`: a small convolutional network at a large batch, with batch norm and with ghosts of it.

Both arms are trained by SGD at the learning rate that `large_batch_regime` gives, on the same images in the same order.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.core.surgery import swap
from laconic.norm import GhostBatchNorm2d, Regime, large_batch_regime
from laconic.tasks.small import small

BATCH, GHOST = 256, 32
SMALL, MOMENTUM, CLIP = Regime(lr=0.02, epochs=6), 0.9, 5.0


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test images of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=256 if quick else 1024)
    task.batch_size = BATCH
    model = task.model(seed)
    if arm == "ghost_batchnorm":
        swap(model, nn.BatchNorm2d, lambda norm: GhostBatchNorm2d(norm.num_features, GHOST))
    regime = large_batch_regime(SMALL, BATCH, GHOST, epochs=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=regime.lr, momentum=MOMENTUM)
    task.train(model, seed, optimizer=optimizer, epochs=1 if quick else regime.epochs, clip=CLIP)
    return task.evaluate(model).value
