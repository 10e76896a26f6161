"""The claim of `adamp`: how much longer scale-invariant weights get under SGD with momentum and under SGDP.

Both arms train the same perceptron with batch normalization on the digits, from the same weights on the same batches,
with the same learning rate and momentum and no weight decay. The two weight matrices before a normalization are
scale-invariant. The metric is the mean over them of log(|w_end|^2 / |w_0|^2 - 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from laconic.optim import SGDP
from laconic.tasks.small import small

LR, MOMENTUM, STEPS = 0.1, 0.9, 1000


def run(arm: str, seed: int, quick: bool = False) -> float:
    """The growth of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=200 if quick else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    rule = SGDP if arm == "sgdp" else torch.optim.SGD
    optimizer = rule(model.parameters(), lr=LR, momentum=MOMENTUM)
    before = squared_norms(model)
    task.train(model, seed, optimizer=optimizer, steps=20 if quick else STEPS)
    growth = squared_norms(model) / before - 1
    # Exactly orthogonal steps cannot shorten a weight; what rounding does may not become the logarithm of a negative.
    return math.fsum(growth.clamp_min(1e-6).log().tolist()) / len(growth)


def network() -> nn.Sequential:
    """A perceptron whose hidden layers have a batch normalization after each weight."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 64):
        layers += [nn.Linear(inputs, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def squared_norms(model: nn.Sequential) -> Tensor:
    """Of the weights before a normalization: (2,)."""
    pairs = zip(model, model[1:], strict=False)
    norms = [a.weight.detach().double().square().sum() for a, b in pairs if isinstance(b, nn.BatchNorm1d)]
    return torch.stack(norms)
