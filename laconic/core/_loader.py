"""The order of training data, a function of (seed, epoch) alone, and its cutting into steps, micro-batches and shares.

A micro-batch is `batch_size` examples over all processes together, a step is `accumulate` micro-batches. Each process
takes an equal run of every micro-batch, so the examples of a step do not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from laconic.errors import BadInput

from ._random import derived_seed, seeded_on_cpu

__all__ = ["Loader", "StepData", "epoch_order"]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` examples that an epoch goes through."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, epoch)))


@dataclass
class StepData:
    """What one process computes for one optimizer step.

    Attributes:
        batches: its share of each micro-batch.
        weights: the share of the step's examples that each of them holds; they add up to 1 over all processes.
        examples: of the step, over all processes.
    """

    batches: list[Any]
    weights: list[float]
    examples: int


@dataclass
class _Share:
    indices: Tensor
    seed: int  # of the generators while the examples are fetched
    weight: float
    examples: int
    last: bool  # of its step


class Loader:
    """Walks through a data set, epoch after epoch, from any step on.

    Random transforms inside the data set draw from generators that are seeded anew for every micro-batch, so what they
    give is known from (seed, epoch, position), with any number of workers and after a resume. A data set that draws
    nothing may say so by an attribute `deterministic = True`, and is spared the seeding.

    Args:
        data: has a length; `data[indices]` (a tensor of int64) or `data.__getitems__(list)` gives a batch.
        batch_size: examples to a micro-batch, over all processes.
        accumulate: micro-batches to a step.
        seed: of the order.
        rank: of this process.
        world: number of processes.
        drop_last: leave out the micro-batch at an epoch's end that is not full.
        workers: processes that fetch ahead; 0 fetches in this one.

    Raises:
        BadInput: there is nothing to train on, or a count is below 1.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        workers: int = 0,
    ):
        if not isinstance(data, Sized):
            raise BadInput(f"the training data ({type(data).__name__}) has no length; give a map-style data set")
        if batch_size < 1 or accumulate < 1 or workers < 0:
            raise BadInput(
                f"batch_size={batch_size}, accumulate={accumulate}, workers={workers}: 1 or more (workers 0)"
            )
        count = len(data)
        self.micro_batches = count // batch_size if drop_last else -(-count // batch_size)
        if not self.micro_batches:
            raise BadInput(f"there is nothing to train on: {count} examples, batch_size={batch_size}, {drop_last=}")
        self.count, self.batch_size, self.accumulate = count, batch_size, accumulate
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.steps_per_epoch = -(-self.micro_batches // accumulate)
        self._data = data

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepData]:
        """The steps of an epoch, from one on; whatever fetches them is started by the call."""
        shares = self._shares(epoch, first_step)
        return self._steps(shares, self._fetched(shares))

    def sample(self, count: int = 8) -> Any:
        """The first examples, fetched under a fixed seed: what tells one data set from another."""
        indices = torch.arange(min(count, self.count))
        return _Fetch(self._data, [_Share(indices, 0, 1.0, len(indices), True)])[0]

    @staticmethod
    def _steps(shares: list[_Share], fetched: Iterator[Any]) -> Iterator[StepData]:
        """Put micro-batches together to steps."""
        step = StepData([], [], 0)
        for share, batch in zip(shares, fetched, strict=True):
            step.batches.append(batch)
            step.weights.append(share.weight)
            if share.last:
                step.examples = share.examples
                yield step
                step = StepData([], [], 0)

    def _shares(self, epoch: int, first_step: int) -> list[_Share]:
        """This process's part of every micro-batch of an epoch."""
        order = epoch_order(self.count, self.seed, epoch)
        shares = []
        for step in range(first_step, self.steps_per_epoch):
            numbers = range(step * self.accumulate, min((step + 1) * self.accumulate, self.micro_batches))
            start, stop = numbers[0] * self.batch_size, min((numbers[-1] + 1) * self.batch_size, self.count)
            for number in numbers:
                first = number * self.batch_size
                whole = order[first : min(first + self.batch_size, stop)]
                mine = whole.tensor_split(self.world)[self.rank]
                weight = len(mine) / (stop - start)
                # With fewer examples than processes some have none. They must still take part in the exchange of
                # gradients, so they compute an example that counts for nothing.
                mine = mine if len(mine) else whole[:1]
                seed = derived_seed(self.seed, epoch, number, self.rank)
                shares.append(_Share(mine, seed, weight, stop - start, number == numbers[-1]))
        return shares

    def _fetched(self, shares: list[_Share]) -> Iterator[Any]:
        fetch = _Fetch(self._data, shares)
        if not self.workers:
            return (fetch[position] for position in range(len(shares)))
        # An own generator: without one every iterator draws from the global one, and a resumed run draws once more.
        generator = torch.Generator().manual_seed(self.seed)
        order = range(len(shares))
        return iter(DataLoader(fetch, None, sampler=order, num_workers=self.workers, generator=generator))


class _Fetch(Dataset):
    """Batch by position, each fetched under its own seed."""

    def __init__(self, data: Any, shares: list[_Share]):
        self.data, self.shares = data, shares
        self.deterministic = getattr(data, "deterministic", type(data) is TensorDataset)

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, position: int) -> Any:
        share = self.shares[position]
        if self.deterministic:  # seeding takes longer than fetching rows of a tensor
            return self._fetched(share)
        with seeded_on_cpu(share.seed):
            return self._fetched(share)

    def _fetched(self, share: _Share) -> Any:
        if hasattr(self.data, "__getitems__"):
            return default_collate(self.data.__getitems__(share.indices.tolist()))
        return self.data[share.indices]
