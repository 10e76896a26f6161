"""What every task has: three disjoint splits of data, the output that matters, and a measure of a model."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.core.modes import evaluating
from laconic.core.outputs import main_output
from laconic.errors import BadInput

from .metrics import Evaluation, Metric, pair

__all__ = ["SPLITS", "Batch", "Task", "call", "call_arguments", "cut", "disjoint", "main_output"]

SPLITS = ("calibrate", "select", "verify")
OPTIONAL_INPUTS = ("attention_mask", "token_type_ids")  # left out for a forward that does not know them
TOKEN_INPUTS = ("input_ids", "decoder_input_ids", *OPTIONAL_INPUTS)
SHORT = 100  # characters of an example's text that reports show

Batch = dict[str, Tensor] | tuple[Tensor, ...]
Progress = Callable[[int, int], None]


class Task(ABC):
    """A model's data and its metric.

    Attributes:
        id: the name it is loaded by, or the name of the user's data.
        metric: what is measured.
        model_name: the fetched model that the task brings, or None.
        seed: of the splits.
        splits: those it has; all of `SPLITS` unless the user's scoring function offers fewer.
        sizes: examples in each of them.
        notes: sentences about what was decided or left out when the data was read; reports show them.
        batch: examples to a batch where the caller names none.
    """

    splits: tuple[str, ...] = SPLITS

    def __init__(self, id: str, metric: Metric, *, model_name: str | None = None, seed: int = 0, batch: int = 32):
        self.id, self.metric, self.model_name, self.seed, self.batch = id, metric, model_name, seed, batch
        self.sizes: dict[str, int] = {}
        self.notes: list[str] = []
        self._prepared: dict[tuple[str, int | None], Batch] = {}  # rows by split: texts are tokenized once

    @abstractmethod
    def rows(self, split: str, seq: int | None = None) -> Batch:
        """The inputs of a whole split as one big batch, texts cut to `seq` tokens."""

    @abstractmethod
    def measure(self, model: nn.Module, split: str, progress: Progress | None) -> Evaluation:
        """Score a model, already in eval mode, on a split."""

    def batches(
        self, split: str, batch: int | None = None, seq: int | None = None, limit: int | None = None
    ) -> list[Batch]:
        """The inputs of a split (never its labels), in batches.

        Args:
            split: one of `self.splits`.
            batch: examples to a batch; the task's own by default.
            seq: cut texts to this many tokens.
            limit: the first so many examples only (splits are shuffled, so these are a fair sample).

        Raises:
            BadInput: the task has no such split.
        """
        if split not in self.splits:
            raise BadInput(f"the task {self.id} has no {split!r} split; it has {', '.join(self.splits)}")
        if (split, seq) not in self._prepared:
            self._prepared[split, seq] = self.rows(split, seq)
        rows, step = self._prepared[split, seq], batch or self.batch
        n = len(next(iter(rows.values())) if isinstance(rows, Mapping) else rows[0])
        stop = n if limit is None else min(n, limit)
        return [_slice(rows, start, min(start + step, stop)) for start in range(0, stop, step)]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output whose change matters; gradients flow through it."""
        return main_output(call(model, batch))

    def evaluate(
        self,
        model: nn.Module,
        split: str,
        progress: Progress | None = None,
        reference: Evaluation | None = None,
    ) -> Evaluation:
        """Score a model on a split; its training flags are put back afterwards.

        Args:
            model: float or compressed.
            split: one of `self.splits`.
            progress: is called with (batches done, batches in all).
            reference: the float model's evaluation on this split; only a metric `against_float` needs it, and
                `compare` supplies it by itself.
        """
        with evaluating(model):
            found = self.measure(model, split, progress)
        return found if reference is None else pair(reference, found, self.metric)

    def evaluate_float(self, model: nn.Module, split: str, progress: Progress | None = None) -> Evaluation:
        """Score the float model, which every other is held against: its score has to be a number.

        Raises:
            BadInput: it is NaN or infinite.
        """
        found = self.evaluate(model, split, progress)
        self.check_float(found, split)
        return found

    def check_float(self, found: Evaluation, split: str, model: str = "the float model") -> None:
        """Refuse a score that is no number, of the model that others are held against, as `evaluate_float` does."""
        if not math.isfinite(found.value):
            raise BadInput(
                f"{self.id} returned {found.value} for {model} on the {split} split, and nothing can be held "
                "against that: its score must be a finite number"
            )

    def outputs(self, model: nn.Module, split: str, progress: Progress | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Run a model over a split without gradients: pairs of (batch, output on the CPU in float32)."""
        batches = self.batches(split)
        for done, batch in enumerate(batches, 1):
            with torch.no_grad():
                output = self.forward(model, batch)
            yield batch, output.float().cpu()
            if progress is not None:
                progress(done, len(batches))


def _slice(rows: Batch, start: int, stop: int) -> Batch:
    if isinstance(rows, Mapping):
        return {name: value[start:stop] for name, value in rows.items()}
    return tuple(value[start:stop] for value in rows)


def cut(rows: Batch, seq: int | None) -> Batch:
    """Cut the token inputs among `rows` to `seq` tokens; everything else stays as it is."""
    if seq is None or not isinstance(rows, Mapping):
        return rows
    return {name: value[:, :seq] if name in TOKEN_INPUTS else value for name, value in rows.items()}


_inputs_device: ContextVar[torch.device | None] = ContextVar("inputs_device", default=None)


@contextmanager
def inputs_on(device: torch.device | str) -> Iterator[None]:
    """Within the block batches go to this device, wherever the model's parameters are.

    For a skeleton on meta whose weights come when they are needed: its inputs have to be real.
    """
    before = _inputs_device.set(torch.device(device))
    try:
        yield
    finally:
        _inputs_device.reset(before)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch, on its own device; without a key-value cache where it knows that option."""
    args, kwargs = call_arguments(model, batch)
    return model(*args, **kwargs)


def call_arguments(model: nn.Module, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What `call` calls a model with: the arguments by position, and those by name."""
    held = next(chain(model.parameters(), model.buffers()), None)
    device = _inputs_device.get() or (torch.device("cpu") if held is None else held.device)
    if not isinstance(batch, Mapping):
        return tuple(value.to(device) for value in batch), {}
    known = inspect.signature(model.forward).parameters
    named = "input_ids" in known  # else the signature says nothing (*args, **kwargs): pass everything
    inputs: dict[str, Any] = {
        k: v.to(device) for k, v in batch.items() if k in known or k not in OPTIONAL_INPUTS or not named
    }
    return (), inputs | ({"use_cache": False} if "use_cache" in known else {})


def disjoint(n: int, sizes: Mapping[str, int], seed: int, labels: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Draw disjoint splits of n examples, the same for the same seed, in shuffled order.

    Args:
        n: number of examples.
        sizes: how many each split gets, in the order of drawing; -1 in the last place means the rest.
        seed: of the shuffle.
        labels: (n,) classes; the classes then take turns, so that each split but the last is as balanced as
            can be.

    Returns:
        The indices of each split.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if labels is not None:
        _, classes = np.unique(np.asarray(labels)[order], return_inverse=True)
        turn = np.empty(n, np.int64)  # the how-many-eth of its class an example is, in shuffled order
        for c in range(classes.max(initial=-1) + 1):
            (members,) = np.nonzero(classes == c)
            turn[members] = np.arange(len(members))
        order = order[np.lexsort((classes, turn))]
    splits, start = {}, 0
    for name, size in sizes.items():
        stop = n if size < 0 else min(n, start + size)
        splits[name] = rng.permutation(order[start:stop])
        start = stop
    return splits


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' messages and bars off the terminal while something is loaded or saved."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def short(text: str) -> str:
    """The beginning of a text on one line, for reports."""
    line = " ".join(text[: 4 * SHORT].split())
    return line if len(line) <= SHORT else line[: SHORT - 1] + "…"
