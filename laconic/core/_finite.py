"""Naming the module at which a training stopped being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import LaconicError

__all__ = ["NotFinite", "gradient_norm", "tensors_in", "why_gradient", "why_loss"]


class NotFinite(LaconicError):
    """A loss or a gradient is NaN or infinite; the weights are those before the step.

    Attributes:
        step: the optimizer step that was to be taken, the first being 1.
        module: path of the module where it began, or None where no module is to blame.
    """

    def __init__(self, message: str, step: int, module: str | None):
        super().__init__(message)
        self.step, self.module = step, module


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists, mappings and objects that are mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def finite(value: Any) -> bool:
    """Whether every floating-point number in a nest of tensors is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(value) if t.is_floating_point() or t.is_complex())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together; also sparse ones."""
    dense = [_dense(p.grad) for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(dense) if dense else torch.zeros(())


def why_loss(model: nn.Module, compute: Callable[[], Any], batches: Iterable[Any]) -> tuple[str, str | None]:
    """Where a loss that is not finite began: a sentence's end, and the module's path.

    Looks at the batch, at the parameters, then runs the forward again and watches every module's output. Modules are
    seen in the order in which they finish, so the first is the innermost.

    Args:
        model: with the weights of the bad step.
        compute: runs the forward again, as it was run.
        batches: what it is run on.
    """
    if not finite(list(batches)):
        return "the batch holds NaN or infinite values", None
    for name, parameter in model.named_parameters():
        if not finite(parameter.detach()):
            return f"the weights of {name} are not finite before the step", name.rpartition(".")[0]
    found: list[str] = []

    def watch(path: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not finite(output):
                found.append(path)

        return look

    # First in line, so that the model's own output is seen before other hooks of the loop have dealt with it.
    handles = [m.register_forward_hook(watch(path), prepend=True) for path, m in model.named_modules()]
    try:
        compute()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "every module's output is finite here: look at the loss function and at the hooks' terms", None
    module = model.get_submodule(found[0])
    return f"the first output that is not finite is that of {_called(found[0])} ({type(module).__name__})", found[0]


def why_gradient(model: nn.Module) -> tuple[str, str | None] | None:
    """Which gradient is not finite: a sentence's end and the module's path; None if all are finite.

    Gradients flow from the output to the input, so of the parameters, which are registered in about the order of the
    forward, the last one is where it began.
    """
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not finite(_dense(parameter.grad)):
            return f"the gradient of {name} is not finite, and the loss is", name.rpartition(".")[0]
    return None


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _called(path: str) -> str:
    return path or "the model itself"
