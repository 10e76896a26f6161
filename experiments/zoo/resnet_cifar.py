"""The claim of `resnet_cifar`: 44 layers on digits of 8 x 8 pixels, with and without shortcuts.

Both arms have the same layers, first weights, norms and training (the paper's: momentum 0.9, learning rate 0.1, weight
decay 1e-4); in the plain one nothing is added to what a block computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.tasks.small import small
from laconic.zoo import Placement, ResNetCifar, ResNetCifarConfig

DEPTH, WIDTHS = 44, (8, 16, 32)


def plain(block: int, blocks: int) -> Placement:
    """The paper's block without its shortcut."""
    return Placement(norm_out=True, skip_scale=0.0)


class OnDigits(nn.Module):
    """Rows of 64 pixels as pictures."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 64) -> (n, 10)."""
        return self.network(pixels.view(-1, 1, 8, 8))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=64 if quick else None)
    placement = {"plain": plain, "residual": "output"}[arm]
    config = ResNetCifarConfig(8 if quick else DEPTH, WIDTHS, channels=1, placement=placement)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OnDigits(ResNetCifar(config))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    task.train(model, seed, optimizer=optimizer, epochs=1 if quick else 8)
    return task.evaluate(model).value
