"""The claim of `bn_only`: what the norms of a random residual network can learn, and what as many random weights can.

Both arms have the same residual network of 14 layers, random but for gammas from U(0, 1), and freeze all but what the
arm names, the output layer included. SGD with momentum, rate and weight decay are those of the paper.
"""

from __future__ import annotations

import torch

from laconic.norm import init_gamma_, train_only, train_random_weights
from laconic.tasks.small import small
from laconic.zoo import ResNetCifar, ResNetCifarConfig

CONFIG = ResNetCifarConfig(depth=14, widths=(8, 16, 32), channels=1)
BATCH, EPOCHS = 64, 20  # after two, neither arm does better than a guess
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test images after twenty passes over 2,000."""
    task = small("mnist-cnn", seed=seed, size=128 if quick else 2000)
    task.batch_size = BATCH
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = init_gamma_(ResNetCifar(CONFIG), generator=generator)
    trained = train_only(model) if arm == "norms" else train_random_weights(model, generator=generator)
    optimizer = torch.optim.SGD(trained, LR, momentum=MOMENTUM, weight_decay=DECAY)
    task.train(model, seed, optimizer=optimizer, epochs=1 if quick else EPOCHS)
    return task.evaluate(model).value
