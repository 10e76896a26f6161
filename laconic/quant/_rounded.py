"""Weights rounded for a moment: what a model says with some layers in few bits, and the layers that can be rounded.

For measuring alone; nothing is stored in fewer bits here. What is measured is then packed by a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core import calls
from laconic.errors import BadInput
from laconic.nn import PackedParameterSpec, is_packed, matrix_view
from laconic.nn.packed import View, op_of, restore_view
from laconic.numerics import Int, Scale, Scheme, check_finite, fake_quantize

CARD = None  # methods share this; it is none itself

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Weight:
    """A weight that can be rounded.

    Attributes:
        name: of the parameter, the first of its names where it is tied.
        parameter: itself.
        view: how it becomes a matrix.
    """

    name: str
    parameter: nn.Parameter
    view: View

    @property
    def matrix(self) -> Tensor:
        """(rows, K)."""
        return matrix_view(self.parameter.detach(), self.view)

    def rounded(self, scheme: Scheme) -> Tensor:
        """The parameter as it comes back from a scheme, in its own shape and type."""
        spec = PackedParameterSpec(scheme, tuple(self.parameter.shape), self.view)
        return restore_view(fake_quantize(self.matrix, scheme, self.name), spec).to(self.parameter.dtype)


def scheme_of(bits: int | str | Scheme, group: int | None = None) -> Scheme:
    """A scheme from a number of bits: integers with a zero point, one scale a row, or a group of so many weights."""
    if isinstance(bits, Scheme):
        return bits
    if isinstance(bits, str):
        return Scheme.parse(bits)
    scale = Scale("channel", dtype="float32") if group is None else Scale("group", group=group, dtype="float32")
    return Scheme(Int(bits), scale, zero="int")


def weights_of(model: nn.Module, within: Sequence[str] | None = None) -> dict[str, Weight]:
    """Name -> weight of every linear and convolution layer, each once where it is tied.

    Args:
        model: of floats.
        within: paths of modules to look in; everywhere by default.

    Raises:
        BadInput: a layer is packed already, or there is none.
    """
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if within is not None and not any(path == root or path.startswith(f"{root}.") for root in within):
            continue
        if is_packed(module):
            raise BadInput(f"{path or 'the model'} is packed already: bits are chosen for a model of floats")
        transposed = op_of(module, "weight") == "linear" and not isinstance(module, nn.Linear)  # GPT-2's Conv1D
        if not (transposed or isinstance(module, (nn.Linear, *CONVOLUTIONS))) or parametrize.is_parametrized(module):
            continue
        parameter = module.weight
        if not isinstance(parameter, nn.Parameter) or id(parameter) in seen or not parameter.numel():
            continue
        seen.add(id(parameter))
        name = f"{path}.weight" if path else "weight"
        check_finite(parameter.detach(), name)
        found[name] = Weight(name, parameter, "transposed" if transposed else "rows")
    if not found:
        where = "the model" if within is None else ", ".join(within)
        raise BadInput(f"{where} has no linear or convolution layer whose weight could be rounded")
    return found


@contextmanager
def rounded(weights: Mapping[str, Weight], schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Some weights rounded in place while the context lasts, and exactly as they were afterwards."""
    kept = {name: weights[name].parameter.detach().clone() for name in schemes}
    try:
        with torch.no_grad():
            for name, scheme in schemes.items():
                weights[name].parameter.copy_(weights[name].rounded(scheme))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                weights[name].parameter.copy_(value)


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: what `calls.call` takes, but that a sequence begins with the inputs, and has more."""
    whole = isinstance(batch, (Tensor, Mapping)) or calls.is_arguments(batch)
    return calls.call(model, batch if whole else batch[0])


def tensor_of(output: Any) -> Tensor:
    """The tensor that matters of what a module gave: itself, its logits, or the first."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return tensor_of(output[0])


def batches_of(data: Any) -> list[Any]:
    """Data as a list of batches: one tensor or mapping is one batch.

    Raises:
        BadInput: there is none, or the first is empty.
    """
    batches = [data] if isinstance(data, (Tensor, Mapping)) else list(data)
    if not batches:
        raise BadInput("there is no data to look at: give at least one batch")
    return batches
