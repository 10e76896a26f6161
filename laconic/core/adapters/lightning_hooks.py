"""laconic's hooks on Lightning (`lightning` or `pytorch_lightning`, whichever is there).

    module = hooked_module(MyModule, hooks=[Constrain(rule)])(width=64)     # brings its callback along
    Trainer(max_epochs=3).fit(module, data)

The clock follows `trainer.global_step`. Automatic optimization with one optimizer. The hooks' state is in Lightning's
checkpoints, as tensors, numbers and containers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from laconic.core.clock import Clock
from laconic.core.hooks import Hook
from laconic.errors import BadInput

from ._driver import Driver

__all__ = ["hooked_module", "lightning_callback"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(
    hooks: Sequence[Hook],
    *,
    seed: int = 0,
    monitor: str | None = None,
    higher_is_better: bool = False,
    package: str | None = None,
) -> Any:
    """A Lightning callback that asks hooks; for those that leave batch and loss alone.

    Args:
        hooks: asked in this order.
        seed: of what hooks draw, through `run.generator()`.
        monitor: the logged value that `Hook.evaluated` gets after a validation.
        higher_is_better: its direction.
        package: "lightning.pytorch" or "pytorch_lightning", which do not know each other's callbacks; by default the
            first of them that is installed.

    Raises:
        BadInput: a hook changes the batch or the loss, or Lightning is not installed.
    """
    driver = Driver(hooks, seed=seed, otherwise="hooked_module")
    return _callback(driver, _lightning(package=package), monitor, higher_is_better)


def hooked_module(
    base: type, hooks: Sequence[Hook], *, seed: int = 0, monitor: str | None = None, higher_is_better: bool = False
) -> Any:
    """A subclass of a LightningModule class whose training asks hooks at every moment, batch and loss included.

    `Hook.loss` gets as output what `training_step` returned, if that is a mapping, else None.

    Args:
        base: the class.
        hooks: asked in this order.
        seed: of what hooks draw, through `run.generator()`.
        monitor: the logged value that `Hook.evaluated` gets after a validation.
        higher_is_better: its direction.

    Raises:
        BadInput: Lightning is not installed, or the class is of its other package.
    """
    package = _lightning(base)
    driver = Driver(hooks, seed=seed, complete=True)

    class HookedModule(base):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            batch = driver.batch(batch)
            found = super().training_step(batch, *args, **kwargs)
            if found is None:  # Lightning's way to skip a batch
                return None
            if isinstance(found, Mapping):
                return {**found, "loss": driver.loss(found["loss"], batch, found)}
            assert isinstance(found, Tensor)
            return driver.loss(found, batch, None)

        def configure_callbacks(self) -> Any:
            own = super().configure_callbacks()
            own = list(own) if isinstance(own, Sequence) else [own]
            return [*own, _callback(driver, package, monitor, higher_is_better)]

    HookedModule.__name__ = HookedModule.__qualname__ = f"Hooked{base.__name__}"
    return HookedModule


def _lightning(base: type | None = None, package: str | None = None) -> Any:
    """The Lightning package that is named, or that a class comes from, or that is installed."""
    names = [package] if package is not None else list(PACKAGES)
    if base is not None:
        names = [name for cls in base.__mro__ for name in PACKAGES if cls.__module__.startswith(name)][:1]
        if not names:
            raise BadInput(f"{base.__name__} is no LightningModule")
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise BadInput(f"this needs {' or '.join(names)}: pip install lightning")


def _callback(driver: Driver, package: Any, monitor: str | None, higher_is_better: bool) -> Any:
    class LaconicCallback(package.Callback):  # type: ignore[name-defined, misc]
        @property
        def state_key(self) -> str:
            return "laconic:" + ",".join(type(hook).__name__ for hook in driver.hooks)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
                raise BadInput(
                    f"hooks need automatic optimization with one optimizer; {type(pl_module).__name__} has "
                    f"{len(trainer.optimizers)}"
                )
            total = trainer.estimated_stepping_batches
            clock = Clock(total=int(total) if total != float("inf") else 0)
            if trainer.max_epochs and trainer.max_epochs > 0 and clock.total:
                clock.steps_per_epoch = -(-clock.total // trainer.max_epochs)
            _set(clock, trainer)
            schedules = trainer.lr_scheduler_configs
            driver.start(
                pl_module,
                trainer.optimizers[0],
                clock,
                schedule=schedules[0].scheduler if schedules else None,
                metric=SimpleNamespace(name=monitor, higher_is_better=higher_is_better) if monitor else None,
                device=pl_module.device,
                rank=trainer.global_rank,
                world=trainer.world_size,
            )

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            driver.ask("gradients")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert driver.run is not None
            if trainer.global_step == driver.run.clock.step:  # still accumulating
                return
            _set(driver.run.clock, trainer)
            driver.ask("step")
            trainer.should_stop |= driver.run.stopped is not None

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            run = driver.run
            if run is None or trainer.sanity_checking or monitor not in trainer.callback_metrics:
                return
            run.value = float(trainer.callback_metrics[monitor])
            driver.ask("evaluated", run.value)
            trainer.should_stop |= run.stopped is not None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert driver.run is not None
            _set(driver.run.clock, trainer)
            driver.run.clock.epoch = trainer.current_epoch + 1
            driver.run.clock.step_in_epoch = 0
            driver.ask("epoch")
            trainer.should_stop |= driver.run.stopped is not None

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            driver.ask("end")

        def state_dict(self) -> dict[str, Any]:
            return driver.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            driver.load_state_dict(state_dict)

    return LaconicCallback()


def _set(clock: Clock, trainer: Any) -> None:
    """Move the clock to where Lightning is; it does not count examples."""
    clock.step = trainer.global_step
    clock.epoch = trainer.current_epoch
    clock.step_in_epoch = clock.step - clock.epoch * clock.steps_per_epoch if clock.steps_per_epoch else 0
