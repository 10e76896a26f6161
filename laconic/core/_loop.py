"""One optimizer step, on one process or on several: the inside of `laconic.core.fit`. Knows nothing of files."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from laconic.errors import BadInput

from ._finite import NotFinite, gradient_norm, tensors_in, why_gradient, why_loss
from ._loader import Loader, StepData
from ._random import masks_state, set_masks_state
from .clock import Clock
from .hooks import Hook, Run

if TYPE_CHECKING:
    from .fit import TrainTask

__all__ = ["Loop", "autocast", "output_kept"]


class Loop:
    """The model, its optimizer and the data, and one step of training. Knows nothing of files."""

    def __init__(
        self, model: nn.Module, task: TrainTask, optimizer: Any, *, schedule: Any, hooks: Sequence[Hook], seed: int,
        accumulate: int, clip: float | None, workers: int, device: Any, find_unused_parameters: bool,
    ):  # fmt: skip
        self.accelerator = _accelerator(find_unused_parameters)
        self.device = torch.device(device) if device is not None else self.accelerator.device
        model.to(self.device)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.loader = Loader(
            task.train_data(), task.batch_size, accumulate=accumulate, seed=seed, rank=rank, world=world,
            drop_last=task.drop_last, workers=workers,
        )  # fmt: skip
        optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizer(model.parameters())
        schedule = _schedule(schedule, optimizer)
        self.hooks, self.clip = list(hooks), clip
        self.run = Run(
            model, optimizer, Clock(steps_per_epoch=self.loader.steps_per_epoch), task, task.metric, schedule, seed,
            self.device, rank, world, _recompute=self._compute_gradients,
        )  # fmt: skip
        self.called: nn.Module = model  # what the task's loss calls: the model, or DDP around it
        self.output: Any = None
        self.interrupted = False
        self.lr = math.nan  # of the last step
        self._needs_closure = _needs_closure(optimizer)
        self._step = StepData([], [], 0)
        self._generators: dict[str, Tensor] = {}

    def wrap(self) -> None:
        """Share gradients between the processes; after hooks have put the model into its final form."""
        if self.run.world > 1:
            self.called = self.accelerator.prepare_model(self.run.model, device_placement=False)

    def step(self, data: StepData, interrupted: bool = False) -> bool:
        """Train on the batches of one step; returns whether they were an epoch's last."""
        run = self.run
        batches = [self._to_device(batch) for batch in data.batches]
        for hook in self.hooks:
            batches = [hook.batch(run, batch) for batch in batches]
        self._step = StepData(batches, data.weights, data.examples)
        self.interrupted = interrupted
        if self._needs_closure:
            run.optimizer.step(self._closure)
        else:
            self._closure()
            run.optimizer.step()
        self.lr = float(run.optimizer.param_groups[0].get("lr", math.nan))
        if run.schedule is not None:
            run.schedule.step()
        epoch_done = run.clock.advance(data.examples)
        for hook in self.hooks:
            hook.step(run)
        return epoch_done

    def _closure(self) -> float:
        """The gradients of the step as the optimizer is to see them; returns the loss."""
        run = self.run
        run.loss = self._compute_gradients()
        for hook in self.hooks:
            hook.gradients(run)
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(parameters)
        run.gradient_norm = float(norm)
        if not math.isfinite(run.gradient_norm):
            self._check_gradients()
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return run.loss

    def _compute_gradients(self) -> float:
        """The gradient of the step's mean loss into `.grad`; returns that loss, over all processes.

        Raises:
            NotFinite: the loss is NaN or infinite.
        """
        run, step = self.run, self._step
        self._generators = masks_state(self.device)
        run.optimizer.zero_grad()
        total = 0.0
        last = len(step.batches) - 1
        for number, (batch, weight) in enumerate(zip(step.batches, step.weights, strict=True)):
            # Gradients travel once a step, with its last micro-batch.
            with self.accelerator.no_sync(self.called) if number < last else nullcontext():
                loss = self._loss(batch)
                # DDP takes the mean over processes; the weights add up to 1 over them, so undo it.
                self.accelerator.backward(loss * (weight * run.world))
            # A share without examples counts for nothing, also where its loss is not a number.
            total += float(loss.detach()) * weight if weight else 0.0
        total = self._summed(total)
        if not math.isfinite(total):
            why, module = self._why_loss()
            self._raise_not_finite(f"the loss is {total}: {why}", module)
        return total

    def _loss(self, batch: Any) -> Tensor:
        self.output = None
        loss = self.run.task.loss(self.called, batch)
        for hook in self.hooks:
            loss = hook.loss(self.run, loss, batch, self.output)
        self.output = None  # it holds the graph
        if loss.numel() != 1:
            raise BadInput(f"the loss has shape {tuple(loss.shape)}; it must be one number, the mean over the batch")
        return loss

    def _summed(self, total: float) -> float:
        """The sum over processes; with it they agree on whether to stop."""
        if self.run.world == 1:
            return total
        both = torch.tensor([total, float(self.interrupted)], dtype=torch.float64, device=self.device)
        both = self.accelerator.reduce(both, "sum")
        self.interrupted = bool(both[1] > 0)
        return float(both[0])

    def _why_loss(self) -> tuple[str, str | None]:
        def again() -> None:
            set_masks_state(self._generators)  # the same dropout
            with torch.no_grad():
                for batch in self._step.batches:
                    self.run.task.loss(self.run.model, batch)

        return why_loss(self.run.model, again, self._step.batches)

    def _check_gradients(self) -> None:
        """Raise if an entry of a gradient is not finite; the norm alone may overflow."""
        found = why_gradient(self.run.model)
        if found is not None:
            self._raise_not_finite(*found)

    def _raise_not_finite(self, why: str, module: str | None) -> None:
        step = self.run.clock.step + 1
        raise NotFinite(f"step {step}: {why}; try a smaller learning rate, clip=1.0 or precision='no'", step, module)

    def _to_device(self, batch: Any) -> Any:
        from accelerate.utils import send_to_device

        if self.device.type == "cpu" and all(t.device.type == "cpu" for t in tensors_in(batch)):
            return batch
        return send_to_device(batch, self.device)


def _accelerator(find_unused_parameters: bool) -> Any:
    """Processes and devices, as accelerate finds them."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    options = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        # Autocast is ours: accelerate's precision is fixed once a process, and it replaces the model's forward. Without
        # a GPU accelerate looks for other processes only if it is told that the CPU is meant.
        cpu = started > 1 and not torch.accelerator.is_available()
        found = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[options])
    except ValueError as error:
        raise BadInput(f"another Accelerator of this process has set a precision of its own: {error}") from error
    if started != found.num_processes:
        raise BadInput(
            f"torchrun started {started} processes and accelerate sees {found.num_processes}: each would train alone; "
            "make no Accelerator of your own before, or start one process"
        )
    return found


def _schedule(schedule: Any, optimizer: Optimizer) -> Any:
    if schedule is None:
        return None
    made = schedule if isinstance(schedule, (LRScheduler, ReduceLROnPlateau)) else schedule(optimizer)
    if isinstance(made, ReduceLROnPlateau):
        raise BadInput("ReduceLROnPlateau steps by a metric, not by the clock; write it as a hook's `evaluated`")
    if made.optimizer is not optimizer:
        raise BadInput(f"the schedule ({type(made).__name__}) is of another optimizer than the one given")
    return made


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer's `step` cannot do without the closure, as that of L-BFGS."""
    parameter = inspect.signature(optimizer.step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


@contextmanager
def autocast(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Run the model's forward under bfloat16 autocast, and give its output in float32: the loss is computed in that."""
    if precision == "no":
        yield
        return
    from accelerate.utils import convert_to_fp32

    entered: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append(torch.autocast(device.type, torch.bfloat16))
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return convert_to_fp32(output)

    handles = [
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def output_kept(model: nn.Module, loop: Loop) -> Iterator[None]:
    """Let hooks see what the model returned in the task's loss."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            loop.output = output

    handle = model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
