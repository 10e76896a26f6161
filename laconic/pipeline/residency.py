"""Where weights and activations are while a model is solved: in memory, or on disk and in memory for a moment.

A model that fits is simply there (`InMemory`). One that does not is a skeleton on meta (`Streamed`): a module's tensors
are read when its forward begins and dropped when it ends, a block's while it is held, and of an embedding table only the
rows that are looked up. Activations between blocks then wait in files (`Activations`), read and written with plain reads
and writes: pages of a memory-mapped file would count as resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laconic.errors import BadInput
from laconic.nn.packed import op_of
from laconic.tasks.base import inputs_on

from .source import Source
from .tensorfile import bytes_of


class Solved(Protocol):
    """A tensor's compressed form."""

    def value(self) -> Tensor:
        """What it stands for."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of it."""
        ...


class InMemory:
    """The whole model is there."""

    streamed = False

    def running(self) -> AbstractContextManager[None]:
        """While modules outside the held ones run."""
        return nullcontext()

    def hold(self, path: str) -> AbstractContextManager[None]:
        """While the modules under `path` are worked on."""
        return nullcontext()


class Streamed:
    """The model is a skeleton; tensors come when they are needed.

    Args:
        model: on meta; non-persistent buffers are real.
        source: of its float tensors.
        solved: what a tensor has become, or None while it is what it was.
    """

    streamed = True

    def __init__(self, model: nn.Module, source: Source, solved: Callable[[str], Solved | None]):
        self.model, self.source, self.solved = model, source, solved
        self._paths = {id(tensor): name for name, tensor in _named(model).items()}
        self._absent: dict[tuple[int, str], Tensor] = {}  # what stood on meta before it was read
        self._users: dict[int, int] = {}  # how many need a module's tensors now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Any module may run: its own tensors are read before it and dropped after it."""
        handles = []
        for module in self.model.modules():
            if any(_on_meta(t) for t in _own(module).values()) and op_of(module, "weight") != "embedding":
                handles.append(module.register_forward_pre_hook(lambda m, args: self._fill(m)))
                handles.append(module.register_forward_hook(lambda m, args, out: self._drop(m), always_call=True))
        try:
            with _RowLookup(self), inputs_on("cpu"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def hold(self, path: str) -> Iterator[None]:
        """All modules under `path` have their tensors."""
        modules = list(self.model.get_submodule(path).modules())
        for module in modules:
            self._fill(module)
        try:
            yield
        finally:
            for module in modules:
                self._drop(module)

    def read(self, name: str) -> Tensor:
        """The value of a tensor, as compressed as it is by now."""
        solved = self.solved(name)
        return self.source.read(name) if solved is None else solved.value().to(self.source.spec(name)[0])

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Some rows of a matrix, read one by one where it is still float."""
        solved = self.solved(name)
        if solved is not None:
            return solved.rows(ids).to(self.source.spec(name)[0])
        return torch.cat([self.source.read(name, row, row + 1) for row in ids.tolist()])

    def _fill(self, module: nn.Module) -> None:
        self._users[id(module)] = self._users.get(id(module), 0) + 1
        for attribute, tensor in _own(module).items():
            if _on_meta(tensor):
                self._absent[id(module), attribute] = tensor
                value = self.read(self._paths[id(tensor)])
                _set(module, attribute, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)

    def _drop(self, module: nn.Module) -> None:
        self._users[id(module)] -= 1
        if self._users[id(module)]:
            return  # it runs within a block that is held
        for attribute in list(_own(module)):
            absent = self._absent.pop((id(module), attribute), None)
            if absent is not None:
                _set(module, attribute, absent)


class _RowLookup(TorchFunctionMode):
    """Looks up rows of embedding tables that are on meta in their file."""

    def __init__(self, residency: Streamed):
        super().__init__()
        self.residency = residency

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding:
            ids = args[0] if args else kwargs["input"]
            table = args[1] if len(args) > 1 else kwargs["weight"]
            if _on_meta(table):
                distinct, inverse = ids.unique(return_inverse=True)
                return self.residency.rows(self.residency._paths[id(table)], distinct)[inverse]
        return func(*args, **kwargs)


class Activations:
    """One tensor for every batch, in memory or in files of `folder`."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._held: list[Any] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._held)

    def append(self, value: Tensor) -> None:
        """Keep the next batch's."""
        self._held.append(None)
        self[len(self._held) - 1] = value

    def __getitem__(self, number: int) -> Tensor:
        held = self._held[number]
        if self.folder is None:
            return held
        dtype, shape = held
        data = np.fromfile(self.folder / f"{number}.bin", dtype=np.uint8)
        return torch.from_numpy(data).view(dtype).view(shape)

    def __setitem__(self, number: int, value: Tensor) -> None:
        if self.folder is None:
            self._held[number] = value
            return
        self._held[number] = (value.dtype, tuple(value.shape))
        try:
            (self.folder / f"{number}.bin").write_bytes(bytes_of(value.contiguous()))
        except OSError as error:
            raise BadInput(f"activations cannot be written to {self.folder}: {error.strerror}; make room") from error


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_buffers(remove_duplicate=True)),
        **dict(model.named_parameters(remove_duplicate=True)),
    }


def _own(module: nn.Module) -> dict[str, Tensor]:
    held = {**module._buffers, **module._parameters}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _on_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _set(module: nn.Module, attribute: str, value: Tensor) -> None:
    setattr(module, attribute, value)  # not into _parameters: nn.LSTM keeps a list of its own
