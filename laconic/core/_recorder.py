"""What a training leaves behind: rows of metrics, evaluations, checkpoints, and the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laconic.errors import BadInput

from ._finite import tensors_in
from ._identity import differences, environment, fingerprint, identity
from ._loop import Loop
from ._metrics_log import MetricsLog, open_logs
from ._random import preserved, random_state
from .checkpoint import load_checkpoint, save_checkpoint, save_weights
from .clock import Clock
from .modes import modes_restored

__all__ = ["Best", "Every", "Fitted", "Recorder"]

Every = int | Literal["epoch"] | None
logger = logging.getLogger("laconic.fit")


@dataclass(frozen=True)
class Best:
    """The best evaluation of a training.

    Attributes:
        value: of the task's metric.
        step: at which it was measured.
        path: the weights of that step, for `safetensors.torch.load_model`; None without a folder.
    """

    value: float
    step: int
    path: Path | None


@dataclass
class Fitted:
    """What a training gave.

    Attributes:
        model: the model that was given, trained in place.
        clock: where it ended.
        history: the rows of metrics: `step`, `epoch` (with a fraction), `examples`, `loss`, `lr`, `gradient_norm`, and
            the metric by its name where it was measured.
        value: the metric when it was last measured, or None.
        best: the best evaluation, or None.
        stopped: why it ended before its time, or None.
        seconds: of training, over all runs that were resumed.
        out: its folder, or None.
    """

    model: nn.Module
    clock: Clock
    history: list[dict[str, float]] = field(default_factory=list)
    value: float | None = None
    best: Best | None = None
    stopped: str | None = None
    seconds: float = 0.0
    out: Path | None = None


class Recorder:
    """What a training leaves behind: rows of metrics, evaluations, checkpoints. Only the first process writes."""

    def __init__(
        self, loop: Loop, out: str | Path | None, resume: bool, evaluate_every: Every, save_every: Every, split: str,
        log: tuple[str, ...], log_every: int, precision: str,
    ):  # fmt: skip
        self._loop, self._run = loop, loop.run
        self._evaluate_every, self._save_every, self._log_every = evaluate_every, save_every, log_every
        self._split = split
        self.out = Path(out) if out is not None else None
        self.history: list[dict[str, float]] = []
        self.best: Best | None = None
        self._window: list[float] = []  # losses since the last row
        self._seconds = 0.0
        self._started = time.perf_counter()
        self._saved_step = -1
        self._logs: list[MetricsLog] = []
        self._log_names = log
        self._state: dict[str, Any] | None = None
        self._identity: dict[str, Any] = {}
        if resume and self.out is None:
            raise BadInput("resume=True needs out, the folder that the training was writing to")
        if self.out is not None:
            self._open(self.out, resume, precision)

    def _open(self, out: Path, resume: bool, precision: str) -> None:
        """Look at what is in the folder, before anything is changed."""
        run, loader = self._run, self._loop.loader
        if out.exists() and not out.is_dir():
            raise BadInput(f"{out} is a file; out is a folder")
        self._state = load_checkpoint(out)
        self._identity = identity(
            run.model, run.optimizer, run.schedule, run.task, self._loop.hooks, examples=loader.count,
            batch_size=loader.batch_size, accumulate=loader.accumulate, drop_last=run.task.drop_last, seed=run.seed,
            clip=self._loop.clip, precision=precision,
        )  # fmt: skip
        self._identity["the training data"] = fingerprint(tensors_in(loader.sample()))
        if self._state is not None and not resume:
            raise BadInput(f"{out} holds a training already; go on with resume=True, or name another folder")
        if self._state is not None:
            self._refuse_other(out, self._state)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{out} cannot be made: {error.strerror}") from error

    def _refuse_other(self, out: Path, state: dict[str, Any]) -> None:
        """Only the training that wrote a checkpoint may take it up."""
        world = len(state["random"])
        if world != self._run.world:
            raise BadInput(
                f"{out} was trained by {world} process{'es' if world > 1 else ''}, now there "
                f"{'are' if self._run.world > 1 else 'is'} {self._run.world}: each has its own random state, so start "
                "as many as then, or anew in another folder"
            )
        changed = differences(state["identity"], self._identity)
        if changed:
            raise BadInput(
                f"{out} holds another training: {'; '.join(changed)}. Give what was given then, or a new out"
            )
        for what in differences(state["environment"], environment(self._run.device)):
            logger.warning("%s: resumed on another ground (%s): the last bits may differ", out, what)
        if state["clock"]["total"] != self._run.clock.total:
            was, now = state["clock"]["total"], self._run.clock.total
            logger.warning("%s: the training was to have %d steps, now %d", out, was, now)

    def restore(self) -> dict[str, Any] | None:
        """Put back the state of the checkpoint, if there is one; returns the generators' state, to be set last."""
        state, run = self._state, self._run
        if state is None:
            self._open_logs()
            return None
        self._state = None
        total = run.clock.total
        run.clock.load_state_dict(state["clock"])
        run.clock.total = total
        run.model.load_state_dict(state["model"])
        buffers = dict(run.model.named_buffers())
        with torch.no_grad():
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        _load_optimizer(run.optimizer, state["optimizer"])
        if run.schedule is not None:
            run.schedule.load_state_dict(state["schedule"])
        for hook, kept in zip(self._loop.hooks, state["hooks"], strict=True):
            hook.load_state_dict(kept)
        self.history, self._window, self._seconds = state["history"], state["window"], state["seconds"]
        run.value, run.stopped, run.loss, run.gradient_norm = (
            state[key] for key in ("value", "stopped", "loss", "gradient_norm")
        )
        if state["best"] is not None:
            value, step = state["best"]
            self.best = Best(value, step, self._best_path)
        self._saved_step = run.clock.step
        self._open_logs()
        return state["random"][run.rank]

    def _open_logs(self) -> None:
        if self.out is not None and self._run.rank == 0:
            self._logs = open_logs(self._log_names, self.out, self._run.clock.step)

    @property
    def _best_path(self) -> Path | None:
        return self.out / "best.safetensors" if self.out is not None else None

    @property
    def seconds(self) -> float:
        return self._seconds + time.perf_counter() - self._started

    def after_step(self, epoch_done: bool) -> None:
        """Row, evaluation, hooks' epoch and checkpoint, as they are due."""
        run, clock = self._run, self._run.clock
        self._window.append(run.loss)
        over = clock.step >= clock.total or run.stopped is not None
        measured = _due(self._evaluate_every, clock, epoch_done, over)
        if measured:
            self._evaluate()
        if measured or over or clock.every(self._log_every):
            self._row(measured)
        if epoch_done:
            for hook in self._loop.hooks:
                hook.epoch(run)
        if self.out is not None and _due(self._save_every, clock, epoch_done, over):
            self.save()

    def _evaluate(self) -> None:
        """Measure the model on the first process, and let all know the value."""
        run = self._run
        found = torch.zeros((), dtype=torch.float64)
        if run.rank == 0:
            with _evaluation_mode(run.model), preserved(), torch.no_grad():
                result = run.task.evaluate(run.model, split=self._split)
            found += float(getattr(result, "value", result))
        if run.world > 1:
            from accelerate.utils import broadcast

            found = broadcast(found.to(run.device), from_process=0)
        run.value = float(found)
        better = self.best is None or (
            run.value > self.best.value if run.metric.higher_is_better else run.value < self.best.value
        )
        if better:
            self.best = Best(run.value, run.clock.step, self._best_path)
            if self._best_path is not None and run.rank == 0:
                save_weights(self._best_path, run.model)
        for hook in self._loop.hooks:
            hook.evaluated(run, run.value)

    def _row(self, measured: bool) -> None:
        run, clock = self._run, self._run.clock
        part = clock.step_in_epoch / clock.steps_per_epoch
        row = {
            "step": clock.step,
            "epoch": clock.epoch + part,
            "examples": clock.examples,
            "loss": math.fsum(self._window) / len(self._window),
            "lr": self._loop.lr,
            "gradient_norm": run.gradient_norm,
        }
        if measured and run.value is not None:
            row[run.metric.name] = run.value
        row |= run._logged
        run._logged.clear()
        self._window = []
        self.history.append(row)
        for log in self._logs:
            log.write({**row, "seconds": round(self.seconds, 3)})

    def save(self) -> None:
        """Write a checkpoint of this moment, unless there is one."""
        run = self._run
        if self.out is None or self._saved_step == run.clock.step:
            return
        self._saved_step = run.clock.step
        generators = self._all_generators()
        if run.rank > 0:
            return
        kept = run.model.state_dict()
        save_checkpoint(
            self.out,
            run.clock.step,
            {
                "identity": self._identity,
                "environment": environment(run.device),
                "clock": run.clock.state_dict(),
                "model": dict(kept),
                # Not in the state dict, and yet state: a resumed run must find them as they were.
                "buffers": {name: value for name, value in run.model.named_buffers() if name not in kept},
                "optimizer": run.optimizer.state_dict(),
                "schedule": run.schedule.state_dict() if run.schedule is not None else None,
                "hooks": [hook.state_dict() for hook in self._loop.hooks],
                "random": generators,
                "history": self.history,
                "window": self._window,
                "seconds": self.seconds,
                "loss": run.loss,
                "gradient_norm": run.gradient_norm,
                "value": run.value,
                "stopped": run.stopped,
                "best": (self.best.value, self.best.step) if self.best is not None else None,
            },
        )

    def _all_generators(self) -> list[dict[str, Any]]:
        """The generators' state of every process."""
        if self._run.world == 1:
            return [random_state()]
        from accelerate.utils import gather_object

        return gather_object([random_state()])

    def finish(self) -> Fitted:
        """The last checkpoint, then what hooks do at the end, then the weights."""
        run = self._run
        self.save()
        for hook in self._loop.hooks:
            hook.end(run)
        if self.out is not None and run.rank == 0:
            save_weights(self.out / "model.safetensors", run.model)
        if self.out is not None:
            self._loop.accelerator.wait_for_everyone()
        return Fitted(
            run.model, run.clock, self.history, run.value, self.best, run.stopped, self.seconds, self.out
        )  # fmt: skip

    def close(self) -> None:
        """Close the logs, however the training ended."""
        for log in self._logs:
            log.close()


def _due(every: Every, clock: Clock, epoch_done: bool, over: bool) -> bool:
    """Whether what happens every so often happens now; what happens at all also happens at the end."""
    if every is None:
        return False
    return over or (epoch_done if every == "epoch" else clock.every(every))


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state as it was kept: torch's own loading casts it to the parameter's dtype."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, kept in state.get("state", {}).items():
        if not isinstance(index, int) or index >= len(parameters):
            continue
        loaded = optimizer.state[parameters[index]]
        for key, value in kept.items():
            now = loaded.get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                loaded[key] = value.to(now.device)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    with modes_restored(model):
        model.eval()
        yield
