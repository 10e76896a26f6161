"""Asking hooks at their moments, for loops that are not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.clock import Clock
from laconic.core.hooks import Hook, Run
from laconic.errors import BadInput

__all__ = ["Driver"]


class Driver:
    """Holds hooks and the run that they see, while another loop trains.

    Args:
        hooks: asked in this order.
        seed: of what hooks draw, through `run.generator()`.
        complete: the loop passes batch and loss through the hooks, too.

    Raises:
        BadInput: the loop does not, and a hook needs it.
    """

    def __init__(self, hooks: Sequence[Hook], *, seed: int = 0, complete: bool = False, otherwise: str = ""):
        self.hooks, self.seed = list(hooks), seed
        self.run: Run | None = None
        self._pending: list[Mapping[str, Any]] | None = None
        for hook in self.hooks:
            for name in ("batch", "loss"):
                if not complete and getattr(type(hook), name) is not getattr(Hook, name):
                    raise BadInput(
                        f"{type(hook).__name__} changes the {name}, which a callback cannot; use {otherwise}"
                    )

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock, *, schedule: Any, metric: Any,
        device: torch.device, rank: int, world: int,
    ) -> None:  # fmt: skip
        """The training begins, or goes on where the clock says."""
        self.run = Run(model, optimizer, clock, None, metric, schedule, self.seed, torch.device(device), rank, world)
        for hook in self.hooks:
            hook.start(self.run)
        if self._pending is not None:
            self._restore(self._pending)

    def batch(self, batch: Any) -> Any:
        assert self.run is not None
        for hook in self.hooks:
            batch = hook.batch(self.run, batch)
        return batch

    def loss(self, loss: Tensor, batch: Any, output: Any) -> Tensor:
        assert self.run is not None
        for hook in self.hooks:
            loss = hook.loss(self.run, loss, batch, output)
        self.run.loss = float(loss.detach())
        return loss

    def ask(self, moment: str, *given: Any) -> None:
        """One of the moments that give nothing back: gradients, step, evaluated, epoch, end."""
        assert self.run is not None
        for hook in self.hooks:
            getattr(hook, moment)(self.run, *given)

    def state_dict(self) -> dict[str, Any]:
        return {"hooks": [hook.state_dict() for hook in self.hooks], "names": self._names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the hooks' state back; before `start` it is kept until then.

        Raises:
            BadInput: it is of other hooks.
        """
        if list(state["names"]) != self._names:
            raise BadInput(f"the checkpoint is of the hooks {state['names']}, these are {self._names}")
        if self.run is None:
            self._pending = list(state["hooks"])
        else:
            self._restore(state["hooks"])

    @property
    def _names(self) -> list[str]:
        return [type(hook).__name__ for hook in self.hooks]

    def _restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        for hook, state in zip(self.hooks, states, strict=True):
            hook.load_state_dict(state)
        self._pending = None
