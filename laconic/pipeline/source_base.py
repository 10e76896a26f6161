"""What every source of a model offers: a skeleton on meta, and its tensors one by one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput, LaconicError
from laconic.numerics import count_not_finite
from laconic.pipeline.tensorfile import CHUNK, bytes_of, row_range, tensor_digest

__all__ = [
    "Example",
    "MemoryStore",
    "Source",
    "all_tensors",
    "check_finite",
    "first_line",
    "normal_example",
    "put",
    "stored_names",
    "tensor_owners",
]

Example = tuple[tuple, dict]


class Source(ABC):
    """A model as the user gave it, read tensor by tensor.

    Names are those of the module (`named_parameters`), never those of a file. A parameter with several names
    is listed under its first one; every other name works as well.

    Attributes:
        name: what to call the model in tables.
        kind: "transformers" or "module".
        size_before: bytes of the weight files as given, or of a safetensors file with the same tensors.
        config: the transformers config, or None.
        notes: sentences about what is odd in the source and was accepted.
    """

    name: str
    kind: str
    size_before: int
    config: Any
    notes: list[str]

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """A new copy in eval mode: what `names()` lists is on meta, ties are kept, other buffers are real."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every parameter and persistent buffer once, in the module's order."""

    @abstractmethod
    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, as the module holds it."""

    @abstractmethod
    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows `[start:stop)` of dimension 0 (all by default) of a tensor, on the CPU, in fresh memory."""

    @abstractmethod
    def example(self) -> Example:
        """`(args, kwargs)` of a tiny forward call, for tracing."""

    @abstractmethod
    def save_extras(self, folder: str | os.PathLike[str]) -> None:
        """Write what belongs to the model besides weights into `folder`: config, tokenizer, processor."""

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's dtype, shape and bytes, read in bounded chunks of rows."""
        dtype, shape = self.spec(name)
        return tensor_digest(dtype, shape, _row_chunks(self, name, dtype, shape))

    def fill(self, model: nn.Module, names: Iterable[str]) -> None:
        """Give the tensors of these names in a skeleton their values, wherever in the model they are shared.

        Raises:
            LaconicError: if the model has no such tensor, or one of another shape.
        """
        tensors, owners = all_tensors(model), tensor_owners(model)
        for name in names:
            if name not in tensors:
                raise LaconicError(f"the model has no parameter or buffer {name!r} to fill")
            old, value = tensors[name], self.read(name)
            if value.shape != old.shape:
                raise LaconicError(
                    f"{name} has shape {tuple(old.shape)} in the model, {tuple(value.shape)} here"
                )
            put(owners, old, value)

    def load(self) -> nn.Module:
        """The whole model on the CPU, in eval mode."""
        model = self.skeleton()
        self.fill(model, self.names())
        return model


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, under every name that they have."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def stored_names(model: nn.Module) -> list[str]:
    """Every parameter and persistent buffer once, under its first name."""
    names = [name for name, _ in model.named_parameters()]
    modules = dict(model.named_modules())
    for name, _ in model.named_buffers():
        path, _, attribute = name.rpartition(".")
        if attribute not in modules[path]._non_persistent_buffers_set:
            names.append(name)
    return names


Owners = dict[int, list[tuple[nn.Module, str]]]


def tensor_owners(model: nn.Module) -> Owners:
    """For each tensor (by id) the modules and attributes that hold it."""
    owners: Owners = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((module, attribute))
    return owners


def put(owners: Owners, old: Tensor, value: Tensor) -> None:
    """Put `value` wherever a model holds `old`, as a parameter if `old` is one."""
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    for module, attribute in owners[id(old)]:
        setattr(module, attribute, value)  # not into _parameters, because nn.LSTM keeps a list of its own


class MemoryStore:
    """Tensors that are in memory already, read like those of a `TensorReader`."""

    def __init__(self, tensors: Mapping[str, Tensor], size: int):
        self.size = size
        self.notes: list[str] = []
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        return self._tensors[name].dtype, tuple(self._tensors[name].shape)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """A copy of rows `[start:stop)` (all by default) on the CPU."""
        tensor = self._tensors[name].detach()
        if start is not None or stop is not None:
            start, stop = row_range(name, tuple(tensor.shape), start, stop)
            tensor = tensor[start:stop]
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def digest(self, name: str) -> str:
        """SHA-256 of the tensor's dtype, shape and bytes."""
        dtype, shape = self.spec(name)
        return tensor_digest(dtype, shape, _row_chunks(self, name, dtype, shape))


def _row_chunks(
    source: Source | MemoryStore, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Iterator[memoryview]:
    """The bytes of a tensor, some rows at a time."""
    if not shape or 0 in shape:
        yield bytes_of(source.read(name))
        return
    row = dtype.itemsize * torch.Size(shape[1:]).numel()
    step = max(1, CHUNK // row)
    for start in range(0, shape[0], step):
        yield bytes_of(source.read(name, start, min(start + step, shape[0])))


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        BadInput: naming the tensor and how many values are bad.
    """
    found = count_not_finite(tensor)
    if any(found):
        kinds = ((found.nan, "NaN"), (found.inf, "infinite"))
        what = " and ".join(f"{count} {kind}" for count, kind in kinds if count)
        raise BadInput(
            f"{name} holds {what} of {tensor.numel()} values: the weights are broken, use a sound checkpoint"
        )


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def normal_example(example: Any) -> Example:
    """`(args, kwargs)` from a tensor, a tuple of arguments, a dict of keywords, or such a pair itself."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        if len(example) == 2 and isinstance(example[0], (tuple, list)) and isinstance(example[1], Mapping):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    return (example,), {}
