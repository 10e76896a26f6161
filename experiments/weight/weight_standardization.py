"""The claim of `weight_standardization`: a small convolutional network with GroupNorm, two images to a batch.

Both arms have the baseline network of the task with GroupNorm in place of batch normalization, and are trained by
SGD with momentum on the same images in the same order.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.tasks.small import small
from laconic.weight import standardize_

BATCH, GROUPS = 2, 4
LR, MOMENTUM = 0.01, 0.9


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test images after one pass over 2,000."""
    task = small("mnist-cnn", seed=seed, size=100 if quick else 2000)
    task.batch_size = BATCH
    model = task.model(seed)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.GroupNorm(GROUPS, module.num_features))
    if arm == "groupnorm_and_standardization":
        standardize_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    task.train(model, seed, optimizer=optimizer, epochs=1)
    return task.evaluate(model).value
