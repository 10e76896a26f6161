"""A small task, networks and hooks that the tests of training share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from laconic.core.fit import TrainTask
from laconic.core.hooks import Hook

ACCURACY = SimpleNamespace(name="accuracy", higher_is_better=True)


class Crash(RuntimeError):
    """The end of a process, as far as the training can see."""


class Points(TrainTask):
    """Which side of a plane a point of R^6 is on. Fails at the n-th call of `loss`, if one is given."""

    id = "points"
    metric = ACCURACY
    batch_size = 8

    def __init__(self, count: int = 97, fail_at: int = 0):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = (self.x[:, 0] + self.x[:, 1] > 0).long()
        self.fail_at, self.calls = fail_at, 0

    def train_data(self):
        return TensorDataset(self.x, self.y)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(self, model, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise Crash
        x, y = batch
        return functional.cross_entropy(model(x), y)

    def evaluate(self, model, split="test"):
        return (model(self.x).argmax(-1) == self.y).double().mean().item()


class NoisyPoints(Points):
    """Its examples are disturbed anew each time, by the generators of torch, NumPy and Python."""

    id = "noisy-points"

    def train_data(self):
        return NoisyData(self.x, self.y)


class NoisyData(torch.utils.data.Dataset):
    """Asked for lists of indices, as many data sets are."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitems__(self, indices):
        import random

        import numpy as np

        noise = [torch.randn(6) + float(np.random.randn()) + random.random() for _ in indices]
        return [(self.x[i] + 0.1 * n, self.y[i]) for i, n in zip(indices, noise, strict=True)]


class Average(Hook):
    """A running average of the weights, and noise: on the examples, each process its own, and on the gradient."""

    def start(self, run):
        self.mean = [p.detach().clone() for p in run.model.parameters()]
        self.seen = {}

    def batch(self, run, batch):
        return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]

    def gradients(self, run):
        generator = run.generator()
        for p in run.model.parameters():
            p.grad += 1e-3 * torch.randn(p.shape, generator=generator)

    def step(self, run):
        torch._foreach_lerp_(self.mean, [p.detach() for p in run.model.parameters()], 0.1)
        self.seen[run.clock.step] = run.loss
        run.log(distance=self.mean[0].norm().item())

    def state_dict(self):
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state):
        self.mean, self.seen = state["mean"], state["seen"]


def weights(model: nn.Module) -> torch.Tensor:
    """All parameters and buffers as one vector."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])
