"""What every optimizer here does alike: refuse impossible options and sparse gradients, and call the closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

__all__ = ["evaluate", "not_negative", "share", "trained"]


def not_negative(who: str, **options: float) -> None:
    """Refuse options below zero, and NaN.

    Raises:
        BadInput: naming the option.
    """
    for name, value in options.items():
        if not value >= 0:
            raise BadInput(f"{who}: {name} is {value}: it must not be negative")


def share(who: str, **options: float) -> None:
    """Refuse decay rates outside [0, 1): with 1 an average would never take anything in.

    Raises:
        BadInput: naming the option.
    """
    for name, value in options.items():
        if not 0 <= value < 1:
            raise BadInput(f"{who}: {name} is {value}: it must lie in [0, 1)")


def evaluate(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """The loss of a closure, with its gradients computed anew."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def trained(who: str, group: Mapping[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters of a group that have a gradient, and it.

    Raises:
        BadInput: a gradient is sparse.
    """
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise BadInput(f"{who}: the gradient of a {tuple(p.shape)} parameter is sparse: make it dense")
        yield p, p.grad


CARD = None
