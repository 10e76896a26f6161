"""Comparing what objects give: tensors in any nesting, bit for bit or up to rounding."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from .contract import Broken, require

__all__ = [
    "cast",
    "close",
    "copied",
    "deep",
    "floats",
    "gradcheck",
    "module_state",
    "plain",
    "require_unchanged",
    "same",
    "shape_of",
    "tensors",
]

# What sums in another order may differ by, relative to the largest value.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tensors(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors(getattr(value, f.name))]
    return []


def floats(value: Any) -> list[Tensor]:
    """The floating-point ones among the tensors."""
    return [t for t in tensors(value) if t.is_floating_point()]


def shape_of(value: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors."""
    return [tuple(t.shape) for t in tensors(value)]


def copied(value: Any) -> list[Tensor]:
    """Copies of all tensors, to compare with later."""
    return [t.detach().clone() for t in tensors(value)]


def same(got: Any, want: Any, otherwise: str) -> None:
    """Require the same tensors, bit for bit, of the same types and shapes; NaN equals itself.

    Raises:
        Broken: with `otherwise` and the first difference.
    """
    ours, theirs = tensors(got), tensors(want)
    require(len(ours) == len(theirs), f"{otherwise} ({len(ours)} tensors for {len(theirs)})")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.detach(), b.detach()
        require(a.dtype == b.dtype and a.shape == b.shape, f"{otherwise} (tensor {i}: {_kind(a)} for {_kind(b)})")
        if not torch.equal(a, b):
            alike = (a == b) | ((a != a) & (b != b))
            if not alike.all():
                raise Broken(f"{otherwise} (tensor {i}: {int((~alike).sum())} of {a.numel()} values differ)")


def close(got: Any, want: Any, otherwise: str, *, tolerance: float | None = None) -> None:
    """Require the same tensors up to the rounding of their types, or up to `tolerance`, relative to the largest value.

    Raises:
        Broken: with `otherwise` and the largest difference.
    """
    ours, theirs = tensors(got), tensors(want)
    require(len(ours) == len(theirs), f"{otherwise} ({len(ours)} tensors for {len(theirs)})")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.detach(), b.detach()
        require(a.shape == b.shape, f"{otherwise} (tensor {i}: shape {tuple(a.shape)} for {tuple(b.shape)})")
        allowed = tolerance if tolerance is not None else max(_ROUNDING.get(a.dtype, 0), _ROUNDING.get(b.dtype, 0))
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        limit = allowed * max(1.0, float(b.abs().nan_to_num(0, 0, 0).max()) if b.numel() else 1.0)
        if not torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True):
            worst = float((a - b).abs().nan_to_num(torch.inf).max())
            raise Broken(f"{otherwise} (tensor {i}: off by {worst:.3g}, and {limit:.3g} is allowed)")


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor of a nesting in another type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast(v, dtype) for v in value)
    if isinstance(value, Mapping):
        return {k: cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, nn.Module) else value


def module_state(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a forward could change: parameters, buffers, gradients, modes and hooks."""
    gradients = {n: None if p.grad is None else p.grad.detach().clone() for n, p in module.named_parameters()}
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in module.named_buffers()},
        "gradients": {n: g for n, g in gradients.items() if g is not None},
        "training": {n: m.training for n, m in module.named_modules()},
        "trainable": {n: p.requires_grad for n, p in module.named_parameters()},
        "hooks": {n: _hooks(m) for n, m in module.named_modules()},
        "classes": {n: type(m).__qualname__ for n, m in module.named_modules()},
    }


def require_unchanged(module: nn.Module, before: Mapping[str, Any], who: str) -> None:
    """Require that a module is as `module_state` found it.

    Raises:
        Broken: naming what was changed.
    """
    after = module_state(module)
    for what, value in before.items():
        require(list(after[what]) == list(value), f"{who} changed which {what} the model has")
        if what in ("parameters", "buffers", "gradients"):
            for name, tensor in value.items():
                same(after[what][name], tensor, f"{who} changed the {what} of the model at {name!r}")
        else:
            changed = [name for name in value if after[what][name] != value[name]]
            require(not changed, f"{who} changed the {what} of the model at {changed[:3]}")


def gradcheck(function: Callable[..., Any], variables: list[Tensor], who: str) -> None:
    """Hold the backward against differences in float64, along random directions.

    Raises:
        Broken: the gradient is not the derivative.
    """
    leaves = tuple(v.detach().clone().double().requires_grad_() for v in variables)
    require(leaves, f"{who} has no floating-point input and no parameter to differentiate")
    try:
        torch.autograd.gradcheck(function, leaves, fast_mode=True)
    except GradcheckError as error:
        raise Broken(f"{who}: the gradient is not the derivative: {' '.join(str(error).split())[:400]}") from error


def plain(value: Any) -> bool:
    """Whether a state can be written without pickle: numbers, texts, None and tensors in lists and mappings."""
    if isinstance(value, Mapping):
        return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, bytes, Tensor))


def deep(state: Any) -> Any:
    """A copy that shares nothing."""
    return copy.deepcopy(state)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _hooks(module: nn.Module) -> tuple[int, ...]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return tuple(len(getattr(module, name, ())) for name in names)
