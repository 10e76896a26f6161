"""The claim of `hessian_interlayer`: a perceptron of eight layers on digits, bisected from 8 to 4 to 3 to 2 bits.

Both arms train the same network and keep 99 % of its accuracy on the validation rows, by bisection along an order of
layers: one that is drawn, or the probe's on 256 training rows.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.quant import InterlayerSensitivity, bisect_bits
from laconic.quant._rounded import rounded, scheme_of, weights_of
from laconic.tasks.small import small
from laconic.tasks.small.networks import mlp

BITS, ROWS, TOLERANCE = (8, 4, 3, 2), 256, 0.99
HIDDEN = (96, 64, 64, 48, 48, 32, 32)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean bits of a weight that one arm reaches; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed)
    torch.manual_seed(seed)
    model: nn.Module = mlp(64, HIDDEN, 10)
    task.train(model, seed, epochs=1 if quick else 30)
    model.eval()
    weights = weights_of(model)
    if arm == "augmented":
        rows = task.data["train"][slice(0, ROWS)]
        order = InterlayerSensitivity(3, samples=2 if quick else 32, seed=seed)(model, rows).order()
    else:
        names = list(weights)
        order = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]

    def accuracy(bits: dict[str, int]) -> float:
        with rounded(weights, {name: scheme_of(b) for name, b in bits.items()}):
            return task.evaluate(model, "validate").value

    found = bisect_bits(order, BITS, accuracy, TOLERANCE, baseline=task.evaluate(model, "validate").value)
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    return sum(found.bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
