"""Training and evaluation mode of a whole model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "modes_restored"]


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """After the block every module is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; every module's own mode comes back afterwards."""
    with modes_restored(model):
        model.eval()
        yield
