"""`fit`: the one training loop of the library, and `TrainTask`: what it trains on.

One optimizer step goes over `accumulate` micro-batches b with n_b examples each, n examples in all:

    L = sum_b (n_b / n) L_b(theta),    theta <- step(theta, grad L)

where L_b is a mean over examples. So the gradient is that of the mean over all examples of the step, also where the
last micro-batch of an epoch is smaller. Under `torchrun` every process takes an equal run of each micro-batch, with the
same weights n_b / n, and DistributedDataParallel adds the gradients up: the same call trains on the same examples in
the same steps, whatever the number of processes. The sums are then taken in another order, so weights agree to
rounding and not to the bit; batch statistics are of a process's share, as everywhere in PyTorch.

All that an interrupted training needs is in its last checkpoint: the order of the data is a function of (seed, epoch),
the state of the generators is put back after the data's iterator exists, and hooks, schedule and clock carry theirs. A
resumed training ends with the same bits as one that was never stopped, on the same machine and number of threads.
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laconic.errors import BadInput

from ._finite import NotFinite
from ._loop import Loop, autocast, output_kept
from ._progress import TrainingProgress
from ._random import derived_seed, preserved, seed_all, set_random_state
from ._recorder import Best, Every, Fitted, Recorder
from .hooks import Hook
from .modes import modes_restored

__all__ = ["Best", "Fitted", "NotFinite", "TrainTask", "fit"]


class MetricLike(Protocol):
    """What `fit` wants of a metric."""

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...


class TrainTask(ABC):
    """Data, a baseline network, a loss and a metric: what a training is about.

    Attributes:
        id: the name it is known by.
        metric: what `evaluate` measures.
        batch_size: examples to a micro-batch, over all processes together.
        drop_last: leave out an epoch's last micro-batch where it is not full.
    """

    id: str
    metric: MetricLike
    batch_size: int
    drop_last: bool = False

    @abstractmethod
    def train_data(self) -> Any:
        """The examples to train on: has a length, and gives a batch for a tensor of indices.

        A batch is any nest of tensors that `loss` understands. A data set that has `__getitems__(list of indices)`
        is asked through that instead. One that never draws random numbers may have `deterministic = True`, which
        saves some time a step.
        """

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The baseline network, a function of the seed."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss over a batch's examples; calls `model(...)`, which may be a wrapper around the user's."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str = "test") -> Any:
        """The metric on a split: a number, or something with a `value`."""


def fit(
    model: nn.Module,
    task: TrainTask,
    optimizer: Optimizer | Callable[[Iterator[nn.Parameter]], Optimizer],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    hooks: Sequence[Hook] = (),
    schedule: Any = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["no", "bf16"] = "no",
    evaluate_every: Every = None,
    split: str = "test",
    save_every: Every = "epoch",
    log: str | Sequence[str] = "csv",
    log_every: int = 10,
    workers: int = 0,
    device: str | torch.device | None = None,
    find_unused_parameters: bool = False,
    quiet: bool = False,
) -> Fitted:
    """Train a model, in place.

    With `out`, the folder holds `checkpoint.json` and its tensors while the training goes on, `metrics.csv`, and at the
    end `model.safetensors` (and `best.safetensors` if the model was evaluated). Ctrl-C ends the training after the step
    that is under way, and keeps a checkpoint of it.

    Args:
        model: what is trained.
        task: data, loss and metric.
        optimizer: over the model's parameters; or a callable that makes one from them, e.g. `torch.optim.Adam`.
        epochs: how often to go through the data; or
        steps: how many optimizer steps to take.
        hooks: what else happens at each step, in this order; see `laconic.core.hooks`.
        schedule: a learning-rate scheduler of the optimizer, or a callable that makes one from it; stepped after every
            optimizer step.
        seed: of the data's order and of all that draws during training (dropout).
        out: a folder for checkpoints and metrics.
        resume: go on from the checkpoint in `out`; start anew where there is none.
        accumulate: micro-batches (of the task's `batch_size`) to an optimizer step.
        clip: bound on the Euclidean norm of the gradient.
        precision: "bf16" runs the model's forward under bfloat16 autocast; weights and loss stay in float32.
        evaluate_every: measure the task's metric every so many steps, or every "epoch"; never by default.
        split: on which it is measured. Where `best` or `EarlyStop` choose by it, it should not be the test split.
        save_every: write a checkpoint every so many steps, or every "epoch"; None at the end alone.
        log: "csv", "tensorboard", or both; in `out`.
        log_every: steps to a row of metrics.
        workers: processes that fetch data ahead.
        device: where to train; what accelerate finds by default.
        find_unused_parameters: for several processes: some parameters may take no part in a step's loss.
        quiet: show no progress.

    Returns:
        Fitted: the history and the clock.

    Raises:
        BadInput: the arguments do not fit together, or the checkpoint in `out` is of another training.
        NotFinite: the loss or a gradient is NaN or infinite; names the step and the module.
    """
    logs = (log,) if isinstance(log, str) else tuple(log)
    _check(epochs, steps, accumulate, clip, precision, log_every, evaluate_every, save_every)
    for hook in hooks:
        if evaluate_every is None and type(hook).evaluated is not Hook.evaluated:
            raise BadInput(f"{type(hook).__name__} goes by evaluations, and there are none: give evaluate_every")
    with ExitStack() as stack:
        stack.enter_context(preserved())  # the caller's generators are not the training's
        loop = Loop(
            model, task, optimizer, schedule=schedule, hooks=hooks, seed=seed, accumulate=accumulate, clip=clip,
            workers=workers, device=device, find_unused_parameters=find_unused_parameters,
        )  # fmt: skip
        clock = loop.run.clock
        clock.total = steps if steps is not None else (epochs or 0) * clock.steps_per_epoch
        recorder = Recorder(loop, out, resume, evaluate_every, save_every, split, logs, log_every, precision)
        stack.enter_context(_training_mode(model))
        stack.enter_context(autocast(model, loop.run.device, precision))
        stack.enter_context(output_kept(model, loop))
        for hook in loop.hooks:
            hook.start(loop.run)
        loop.wrap()
        generators = recorder.restore()
        stack.callback(recorder.close)
        progress = TrainingProgress(clock, silent=quiet or loop.run.rank > 0)
        stack.callback(progress.close)
        interrupted = stack.enter_context(_interruptible(enabled=recorder.out is not None))
        if generators is None:
            seed_all(derived_seed(seed, loop.run.rank))
        while clock.step < clock.total and loop.run.stopped is None:
            data = loop.loader.epoch(clock.epoch, clock.step_in_epoch)
            if generators is not None:
                # Only now: making the iterator may draw, and a run that was never stopped drew at another moment.
                set_random_state(generators)
                generators = None
            for batches in data:
                epoch_done = loop.step(batches, bool(interrupted))
                recorder.after_step(epoch_done)
                progress.show(loop.run.loss, loop.run.value)
                # Alone, this process may stop now; several stop where they have told each other.
                if loop.interrupted or (interrupted and loop.run.world == 1):
                    recorder.save()
                    raise KeyboardInterrupt
                if loop.run.stopped is not None or clock.step >= clock.total:
                    break
        return recorder.finish()


def _check(
    epochs: int | None, steps: int | None, accumulate: int, clip: float | None, precision: str, log_every: int,
    evaluate_every: Every, save_every: Every,
) -> None:  # fmt: skip
    """Refuse arguments that do not fit together."""
    if (epochs is None) == (steps is None):
        raise BadInput("give either epochs or steps, and not both")
    for name, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and count < 0:
            raise BadInput(f"{name}={count} is negative")
    for name, count in (("accumulate", accumulate), ("log_every", log_every)):
        if count < 1:
            raise BadInput(f"{name}={count}: it is 1 or more")
    for name, every in (("evaluate_every", evaluate_every), ("save_every", save_every)):
        if not (every is None or every == "epoch" or (isinstance(every, int) and every >= 1)):
            raise BadInput(f'{name}={every!r}: it is a number of steps, "epoch" or None')
    if clip is not None and not clip > 0:
        raise BadInput(f"clip={clip}: it is a positive number or None")
    if precision not in ("no", "bf16"):
        raise BadInput(f"precision={precision!r} is not known; there are 'no' and 'bf16'")


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    with modes_restored(model):
        model.train()
        yield


@contextmanager
def _interruptible(enabled: bool) -> Iterator[list[int]]:
    """A first Ctrl-C is noted and the step under way is finished; a second one interrupts at once."""
    caught: list[int] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
