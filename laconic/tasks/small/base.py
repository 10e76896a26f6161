"""What every small task has: rows in memory, a seeded baseline network, a loss, a measure, a stated baseline."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.fit import Fitted, TrainTask, fit
from laconic.core.modes import evaluating
from laconic.errors import BadInput

from ..base import disjoint
from ..metrics import ACCURACY, Evaluation, Metric

__all__ = ["SPLITS", "Baseline", "ClassTask", "Rows", "SmallTask", "draw", "three_ways"]

SPLITS = ("train", "validate", "test")
EVALUATION_BATCH = 256


class Rows:
    """Examples as tensors that share their first dimension; an index gives one row, or a batch of them.

    Args:
        columns: each (n, ...).
    """

    deterministic = True  # nothing is drawn when a row is read, so the loader need not seed for it

    def __init__(self, *columns: Tensor):
        if not columns or len({len(column) for column in columns}) != 1:
            raise ValueError(f"columns of one length are wanted, not of {[len(column) for column in columns]}")
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.columns)


@dataclass(frozen=True)
class Baseline:
    """How the baseline network is trained, and what it then scores.

    Training is AdamW at a constant learning rate, every epoch in a new order.

    Attributes:
        epochs: passes over the training rows of the default size.
        lr: learning rate.
        value: the metric on the test rows, the mean over seeds 0 to 4.
        spread: no seed among them was farther from it than this.
        decay: weight decay.
    """

    epochs: int
    lr: float
    value: float
    spread: float
    decay: float = 0.01


class SmallTask(TrainTask):
    """A task small enough to train many times.

    Attributes:
        id: the name it is loaded by.
        metric: what `evaluate` measures.
        batch_size: rows of a training step.
        baseline: how its network is trained and what it reaches.
        seed: of the rows that were drawn.
        data: the rows of each of `SPLITS`.
    """

    metric: Metric

    def __init__(self, id: str, data: dict[str, Rows], baseline: Baseline, seed: int = 0, batch_size: int = 32):
        self.id, self.data, self.baseline, self.seed, self.batch_size = id, data, baseline, seed, batch_size

    def train_data(self) -> Rows:
        """The rows to train on."""
        return self.data["train"]

    @abstractmethod
    def build(self) -> nn.Module:
        """The baseline network, from whatever state the random generator is in."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The scalar to minimise on a batch of rows."""

    @abstractmethod
    def measure(self, model: nn.Module, rows: Rows) -> Evaluation:
        """Score a model, already in eval mode and without gradients."""

    def model(self, seed: int) -> nn.Module:
        """The baseline network with weights drawn by `seed`; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def train(
        self, model: nn.Module, seed: int, *, optimizer: Any = None, epochs: int | None = None, **options: Any
    ) -> Fitted:
        """Train a model, in place, as the baseline is trained but for what is given.

        Args:
            model: the baseline network or another.
            seed: of the order of the rows and of what draws during training.
            optimizer: as `laconic.core.fit.fit` takes it; the baseline's AdamW by default.
            epochs: passes over the rows; the baseline's by default.
            options: further arguments of `fit`.
        """
        recipe = self.baseline
        if optimizer is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
        options = {"quiet": True, **options}
        if "steps" not in options:
            options["epochs"] = recipe.epochs if epochs is None else epochs
        return fit(model, self, optimizer, seed=seed, **options)

    def evaluate(self, model: nn.Module, split: str = "test") -> Evaluation:
        """Score a model on a split; its training flags are put back afterwards.

        Raises:
            BadInput: there is no such split.
        """
        if split not in self.data:
            raise BadInput(f"the small task {self.id} has no {split!r} split; it has {', '.join(self.data)}")
        with evaluating(model), torch.no_grad():
            return self.measure(model, self.data[split])


class ClassTask(SmallTask):
    """Rows (input, class): cross-entropy to train, accuracy to measure.

    Args:
        network: builds the baseline network; its output is logits (n, classes).
    """

    metric = ACCURACY

    def __init__(
        self,
        id: str,
        data: dict[str, Rows],
        network: Callable[[], nn.Module],
        baseline: Baseline,
        seed: int = 0,
        batch_size: int = 32,
    ):
        super().__init__(id, data, baseline, seed, batch_size)
        self._network = network

    def build(self) -> nn.Module:
        return self._network()

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, classes = batch
        return F.cross_entropy(model(inputs), classes)

    def measure(self, model: nn.Module, rows: Rows) -> Evaluation:
        """Accuracy; the mean cross-entropy stands in `also`."""
        logits, classes = outputs(model, rows), rows.columns[1]
        answers = torch.nan_to_num(logits, nan=-torch.inf).argmax(1)
        hits = (answers == classes).double().numpy()
        also = {"cross-entropy": F.cross_entropy(logits, classes).item()}
        return Evaluation(self.metric.value(hits), hits, also, answers.tolist())


def outputs(model: nn.Module, rows: Rows) -> Tensor:
    """The model's outputs for the first column, on the CPU in float32."""
    held = next(chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if held is None else held.device
    parts = [model(part.to(device)).float().cpu() for part in rows.columns[0].split(EVALUATION_BATCH)]
    return torch.cat(parts)


def draw(name: str, labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Indices of disjoint splits, the classes in equal shares as far as they go.

    Args:
        name: of the task, for the message.
        labels: (n,) classes.
        sizes: examples of each split.
        seed: of the shuffle.

    Raises:
        BadInput: there are not so many examples, or a split has fewer than one of each class.
    """
    if sum(sizes.values()) > len(labels):
        spare = len(labels) - sum(count for split, count in sizes.items() if split != "train")
        raise BadInput(f"the small task {name} has {spare:,} training examples to draw from, not {sizes['train']:,}")
    classes = len(np.unique(labels))
    if sizes["train"] < classes:
        raise BadInput(f"the small task {name} has {classes} classes: a size of {sizes['train']} is too small")
    return disjoint(len(labels), sizes, seed, labels)


def three_ways(name: str, labels: np.ndarray, size: int | None, seed: int) -> dict[str, np.ndarray]:
    """Split data that comes unsplit: 15 % validate, 25 % test, the other 60 %, or `size` of them, train."""
    held = {"test": len(labels) // 4, "validate": 3 * len(labels) // 20}
    train = len(labels) - sum(held.values()) if size is None else size
    return draw(name, labels, held | {"train": train}, seed)
