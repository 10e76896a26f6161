"""Constraints: what must hold of parameters after every step of the optimizer.

For a constraint set C with projection P and, optionally, the projection T_p onto its tangent space at p:

    g <- T_p(g)                before the step (only if the rule has `tangent`)
    p <- step(p, g)            whatever the optimizer does
    p <- P(p)                  after the step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from laconic.errors import BadInput

from .hooks import Hook, Run

__all__ = ["Constrain", "Handle", "constrain"]


class Handle:
    """Takes a constraint off its optimizer again."""

    def __init__(self, handles: Iterable[Any]):
        self._handles = list(handles)

    def remove(self) -> None:
        """The optimizer steps as it did before."""
        while self._handles:
            self._handles.pop().remove()


def constrain(optimizer: torch.optim.Optimizer, rule: Any, params: Iterable[nn.Parameter] | None = None) -> Handle:
    """Hold parameters to a rule after every step of an optimizer.

    The parameters are not projected before the first step: where the start must lie in the set, call
    `rule.project_(p)` on them.

    Args:
        optimizer: the optimizer; its `step` is followed, whoever calls it.
        rule: has `project_(p)`, which changes a parameter in place, and may have `tangent(p, x)`, which gives the part
            of a gradient that stays in the set to first order.
        params: which of the optimizer's parameters; all by default.

    Raises:
        BadInput: the rule has no `project_`, or a parameter is not the optimizer's.
    """
    chosen = _chosen(optimizer, rule, params)
    handles = [optimizer.register_step_post_hook(lambda *_: _project(rule, chosen))]
    if hasattr(rule, "tangent"):
        handles.append(optimizer.register_step_pre_hook(lambda *_: _onto_tangent(rule, chosen)))
    return Handle(handles)


class Constrain(Hook):
    """A constraint as a hook of a training: a checkpoint keeps the rule's state, if it has one.

    The tangent is taken in `gradients`, so it also serves optimizers whose step computes the gradients itself
    (closures, Lightning).

    Args:
        rule: see `constrain`.
        select: whether a parameter of a name is held to the rule; all that the optimizer has by default.

    Raises:
        BadInput: no parameter is selected.
    """

    def __init__(self, rule: Any, select: Callable[[str, nn.Parameter], bool] | None = None):
        self.rule, self.select = rule, select
        self._params: list[nn.Parameter] = []
        self._handle: Handle | None = None

    def start(self, run: Run) -> None:
        params = None
        if self.select is not None:
            params = [p for name, p in run.model.named_parameters() if self.select(name, p)]
            if not params:
                raise BadInput(f"{type(self.rule).__name__} constrains nothing: no parameter was selected")
        self._params = _chosen(run.optimizer, self.rule, params)
        self._handle = Handle([run.optimizer.register_step_post_hook(lambda *_: _project(self.rule, self._params))])

    def gradients(self, run: Run) -> None:
        if hasattr(self.rule, "tangent"):
            _onto_tangent(self.rule, self._params)

    def end(self, run: Run) -> None:
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict()} if hasattr(self.rule, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "rule" in state:
            self.rule.load_state_dict(state["rule"])


def _chosen(optimizer: torch.optim.Optimizer, rule: Any, params: Iterable[nn.Parameter] | None) -> list[nn.Parameter]:
    """The parameters that a rule holds for."""
    if not callable(getattr(rule, "project_", None)):
        raise BadInput(f"{type(rule).__name__} is no constraint: it has no project_(p)")
    known = [p for group in optimizer.param_groups for p in group["params"]]
    chosen = known if params is None else list(params)
    ids = {id(p) for p in known}
    for p in chosen:
        if id(p) not in ids:
            raise BadInput(f"a parameter of shape {tuple(p.shape)} is to be constrained, but the optimizer has it not")
    return chosen


@torch.no_grad()
def _project(rule: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        rule.project_(p)


@torch.no_grad()
def _onto_tangent(rule: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        if p.grad is not None:
            p.grad = rule.tangent(p, p.grad)
