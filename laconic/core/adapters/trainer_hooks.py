"""laconic's hooks on a transformers `Trainer`.

    trainer = hooked_trainer()(model=model, args=args, train_dataset=data, hooks=[EarlyStop(), Constrain(rule)])

The clock follows `state.global_step`, which counts optimizer steps as ours does. `Hook.gradients` comes after the
Trainer's own clipping. The hooks' state lies beside the Trainer's in every checkpoint folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from laconic.core.checkpoint import load_checkpoint, save_checkpoint
from laconic.core.clock import Clock
from laconic.core.hooks import Hook
from laconic.errors import BadInput

from ._driver import Driver

__all__ = ["hooked_trainer", "trainer_callback"]

FOLDER = "laconic-hooks"  # in a checkpoint folder of the Trainer


def trainer_callback(hooks: Sequence[Hook], *, seed: int = 0) -> Any:
    """A `TrainerCallback` that asks hooks; for those that leave batch and loss alone.

    Args:
        hooks: asked in this order.
        seed: of what hooks draw, through `run.generator()`.

    Raises:
        BadInput: a hook changes the batch or the loss.
    """
    return _callback(Driver(hooks, seed=seed, otherwise="hooked_trainer"))


def hooked_trainer(base: Any = None) -> Any:
    """A subclass of a Trainer class that takes `hooks=` and asks them at every moment, batch and loss included.

    The loss of a micro-batch is the model's own mean, micro-batches count alike: a hook's loss term is a mean over
    examples, so it cannot be added to a loss that is a share of a sum over tokens.

    Args:
        base: the class; `transformers.Trainer` by default.
    """
    if base is None:
        from transformers import Trainer as base  # noqa: N813 - a default that costs an import

    class HookedTrainer(base):  # type: ignore[misc, valid-type]
        loss_is_scaled_for_ga = False

        def __init__(self, *args: Any, hooks: Sequence[Hook] = (), hook_seed: int = 0, **kwargs: Any):
            self._driver = Driver(hooks, seed=hook_seed, complete=True)
            super().__init__(*args, **kwargs)
            self.add_callback(_callback(self._driver))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs = self._driver.batch(inputs)
            loss, output = super().compute_loss(model, dict(inputs), True, None)
            loss = self._driver.loss(loss, inputs, output)
            return (loss, output) if return_outputs else loss

    HookedTrainer.__name__ = HookedTrainer.__qualname__ = f"Hooked{base.__name__}"
    return HookedTrainer


def _callback(driver: Driver) -> Any:
    from transformers import TrainerCallback

    class LaconicCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            optimizer = given["optimizer"]
            epochs = max(args.num_train_epochs, 1e-9)
            per_epoch = math.ceil(state.max_steps / epochs) if args.max_steps <= 0 else 0
            clock = Clock(total=state.max_steps, steps_per_epoch=per_epoch)
            _set(clock, args, state)
            name, higher = args.metric_for_best_model, args.greater_is_better
            driver.start(
                given["model"],
                getattr(optimizer, "optimizer", optimizer),  # accelerate's wrapper knows no step hooks
                clock,
                schedule=given.get("lr_scheduler"),
                metric=SimpleNamespace(name=name, higher_is_better=bool(higher)) if name else None,
                device=args.device,
                rank=args.process_index,
                world=args.world_size,
            )
            if state.global_step:
                driver.load_state_dict(_kept(args, state))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            driver.ask("gradients")

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert driver.run is not None
            _set(driver.run.clock, args, state)
            driver.ask("step")
            control.should_training_stop |= driver.run.stopped is not None

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert driver.run is not None
            _set(driver.run.clock, args, state)
            driver.ask("epoch")
            control.should_training_stop |= driver.run.stopped is not None

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
            run = driver.run
            if run is None or run.metric is None or not metrics:
                return
            name = run.metric.name if run.metric.name.startswith("eval_") else f"eval_{run.metric.name}"
            if name in metrics:
                run.value = float(metrics[name])
                driver.ask("evaluated", run.value)
                control.should_training_stop |= run.stopped is not None

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.is_world_process_zero:
                folder = _folder(args, state)
                folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(folder, state.global_step, driver.state_dict())

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            driver.ask("end")

    return LaconicCallback()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER


def _kept(args: Any, state: Any) -> dict[str, Any]:
    """The hooks' state at the step that the Trainer resumes from."""
    folder = _folder(args, state)
    found = load_checkpoint(folder)
    if found is None:
        raise BadInput(
            f"the Trainer resumes at step {state.global_step}, but {folder} holds no state of hooks: "
            "resume from a checkpoint in output_dir that was written with them"
        )
    return found


def _set(clock: Clock, args: Any, state: Any) -> None:
    """Move the clock to where the Trainer is; it counts every step as full."""
    clock.step = state.global_step
    clock.epoch = int((state.epoch or 0) + 1e-6)
    clock.step_in_epoch = clock.step - clock.epoch * clock.steps_per_epoch if clock.steps_per_epoch else 0
    clock.examples = clock.step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
