"""The trace: what a forward pass did, as steps over numbered values; all that the readers of a structure see.

`Names` knows every name of a parameter and a module. `Trace` holds `Step`s in order, whichever tracer wrote them. `Held`
says which values are a parameter still, seen through casts, views and slices.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

__all__ = ["CASTS", "VIEWS", "Held", "Names", "Step", "Trace", "is_alias", "module_of"]


# --- names and ties ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """All names of a model's parameters and modules, and for each the canonical one."""

    parameters: dict[str, str]  # any name -> canonical name of the same storage
    modules: dict[str, str]  # any path -> first path of the same module

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        first: dict[object, str] = {}
        parameters = {
            name: first.setdefault(_storage_key(parameter), name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        modules = {path: first.setdefault(module, path) for path, module in model.named_modules(remove_duplicate=False)}
        return cls(parameters, modules)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Canonical parameter name -> all names, the canonical one first."""
        groups: dict[str, tuple[str, ...]] = {}
        for name, canonical in self.parameters.items():
            groups[canonical] = (*groups.get(canonical, ()), name)
        return groups


def _storage_key(tensor: Tensor) -> object:
    """What two parameters share when they are the same numbers; on meta too, which has no pointers."""
    if type(tensor.data) is not Tensor:
        return id(tensor)  # a subclass may have no storage of its own
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def module_of(name: str) -> str:
    """Path of the module that holds the parameter or buffer `name`."""
    return name.rpartition(".")[0]


# --- steps and values -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One operation of the forward pass.

    Attributes:
        op: its name without namespace, overload and in-place mark: "linear", "add".
        module: path of the innermost module that was running.
        call: the same for every step of one call of the module, and different for its next call.
        inputs: (argument name, value) of every tensor that it reads.
        outputs: the values that it makes.
        options: its other arguments.
    """

    op: str
    module: str
    call: str
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]

    @property
    def source(self) -> int:
        """The first tensor that it reads."""
        return self.inputs[0][1]


@dataclass
class Trace:
    """The steps of one forward pass over numbered values (tensors), in order."""

    how: str
    why: str = ""
    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # by value
    parameters: dict[int, str] = field(default_factory=dict)  # value -> canonical name
    buffers: dict[int, str] = field(default_factory=dict)
    results: set[int] = field(default_factory=set)  # values that the model returns, or that leave our sight
    order: list[str] = field(default_factory=list)  # module paths as they are called

    def new(self, shape: tuple[int, ...]) -> int:
        """A new value."""
        self.shapes.append(shape)
        return len(self.shapes) - 1

    @functools.cached_property
    def consumers(self) -> dict[int, list[tuple[Step, str]]]:
        """Value -> the steps that read it, with the argument's name."""
        found: dict[int, list[tuple[Step, str]]] = defaultdict(list)
        for step in self.steps:
            for argument, value in step.inputs:
                found[value].append((step, argument))
        return found

    @functools.cached_property
    def held(self) -> dict[int, Held]:
        """Value -> the parameter that it is an alias of."""
        return _held_parameters(self)

    @functools.cached_property
    def producers(self) -> dict[int, Step]:
        """Value -> the step that makes it."""
        return {value: step for step in self.steps for value in step.outputs}


# --- values that are a parameter --------------------------------------------------------------------

CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
CASTS |= {"data", "alias", "lift_fresh", "lift_fresh_copy", "identity"}
_TURNS = {"transpose", "t", "T", "mT", "permute", "movedim", "moveaxis", "numpy_T"}
VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as"}
VIEWS |= {"broadcast_to", "reshape_as", "_unsafe_view", "ravel"}
_PARTS = {"chunk", "split", "split_with_sizes", "tensor_split", "narrow"}
_PARTS |= {"unbind", "getitem", "select", "slice"}
_ALIASES = CASTS | _TURNS | VIEWS | _PARTS
_GATHERS = {"index", "index_select"}  # W[ids]: an alias of a stack of experts, a read of a table
_EXPERT_PICKS = {"select", "getitem", "unbind", *_GATHERS}


@dataclass(frozen=True)
class Held:
    """The parameter that a value is, seen through casts, views and slices."""

    name: str
    ndim: int  # of the parameter itself
    turned: bool = False  # its last two axes are swapped
    reshaped: bool = False  # its axes are others
    part: bool = False  # a chunk or a slice of it; one expert's matrix counts as whole

    def after(self, step: Step, before: tuple[int, ...], after: tuple[int, ...]) -> Held:
        """What it is after an alias step that leads from one shape to another."""
        if step.op in VIEWS and [n for n in before if n != 1] != [n for n in after if n != 1]:
            return replace(self, reshaped=True)
        if step.op in _TURNS:
            swapped = _swaps_last_two(step, len(before))
            return replace(self, turned=self.turned != swapped, reshaped=self.reshaped or not swapped)
        if step.op in _PARTS | _GATHERS and not (self.ndim == 3 and step.op in _EXPERT_PICKS):
            return replace(self, part=True)
        return self


def _held_parameters(trace: Trace) -> dict[int, Held]:
    """Value -> the parameter that it is an alias of."""
    shapes = trace.shapes
    held = {value: Held(name, len(shapes[value])) for value, name in trace.parameters.items()}
    for step in trace.steps:
        if step.inputs and step.source in held and is_alias(step, held[step.source]):
            parameter = held[step.source]
            for value in step.outputs:
                held[value] = parameter.after(step, shapes[step.source], shapes[value])
    return held


def is_alias(step: Step, parameter: Held) -> bool:
    """Whether a step only passes on a parameter that it reads first."""
    if step.op in _GATHERS:
        return parameter.ndim >= 3
    return step.op in _ALIASES


def _swaps_last_two(step: Step, ndim: int) -> bool:
    """Whether a step swaps the last two of `ndim` axes."""
    if step.op in ("t", "T", "mT", "numpy_T"):
        return ndim >= 2
    if step.op == "transpose":
        pair = {step.options.get("dim0"), step.options.get("dim1")}
        return ndim >= 2 and {axis % ndim for axis in pair if isinstance(axis, int)} == {ndim - 2, ndim - 1}
    if step.op == "permute":
        axes = [axis % ndim for axis in step.options.get("dims", ())]
        return axes[-2:] == [ndim - 1, ndim - 2]
    return False
