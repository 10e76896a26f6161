"""The claim of `nmc`: nearest means in frozen features against fine-tuning, on classes that come in pairs.

Both arms begin with the same convolutional network of `mnist-cnn`, pretrained on five classes that the seed draws. Then
all ten come in five pairs, in an order that the seed draws too. Fine-tuning trains the whole network on each pair by
the baseline's recipe, and chooses among the classes seen so far; the method keeps the network as it is and takes the
input of its last layer. The metric is the accuracy on the test pictures of all classes seen so far, averaged over the
steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.embed import NearestMean, incremental_accuracies
from laconic.tasks.small import Rows, SmallTask, small
from laconic.tasks.small.base import ClassTask

CLASSES, PAIR = 10, 2


def only(rows: Rows, classes: Tensor) -> Rows:
    """The rows of some classes."""
    x, y = rows[:]
    chosen = torch.isin(y, classes)
    return Rows(x[chosen], y[chosen])


def train_on(task: SmallTask, model: nn.Module, classes: Tensor, seed: int, epochs: int | None) -> None:
    """Train a network by the baseline's recipe on some classes."""
    part = ClassTask(task.id, {"train": only(task.train_data(), classes)}, task.build, task.baseline, seed)
    part.train(model, seed, epochs=epochs)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What a network gives for x, in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(256)])


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Average incremental accuracy of one arm; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=200 if quick else 2000)
    epochs = 1 if quick else None
    generator = torch.Generator().manual_seed(seed)
    known = torch.randperm(CLASSES, generator=generator)[: CLASSES // 2]
    pairs = torch.randperm(CLASSES, generator=generator).split(PAIR)
    model = task.model(seed)
    train_on(task, model, known, seed, epochs)
    train, test = task.train_data(), task.data["test"]
    if arm == "nmc":
        features = model[:-1]
        steps = [
            tuple((outputs(features, part[:][0]), part[:][1]) for part in (only(train, pair), only(test, pair)))
            for pair in pairs
        ]
        accuracies = incremental_accuracies(NearestMean(model[-1].in_features), steps)
    else:
        accuracies = []
        for place, pair in enumerate(pairs):
            train_on(task, model, pair, seed, epochs)
            seen = torch.cat(pairs[: place + 1])
            x, y = only(test, seen)[:]
            answers = seen[outputs(model, x)[:, seen].argmax(1)]
            accuracies.append(float((answers == y).double().mean()))
    return sum(accuracies) / len(accuracies)
