"""The claim of `l1_norm`: batch norms in 4 bits, by the mean magnitude or by the root of the mean square.

Both arms have the baseline network of the task and its training; both norms round what they read, their statistic,
their gain and their gradient to 15 levels over the range of each tensor, with the same code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.statistics import RunningStat, moments
from laconic.norm import L1BatchNorm2d
from laconic.tasks.small import small

LARGEST = 7  # of the whole numbers of 4 bits, with a sign


def four_bits(x: Tensor) -> Tensor:
    """The nearest of -7 to 7 times the largest magnitude over 7."""
    step = x.abs().amax() / LARGEST
    return torch.where(step > 0, torch.round(x / step) * step, x)


class L2BatchNorm2d(L1BatchNorm2d):
    """The same layer with the deviation in place of the mean magnitude."""

    def _of_batch(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        mean, spread = moments(x, dims)
        assert mean is not None
        deviation = (spread + self.eps).sqrt()
        running = (self.running_mean, self.running_magnitude)
        RunningStat(self.momentum).update(running, (mean, deviation), self.num_batches_tracked)
        return mean, deviation


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test images after one pass over 2,000."""
    task = small("mnist-cnn", seed=seed, size=100 if quick else 2000)
    model = task.model(seed)
    make = L1BatchNorm2d if arm == "l1_norm" else L2BatchNorm2d
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, make(module.num_features, quantizer=four_bits))
    task.train(model, seed, epochs=1)
    return task.evaluate(model).value
