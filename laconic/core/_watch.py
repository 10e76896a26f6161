"""The second tracer: one watched forward call. Module hooks say who runs, a torch function mode says what."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ._trace import CASTS, Names, Step, Trace
from ._tracing import Example, calls_recorded, op_name, quiet, returned, tensors_in
from .modes import evaluating

__all__ = ["by_hooks", "by_hooks_for_real"]


def by_hooks(shadow: nn.Module, example: Example, mode: FakeTensorMode, names: Names) -> Trace:
    """Trace by watching the shadow's forward: module hooks say who runs, a function mode says what."""
    return _watch(shadow, example, names, mode)


def by_hooks_for_real(model: nn.Module, example: Example, names: Names) -> Trace:
    """Trace by watching the model itself, and put back whatever a forward pass may have changed."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]), evaluating(model):
            return _watch(model, example, names, nullcontext())
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])


def _watch(model: nn.Module, example: Example, names: Names, context: Any) -> Trace:
    """Run the model's forward once and write down every torch function that it calls."""
    trace = Trace("hooks")
    watcher = _Watcher(trace)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trace.parameters[watcher.value(parameter)] = names.parameters[name]
    for name, buffer in model.named_buffers():
        trace.buffers[watcher.value(buffer)] = name
    args, kwargs = example
    with calls_recorded(model, names, trace.order, watcher.stack), quiet(), torch.no_grad(), context:
        with watcher:
            output = model(*args, **kwargs)
        trace.results.update(watcher.value(tensor) for tensor in returned(output))
    return trace


class _Watcher(TorchFunctionMode):
    """Appends a step for every torch function.

    Tensors are told apart by identity; what is written in place gets a new value.

    What an outermost torch function calls inside is not seen, which matters for one of them alone: see
    `_EXPANDED` in `_uses.py`. Code that computes without torch functions is not seen either.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.stack: list[tuple[str, str]] = []
        self.values = WeakTensorKeyDictionary()

    def value(self, tensor: Tensor) -> int:
        """The number of a tensor, a new one if it was not met before."""
        if tensor not in self.values:
            self.values[tensor] = self.trace.new(tuple(tensor.shape))
        return self.values[tensor]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function and write it down."""
        named = _named_arguments(func, args, kwargs or {})
        inputs = tuple((key, self.value(t)) for key, item in named.items() for t in tensors_in(item))
        output = func(*args, **(kwargs or {}))
        written = list(tensors_in(args[0] if op_name(func) == "setitem" else output))
        same = op_name(func) in CASTS and not _is_in_place(func) and output is next(iter(named.values()))
        if not inputs or not written or same:
            return output  # reads no tensor, makes none, or is a cast to the dtype that it has
        for tensor in written:
            self.values[tensor] = self.trace.new(tuple(tensor.shape))
        module, call = self.stack[-1] if self.stack else ("", "")
        made = tuple(self.values[tensor] for tensor in written)
        self.trace.steps.append(Step(_traced_op(func, inputs), module, call, inputs, made, _options(named)))
        return output


# --- the arguments of a torch function --------------------------------------------------------------

_INPUT_FIRST = ("input", "weight", "bias")
_POSITIONAL = {  # argument names of builtin functions, which have no signature; else self, arg1, arg2, ...
    **dict.fromkeys(["linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))], _INPUT_FIRST),
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot", "grouped_mm"], ("self", "other")),
    **dict.fromkeys(["addmm", "baddbmm"], ("self", "mat1", "mat2")),
    "grouped_mm_fallback": ("input", "weight"),
    "embedding": ("weight", "indices"),
    "transpose": ("self", "dim0", "dim1"),
    "permute": ("self", "dims"),
    "select": ("self", "dim", "index"),
    "getitem": ("self", "indices"),
    "add": ("self", "other"),
    "mul": ("self", "other"),
}


def _is_in_place(func: Any) -> bool:
    """Whether a torch function writes into its first argument: `add_`, `__iadd__`, `x[i] = y`."""
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") or name in ("__setitem__", *_IN_PLACE)


_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ipow__")


def _traced_op(func: Any, inputs: tuple[tuple[str, int], ...]) -> str:
    """The name that export would give a function: `x[...]` with tensors in the brackets is an "index"."""
    name = op_name(func)
    return "index" if name == "getitem" and len(inputs) > 1 else name


def _options(named: dict[str, Any]) -> dict[str, Any]:
    """The arguments that hold no tensor, and of those that do, how many items they have."""
    options: dict[str, Any] = {}
    for key, item in named.items():
        if not any(True for _ in tensors_in(item)):
            options[key] = item
        elif isinstance(item, (tuple, list)):
            options[f"len({key})"] = len(item)
    return options


def _named_arguments(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a torch function by name, as its Python signature or `_POSITIONAL` has them."""
    name = op_name(func)
    keys = _signature(func) or _POSITIONAL.get(name, ("self",))
    if getattr(func, "__name__", "") == "__rmatmul__":  # other @ self
        args = args[::-1]
    if name == "permute" and len(args) > 2:  # x.permute(0, 2, 1)
        args = (args[0], args[1:])
    keys = (*keys, *(f"arg{index}" for index in range(len(keys), len(args))))
    return {**dict(zip(keys, args, strict=False)), **kwargs}


@functools.cache
def _signature(func: Any) -> tuple[str, ...]:
    """Argument names of a function of `torch.nn.functional` that is written in Python, else ()."""
    if not inspect.isfunction(func) or not func.__module__.startswith("torch.nn.functional"):
        return ()
    return tuple(inspect.signature(func).parameters)
