"""The claim of `bcn`: a small convolutional network, two images to a batch, weights standardized in both arms.

Both arms are trained by SGD with momentum on the same images in the same order.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.core.surgery import swap
from laconic.norm import BatchChannelNorm
from laconic.tasks.small import small
from laconic.weight import standardize_

BATCH, GROUPS, RATE = 2, 4, 0.01
LR, MOMENTUM = 0.01, 0.9


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test images after one pass over 800; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=20 if quick else 800)
    task.batch_size = BATCH
    model = task.model(seed)
    if arm == "bcn":
        swap(model, nn.BatchNorm2d, lambda old: BatchChannelNorm(old.num_features, GROUPS, estimate=True, rate=RATE))
    else:
        swap(model, nn.BatchNorm2d, lambda old: nn.GroupNorm(GROUPS, old.num_features))
    standardize_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    task.train(model, seed, optimizer=optimizer, epochs=1)
    return task.evaluate(model).value
