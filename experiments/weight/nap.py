"""The claim of `nap`: learning new random labels for the same digits, task after task.

Both arms are a perceptron with a norm before each activation, and keep Adam's state from task to task; they differ in
the projection alone. Nothing carries over from one task to the next, so what is measured is whether the network can
still learn.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.core.constraint import Constrain
from laconic.core.hooks import Hook
from laconic.tasks.small import Rows, small
from laconic.weight import NormProjection, insert_prenorm

ROWS, CLASSES, BATCH = 500, 10, 64
TASKS, STEPS, LAST = 15, 200, 5
WIDTHS = (64, 128, 128, CLASSES)
LR = 3e-3


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean training accuracy at the end of each of the last tasks."""
    task = small("digits", seed=seed, size=ROWS)
    task.batch_size = BATCH
    images = task.train_data().columns[0]
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    hooks: list[Hook] = []
    if arm == "norms_and_projection":
        rule = NormProjection.of(model)
        held = {id(p) for p in rule.parameters}
        hooks = [Constrain(rule, lambda name, p: id(p) in held)]
    accuracies = []
    for number in range(2 if quick else TASKS):
        labels = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1000 * seed + number))
        task.data["train"] = Rows(images, labels)
        task.train(model, seed + number, optimizer=optimizer, steps=10 if quick else STEPS, hooks=hooks)
        accuracies.append(task.evaluate(model, "train").value)
    return sum(accuracies[-LAST:]) / len(accuracies[-LAST:])


def network(seed: int) -> nn.Sequential:
    """A perceptron with norms, its weights drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(WIDTHS, WIDTHS[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
    insert_prenorm(model)
    return model
