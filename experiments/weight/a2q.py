"""The claim of `a2q`: a perceptron on digits in 4 bits, run with accumulators of 9 bits that wrap around.

Both arms train the same float network, then go on from it for half as long with weights and inputs of 4 bits, whose scales
are learned. The arms differ in the weights: A2Q for 9 bits, or LSQ alone. Both are then run in wrapping integers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.qat import FakeInput, prepare
from laconic.tasks.small import small
from laconic.weight import a2q_penalty, accumulator_aware_, simulated_accumulator

WEIGHT_BITS, INPUT_BITS, ACC_BITS = 4, 4, 9
PENALTY = 1e-3
SCHEME = f"v1/int{WEIGHT_BITS}/channel/float32/minmax/znone/nearest"


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=100 if quick else None)
    model = task.model(seed)
    task.train(model, seed)
    if arm == "a2q":
        accumulator_aware_(model, WEIGHT_BITS, ACC_BITS, INPUT_BITS)
    else:
        prepare(model, SCHEME, inputs=lambda path, module: FakeInput(INPUT_BITS, signed=False), learned=True)
    _tune(task, model, seed, 1 if quick else task.baseline.epochs // 2, penalized=arm == "a2q")
    with simulated_accumulator(model, ACC_BITS):
        return task.evaluate(model).value


def _tune(task, model: nn.Module, seed: int, epochs: int, penalized: bool) -> None:
    optimizer = torch.optim.Adam(model.parameters(), task.baseline.lr / 3)
    rows, generator = task.train_data(), torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(task.batch_size):
            inputs, classes = rows[chosen]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), classes)
            if penalized:
                loss = loss + PENALTY * a2q_penalty(model)
            loss.backward()
            optimizer.step()
