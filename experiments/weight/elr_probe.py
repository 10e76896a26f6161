"""The claim of `elr_probe`: a quarter of the L2, with and without the scale that makes it the same training.

Each run trains a reference, SGD with momentum on a perceptron with batch normalization, and then the arm from the same
start: with a quarter of the L2 and nothing else changed, or with twice the weights and four times the learning rate
besides. All is in float64, with the eps that batch normalization has by default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from laconic.tasks.small import Rows, SmallTask, small
from laconic.weight import rescaled_sgd

LR, DECAY, MOMENTUM = 0.1, 5e-3, 0.9
FACTOR = 2.0
WIDTHS, STEPS = (64, 64, 64), 500


def run(arm: str, seed: int, quick: bool = False) -> float:
    """log10 of the relative distance between the logits of the arm and of the reference, on the test rows."""
    task = small("digits", seed=seed)
    task.data = {split: Rows(rows.columns[0].double(), rows.columns[1]) for split, rows in task.data.items()}
    lr, decay = rescaled_sgd(FACTOR, LR, DECAY)
    arms = {
        "reference": (1.0, LR, DECAY),
        "less_l2": (1.0, LR, decay),
        "less_l2_rescaled": (FACTOR, lr, decay),
    }
    inputs = task.data["test"].columns[0]
    logits = []
    for scale, rate, l2 in (arms["reference"], arms[arm]):
        model = trained(task, seed, scale, rate, l2, 20 if quick else STEPS)
        with torch.no_grad():
            logits.append(model.eval()(inputs))
    return math.log10(distance(*logits))


def trained(task: SmallTask, seed: int, scale: float, lr: float, decay: float, steps: int) -> nn.Module:
    """The network after training; the last layer, which no norm follows, is treated alike in every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(WIDTHS, WIDTHS[1:], strict=False):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=False), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 10)).double()
    scaled = [p for layer in model[:-1] for p in layer.parameters()]
    with torch.no_grad():
        for p in scaled:
            p.mul_(scale)
        for norm in (layer for layer in model if isinstance(layer, nn.BatchNorm1d)):
            norm.running_var.mul_(scale**2)  # where running statistics start from belongs to the same start
    groups = [{"params": scaled, "lr": lr, "weight_decay": decay}, {"params": list(model[-1].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    task.train(model, seed, optimizer=optimizer, steps=steps)
    return model


def distance(reference: Tensor, other: Tensor) -> float:
    """|other - reference| / |reference|, never 0."""
    return max(float((other - reference).norm() / reference.norm()), 1e-16)
