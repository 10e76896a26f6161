"""Taking layer norms apart: the mean goes into the writers of a stream, gain and bias into the readers of each norm.

For a stream of width d (`laconic.core.structure.Stream`) with C = I - 11^T / d, in float64 and rounded once:

    writers     W <- C W along their outputs, b <- C b         then the stream has mean zero, and LN(x) = RMS(x) g + b
    readers     b <- b + W beta, W <- W diag(g)                the norm of a reader has neither gain nor bias then
    kept d - 1  writers lose their last output; readers W_i <- W_i - W_d, and lose their last input

What stands in a norm's place is named by a *kind*: "rms", "crms" (d - 1 channels) or "none" (a constant scale, which goes
into the readers too). What is worked out here is done by `laconic.core.record.apply_records`, also to a skeleton on meta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from ._renormed import KINDS
from .record import RENORM, Record
from .structure import Stream, Structure

__all__ = ["KINDS", "fold_gain", "foldable", "refusal", "solve", "ties_in_the_way", "untie"]


def refusal(structure: Structure, model: nn.Module, stream: Stream) -> str:
    """Why a stream's mean cannot go into its writers, "" if it can.

    Raises:
        BadInput: a norm or a writer has another width than the stream.
    """
    if stream.reason:
        return stream.reason
    for path in stream.norms:
        norm = model.get_submodule(path)
        if type(norm) is not nn.LayerNorm:
            return f"{path} is a {type(norm).__name__}, and not a layer norm of torch"
        if norm.normalized_shape != (stream.width,):
            raise BadInput(f"{path} normalizes {norm.normalized_shape}, and what it reads is {stream.width} wide")
    mine = {(writer.name, writer.module) for writer in stream.writers}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for writer in stream.writers:
        info = structure.parameters[writer.name]
        if tensors[writer.name].shape[writer.axis] != stream.width:
            found = tuple(tensors[writer.name].shape)
            raise BadInput(f"{writer.name} of shape {found} writes to a stream that is {stream.width} wide")
        strange = [use for use in info.uses if (writer.name, use.module) not in mine and use.role != "other"]
        if strange and len(info.names) > 1:
            return f"{writer.name} is tied to {info.names[1]}, which must stay as it is: untie them first (laconic.norm.untie)"
        if strange:
            return f"{writer.name} is read by {strange[0].module or 'the model'} too"
    return ""


def foldable(structure: Structure, model: nn.Module, path: str) -> str:
    """Why gain and bias of a norm cannot go into what reads it, "" if they can.

    Raises:
        BadInput: a reader takes another number of channels than the norm gives.
    """
    readers = structure.norms.get(path)
    if readers is None:
        return "no gain of it was seen"
    if readers.reason:
        return readers.reason
    norm: Any = model.get_submodule(path)
    for module_path, name in zip(readers.modules, readers.weights, strict=True):
        module: Any = model.get_submodule(module_path)
        axis = _input_axis(module)
        if axis is None or name.rpartition(".")[0] != module_path:
            return f"{module_path}, which reads it, is a {type(module).__name__}"
        if module.weight.shape[axis] != norm.weight.shape[-1]:
            raise BadInput(
                f"{module_path} reads {module.weight.shape[axis]} channels and {path} gives {norm.weight.shape[-1]}: "
                "the gain cannot be folded"
            )
        bias = structure.parameters.get(f"{module_path}.bias")
        if bias is not None and bias.calls != structure.parameters[name].calls:
            return f"{module_path}.bias is read in other places too"
    return ""


def solve(
    structure: Structure, model: nn.Module, stream: Stream, kind: str, *, scales: Mapping[str, float] | None = None,
    method: str,
) -> Record:  # fmt: skip
    """The change of one stream: new values of all its writers and readers, and what stands in its norms' places.

    Args:
        structure, model: as they are.
        stream: one that `refusal` does not refuse.
        kind: of `KINDS`.
        scales: with "none", path of each norm -> the constant s that it divides by.
        method: id of the method, for the record.
    """
    values = _Values(model)
    short = kind == "crms"
    norms: dict[str, Any] = {}
    for path in stream.norms:
        norm: Any = model.get_submodule(path)
        scale = 1.0 if scales is None else 1.0 / scales[path]
        said: dict[str, Any] = {"kind": kind, "width": stream.width, "eps": norm.eps}
        if norm.weight is None:
            if kind != "rms":  # who reads it was not seen: it gives them all channels, as ever
                said["affine"] = True
                values.new[f"{path}.weight"] = torch.full((stream.width,), scale, dtype=torch.float64)
        elif foldable(structure, model, path):
            said |= {"affine": True, "bias": norm.bias is not None}
            values.new[f"{path}.weight"] = norm.weight.detach().double() * scale
            if norm.bias is not None:
                values.new[f"{path}.bias"] = norm.bias.detach().double()
        else:
            _fold(structure, values, norm, path, scale, short)
        norms[path] = said
    for writer in stream.writers:
        value = values[writer.name]
        value = value - value.mean(writer.axis, keepdim=True)
        values.new[writer.name] = value.narrow(writer.axis, 0, stream.width - 1) if short else value
    tensors = values.rounded(model)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    data = {"pass": method, "method": method, "norms": norms, "shapes": shapes}
    return Record(RENORM, stream.norms[0], data, tensors)


def fold_gain(structure: Structure, model: nn.Module, path: str, *, method: str) -> Record:
    """Gain and bias of any norm, whatever it divides by, into its readers; the norm keeps a gain of 1 and a bias of 0."""
    values = _Values(model)
    norm: Any = model.get_submodule(path)
    offset = structure.norms[path].offset
    _fold(structure, values, norm, path, 1.0, False, offset=offset)
    values.new[f"{path}.weight"] = torch.full_like(norm.weight.detach().double(), 1.0 - offset)
    if getattr(norm, "bias", None) is not None:
        values.new[f"{path}.bias"] = torch.zeros_like(norm.bias.detach().double())
    tensors = values.rounded(model)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Record(RENORM, path, {"pass": method, "method": method, "norms": {}, "shapes": shapes}, tensors)


def _fold(
    structure: Structure, values: _Values, norm: Any, path: str, scale: float, short: bool, *, offset: float = 0.0
) -> None:
    """g, b and a scale into the readers of a norm; with `short` its last channel, too."""
    gain = (norm.weight.detach().double() + offset) * scale
    bias = getattr(norm, "bias", None)
    readers = structure.norms[path]
    for module_path, name in zip(readers.modules, readers.weights, strict=True):
        module: Any = values.model.get_submodule(module_path)
        axis = _input_axis(module)
        weight = values[name]
        if bias is not None:
            key = f"{module_path}.bias"
            shift = weight @ bias.detach().double() if axis == 1 else bias.detach().double() @ weight
            values.new[key] = shift if module.bias is None else values[key] + shift
        weight = weight * (gain if axis == 1 else gain[:, None])
        if short:
            width = weight.shape[axis]
            weight = weight.narrow(axis, 0, width - 1) - weight.narrow(axis, width - 1, 1)
        values.new[name] = weight


def _input_axis(module: nn.Module) -> int | None:
    """The axis of inputs of a module's weight: 1 in `nn.Linear`, 0 in the `Conv1D` of transformers."""
    if type(module) is nn.Linear or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return 1
    return 0 if type(module).__name__ == "Conv1D" else None


class _Values:
    """Parameters in float64 as they are, or as they will be."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.new: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.new[name] if name in self.new else self.model.get_parameter(name).detach().double()

    def rounded(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value.to(_dtype_of(model, name)).contiguous() for name, value in self.new.items()}


def _dtype_of(model: nn.Module, name: str) -> torch.dtype:
    module_path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(module_path)
    own = getattr(module, attribute, None)
    if own is None:
        own = module.weight if module.weight is not None else next(model.parameters())
    return own.dtype


# --- ties -------------------------------------------------------------------------------------------


def ties_in_the_way(structure: Structure) -> dict[str, tuple[str, ...]]:
    """Canonical name of each writer -> its other names, which must become parameters of their own."""
    found = {}
    for stream in structure.streams:
        for writer in () if stream.reason else stream.writers:
            names = structure.parameters[writer.name].names
            if len(names) > 1:
                found[writer.name] = names[1:]
    return found


def untie(canonical: str, names: Iterable[str]) -> Record:
    """The record that gives tied names parameters of their own."""
    return Record(RENORM, canonical, {"pass": "untie", "method": "untie", "untie": list(names), "untied": canonical})
