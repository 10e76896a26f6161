"""Calibration batches as methods take them: ids (N, T), or the arguments of the model as a mapping or a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.calls import call
from laconic.core.structure import Example
from laconic.errors import BadInput

Batch = Tensor | Mapping[str, Any] | Sequence[Any]


@torch.no_grad()
def run_batch(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch."""
    return call(model, batch)


def example_of(batch: Batch) -> Example:
    """A batch as (args, kwargs) of one forward call."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    return ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})


def first_tensor(value: Any) -> Tensor:
    """The first tensor in nested arguments or outputs.

    Raises:
        BadInput: there is none.
    """
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for part in parts:
        try:
            return first_tensor(part)
        except BadInput:
            continue
    raise BadInput(f"there is no tensor in a {type(value).__name__}, where calibration data are needed")


CARD = None  # methods share this; it is none itself
