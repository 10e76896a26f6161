"""The claim of `mrl`: prefixes of an embedding that was trained for them against prefixes of one that was not.

Both arms are the perceptron of `mnist-mlp` with an embedding of 64 dimensions before its classifier, trained by the
baseline's recipe. The plain arm has one classifier on all 64. For each prefix it gets a new one, fitted to the training
data until it converges; the Matryoshka arm uses the classifiers that were trained along with it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.fit import fit
from laconic.embed import MatryoshkaHead, nested_cross_entropy
from laconic.tasks.small import small

WIDTH, DIMS, MEASURED = 64, (4, 8, 16, 32, 64), (4, 8, 16)


class ByPrefixes:
    """The task, with the loss of a network that gives logits for each of its widths."""

    def __init__(self, task):
        self.task = task

    def __getattr__(self, name):
        return getattr(self.task, name)

    def loss(self, model, batch):
        """The sum of the cross-entropies of all widths."""
        x, target = batch
        return nested_cross_entropy(model(x), target)


def network(task, seed: int, dims: tuple[int, ...]) -> nn.Sequential:
    """The perceptron with another end: an embedding of 64, and classifiers on its prefixes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = task.model(seed)[:-1]
        parts = {"trunk": trunk, "embedding": nn.Linear(128, WIDTH), "head": MatryoshkaHead(dims, 10)}
        return nn.Sequential(OrderedDict(parts))


def fitted(z: torch.Tensor, y: torch.Tensor) -> nn.Linear:
    """The linear classifier of embeddings z (N, d) with the least cross-entropy, by L-BFGS."""
    layer = nn.Linear(z.shape[1], 10)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(z), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean test accuracy of the prefixes in `MEASURED`; `quick` tests the code and shows nothing."""
    task = small("mnist-mlp", seed=seed, size=200 if quick else None)
    model = network(task, seed, DIMS if arm == "mrl" else (WIDTH,))
    recipe = task.baseline
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
    fit(model, ByPrefixes(task), optimizer, epochs=1 if quick else recipe.epochs, seed=seed, quiet=True)
    model.eval()
    with torch.no_grad():
        (x, y), (tx, ty) = task.train_data()[:], task.data["test"][:]
        z, tz = model.embedding(model.trunk(x)), model.embedding(model.trunk(tx))
    accuracies = []
    for dim in MEASURED:
        classify = model.head.at(dim) if arm == "mrl" else fitted(z[:, :dim], y)
        with torch.no_grad():
            accuracies.append(float((classify(tz[:, :dim]).argmax(1) == ty).double().mean()))
    return sum(accuracies) / len(accuracies)
