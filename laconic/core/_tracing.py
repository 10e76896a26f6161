"""What both tracers need: the model without its data, who runs at the moment, and plain names of operations."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ._trace import Names

__all__ = ["Example", "calls_recorded", "op_name", "quiet", "returned", "shadow_of", "tensors_in"]

Example = tuple[tuple, dict]


# --- the shadow: the model without its data ---------------------------------------------------------


def shadow_of(model: nn.Module, example: Example) -> tuple[nn.Module, Example, FakeTensorMode]:
    """A copy of the model in eval mode, and of its example, on fake tensors that pretend to be on the CPU.

    Fake tensors and not meta ones: a skeleton may mix meta parameters with real buffers, and a forward may
    make constants on the CPU and ask for their values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {}
    for tensor in _all_tensors(model):
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _fake(tensor, mode)
    shadow = copy.deepcopy(model, fakes).eval()
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: _fake(tensor, mode), example)
    return shadow, (args, kwargs), mode


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape, strides and dtype without data, a parameter where the other one is."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the tensors that modules keep as plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, (Tensor, list, tuple)):
                yield from tensors_in(value)


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))


def returned(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in what a model returns, in the attributes of objects of any kind too, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (tuple, list)):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from returned(item, seen)


# --- who runs, and what -----------------------------------------------------------------------------


@contextmanager
def calls_recorded(
    model: nn.Module, names: Names, order: list[str], stack: list[tuple[str, str]] | None = None
) -> Iterator[None]:
    """Append the path of every module that is called to `order`, and keep those that run on `stack`."""
    stack = [] if stack is None else stack
    counts: Counter[str] = Counter()

    def enter(path: str) -> None:
        counts[path] += 1
        order.append(path)
        stack.append((path, f"{path}@{counts[path]}"))

    with ExitStack() as handles:
        for path, module in model.named_modules():
            path = names.modules.get(path, path)
            before = module.register_forward_pre_hook(lambda *_, path=path: enter(path), prepend=True)
            after = module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True)
            handles.callback(before.remove)
            handles.callback(after.remove)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's own warnings, which are about its inner workings, from the user."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch._subclasses.fake_tensor", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def op_name(target: Any) -> str:
    """The plain name of an operator, a function, a method or a property: `aten.add_.Tensor` is "add"."""
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    if name == "__get__":
        name = getattr(target.__self__, "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in ("radd", "rmul", "rmatmul", "rtruediv", "iadd", "isub", "imul", "itruediv"):
            name = name[1:]
    name = name.removesuffix("_")
    return _SAME_OP.get(name, name)


_SAME_OP = {
    "truediv": "div",
    "multiply": "mul",
    "_grouped_mm": "grouped_mm",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_to_copy": "to",
}
