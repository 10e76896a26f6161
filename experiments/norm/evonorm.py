"""The claim of `evonorm`: a small convolutional network, four images to a batch, batch norm and ReLU or EvoNorm S0.

Both arms are trained by SGD with momentum on the same images in the same order.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.norm import EvoNorm2d
from laconic.tasks.small import small

BATCH, GROUPS = 4, 4
LR, MOMENTUM = 0.01, 0.9


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test images after one pass over 2,000."""
    task = small("mnist-cnn", seed=seed, size=100 if quick else 2000)
    task.batch_size = BATCH
    model = task.model(seed)
    if arm == "evonorm_s0":
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(path, EvoNorm2d(module.num_features, "S0", groups=GROUPS))
            elif isinstance(module, nn.ReLU):  # the activation is in the norm
                model.set_submodule(path, nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    task.train(model, seed, optimizer=optimizer, epochs=1)
    return task.evaluate(model).value
