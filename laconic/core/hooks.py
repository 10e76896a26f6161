"""`Hook`: what hangs on a training, and `Run`: what it sees of it. Also the hooks that any training may want.

A hook is asked at fixed moments of each optimizer step:

    for each micro-batch:  batch = hook.batch(run, batch);  loss = hook.loss(run, loss, batch, output);  backward
    hook.gradients(run)    the gradients of the whole step are there, not yet clipped
    hook.step(run)         the optimizer and the schedule have stepped, the clock counts it
    hook.evaluated(...)    if the model was measured at this step
    hook.epoch(run)        if the step completed an epoch

Hooks are asked in the order in which they were given. Where a hook's moment is in the loop never depends on the
number of micro-batches or processes, except that `batch` sees this process's share of a micro-batch.

With several processes each has a copy of the model and of every hook, and they stay alike because all do the same. So
what changes weights, gradients or a hook's own state must draw from `run.generator()`, which is the same everywhere;
the global generators differ from process to process, which is right for dropout and for what `batch` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from ._random import derived_seed
from .clock import Clock

__all__ = ["EarlyStop", "Hook", "Run"]


@dataclass
class Run:
    """A training in progress, as hooks see it.

    Attributes:
        model: the user's own module, never a wrapper around it.
        optimizer: the optimizer.
        clock: where the training stands.
        task: what is trained on; None under an adapter.
        metric: what evaluations measure (`name`, `higher_is_better`); None where nothing is measured.
        schedule: the learning-rate schedule, if there is one.
        seed: of the training.
        device: where the model is.
        rank: of this process.
        world: number of processes.
        loss: mean training loss over the last step's examples, all processes together; NaN before the first.
        gradient_norm: Euclidean norm of the last step's gradient before clipping; NaN before the first.
        value: the task's metric when it was last measured, or None.
        stopped: why the training is to end early, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clock: Clock = field(default_factory=Clock)
    task: Any = None
    metric: Any = None
    schedule: Any = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    loss: float = float("nan")
    gradient_norm: float = float("nan")
    value: float | None = None
    stopped: str | None = None
    _recompute: Callable[[], float] | None = field(default=None, repr=False)
    _logged: dict[str, float] = field(default_factory=dict, repr=False)

    def stop(self, reason: str) -> None:
        """End the training after this step; the reason stands in the result."""
        self.stopped = self.stopped or reason

    def generator(self, stream: int = 0) -> torch.Generator:
        """A CPU generator for the present step, the same on every process and after a resume.

        Args:
            stream: hooks that draw side by side, or one that draws twice a step, take different ones.
        """
        return torch.Generator().manual_seed(derived_seed(self.seed, self.clock.step, stream))

    def log(self, **values: float) -> None:
        """Add columns to the next row of metrics."""
        self._logged.update({name: float(value) for name, value in values.items()})

    def compute_gradients(self) -> float:
        """Compute the current step's gradients anew, from the weights as they are now; returns the mean loss.

        For hooks and optimizers that look at the loss from a second point, as sharpness-aware minimization does. The
        batches are those of the step, after `Hook.batch`; `Hook.loss` is asked again.

        Raises:
            BadInput: the loop that drives this run cannot go back (an adapter's).
        """
        if self._recompute is None:
            raise BadInput("gradients can be computed a second time only under laconic.fit")
        return self._recompute()


class Hook:
    """Does nothing at any moment; inherit and override those that matter.

    A hook that keeps state puts it into `state_dict` as tensors, numbers, strings and containers of these.
    """

    def start(self, run: Run) -> None:
        """Before the first step; on resume, before the state is restored."""

    def batch(self, run: Run, batch: Any) -> Any:
        """The micro-batch to train on, given the one that was loaded; already on the device."""
        return batch

    def loss(self, run: Run, loss: Tensor, batch: Any, output: Any) -> Tensor:
        """The loss to descend, given the task's: a mean over examples.

        `output` is what the model returned when it was last called, or None where it was not called as a module.
        """
        return loss

    def gradients(self, run: Run) -> None:
        """The step's gradients are in `.grad`, averaged over micro-batches and processes, before clipping."""

    def step(self, run: Run) -> None:
        """After an optimizer step."""

    def evaluated(self, run: Run, value: float) -> None:
        """After the model was measured."""

    def epoch(self, run: Run) -> None:
        """After an epoch's last step; `run.clock.epoch` counts it already."""

    def end(self, run: Run) -> None:
        """After the last step, also when the training was stopped early. Not called when it failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the hook."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; tensors come on the CPU."""


class EarlyStop(Hook):
    """Stop when the task's metric has not become better for a number of evaluations.

    Args:
        patience: evaluations without improvement that are borne.
        min_delta: by how much the metric must get better to count.

    Raises:
        BadInput: patience below 1 or a negative `min_delta`.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0):
        if patience < 1 or min_delta < 0:
            raise BadInput(f"EarlyStop(patience={patience}, min_delta={min_delta}): patience >= 1, min_delta >= 0")
        self.patience, self.min_delta = patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def start(self, run: Run) -> None:
        self.best, self.waited = None, 0

    def evaluated(self, run: Run, value: float) -> None:
        sign = 1.0 if run.metric.higher_is_better else -1.0
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(f"{run.metric.name} has not got better than {self.best:g} for {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
