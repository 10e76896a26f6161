"""What a model's output says most by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laconic.errors import BadInput

__all__ = ["main_output"]


def main_output(output: Any) -> Tensor:
    """What a model's output says most by: logits, else the last hidden state, else the first floating tensor.

    Raises:
        BadInput: there is no floating tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("logits", "logits_per_image", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                return output[name]
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    raise BadInput(f"the model returns {type(output).__name__} without a floating tensor; there is nothing to measure")
