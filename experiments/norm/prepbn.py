"""The claim of `prepbn`: a small vision transformer on digits, with batch norm from the start and with PRepBN.

Both arms train the same network on the same images in the same order. With the method LayerNorm has faded when 60 %
of the training is over, and evaluation is of batch norms alone, as it is of the baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.surgery import swap
from laconic.norm import AdvanceNorms, RepBN, to_prepbn
from laconic.tasks.small import small
from laconic.tasks.small.networks import Block

SIDE, PATCH, WIDTH, HEADS, LAYERS = 8, 2, 32, 4, 4
EPOCHS, FADED = 12, 0.6


class VisionTransformer(nn.Module):
    """Patches of 2 x 2, pre-norm blocks, the mean over places: (n, 64) -> (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, causal=False) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = pixels.unflatten(1, (SIDE // PATCH, PATCH, SIDE // PATCH, PATCH))
        patches = rows.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patches(patches) + self.places)).mean(1))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=100 if quick else None)
    epochs = 1 if quick else EPOCHS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer()
    hooks = []
    if arm == "batchnorm":
        # RepBN whose identity is 0 and stays so.
        swap(model, nn.LayerNorm, lambda norm: RepBN(*norm.normalized_shape, alpha_init=0.0))
        for module in model.modules():
            if isinstance(module, RepBN):
                module.alpha.requires_grad_(False)
    else:
        steps = epochs * -(-len(task.train_data()) // task.batch_size)
        to_prepbn(model, steps=int(FADED * steps))
        hooks = [AdvanceNorms()]
    task.train(model, seed, epochs=epochs, hooks=hooks)
    return task.evaluate(model).value
