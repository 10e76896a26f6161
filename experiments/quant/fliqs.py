"""The claim of `fliqs`: a convolutional network of five layers on digits, in 4 bits everywhere or in formats searched.

Both arms train the same network as long, weights and inputs rounded at every step. The arm "fliqs" may give each layer 2,
4 or 8 bits, with the memory of 4 bits as its target; what is tested is its most likely network that keeps the target.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.quant import Fliqs, FliqsPolicy, Switched
from laconic.tasks.small import small

OPTIONS, STEPS, DELAY, WIDTH = (2, 4, 8), 900, 150, 16


def network() -> nn.Module:
    """Digits as (n, 64) -> logits (n, 10)."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for a, b in ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 2 * WIDTH)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        if a != b and a > 1:
            layers.insert(-3, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDTH, 10))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed)
    torch.manual_seed(seed)
    model = network()
    steps, delay = (12, 4) if quick else (STEPS, DELAY)
    switched = Switched(model, OPTIONS)
    uniform = tuple(OPTIONS.index(4) for _ in switched.sizes)
    target = switched.cost(uniform)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chosen = uniform
    switched.set(uniform)
    if arm == "fliqs":
        policy = FliqsPolicy(switched, seed, total=steps, delay=delay, lr=0.02)
        task.train(model, seed, optimizer=optimizer, steps=steps, hooks=[Fliqs(switched, policy, target=target)])
        chosen = policy.choice(switched.table(), target)
    else:
        task.train(model, seed, optimizer=optimizer, steps=steps)
    switched.set(chosen)
    return task.evaluate(model).value
