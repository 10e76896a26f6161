"""The contract of a Loss: a callable or an `nn.Module` with `reduction`, or a regulariser over parameters.

    Example(lambda reduction="mean": MRLLoss(reduction=reduction), kind="Loss", inputs=[(4, 8), Ints((4,), 3)])

`make` takes `reduction` ("none", "mean", "sum") unless the object is a regulariser. `inputs`: one entry per argument, the
first dimension is the batch; for a regulariser the list or module it is called with.
`stated["differentiable"]`: the places of the arguments that gradients flow to (default: the first).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from ..contract import Broken, LeftOut, require
from ..example import Example
from ..tensors import cast, close, copied, floats, gradcheck, same, tensors
from ._modules import finite


def check_loss_scalar(example: Example) -> None:
    """The value is one finite number that carries a gradient."""
    arguments = example.arguments()
    leaves = _leaves(example, arguments)
    value = example.build()(*arguments)
    require(isinstance(value, Tensor) and value.ndim == 0, f"the value is {value!r}, not a tensor of one number")
    finite(value, "the value")
    require(value.requires_grad, "the value carries no gradient")
    value.backward()
    for i, leaf in enumerate(leaves):
        require(leaf.grad is not None, f"no gradient reaches differentiable tensor {i}")
        finite(leaf.grad, f"the gradient of differentiable tensor {i}")


def check_loss_gradient(example: Example) -> None:
    """The backward is the derivative, unless another gradient is declared."""
    if {"gradient:surrogate", "gradient:stateful"} & set(example.traits):
        raise LeftOut("it declares another gradient")
    arguments = example.arguments(dtype=torch.float64)
    loss = example.build()
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    leaves = _leaves(example, arguments)

    def function(*variables: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(*_replaced(arguments, dict(zip(map(id, leaves), variables, strict=True))))

    gradcheck(function, leaves, "the loss")


def check_loss_reductions(example: Example) -> None:
    """ "mean" and "sum" are the mean and the sum of "none", and another word is refused."""
    if "regulariser" in example.traits:
        raise LeftOut("it declares 'regulariser'")
    require(example.takes("reduction"), "make does not take `reduction`: a loss has one, as torch's losses do")
    each, mean, total = (example.build(reduction=r)(*example.arguments()) for r in ("none", "mean", "sum"))
    require(each.ndim >= 1, 'reduction="none" gives one number')
    close(mean, each.mean(), 'reduction="mean" is not the mean of "none"')
    close(total, each.sum(), 'reduction="sum" is not the sum of "none"')
    try:
        example.build(reduction="typo")(*example.arguments())
    except (ValueError, BadInput) as error:
        require("typo" in str(error), f"the refusal of reduction='typo' does not say what was found: {error}")
    else:
        raise Broken("reduction='typo' is taken without a word")


def check_loss_empty(example: Example) -> None:
    """An empty batch is refused or has a finite value: never NaN."""
    _refused_or_finite(example, _first(example.arguments(), 0), "nothing")


def check_loss_single(example: Example) -> None:
    """A single item is refused or has a finite value: never NaN."""
    if "regulariser" in example.traits:
        raise LeftOut("it declares 'regulariser'")
    refused = _refused_or_finite(example, _first(example.arguments(), 1), "a single item")
    require(refused or "pairwise" not in example.traits, "it declares 'pairwise' and takes a single item")
    require(not refused or "pairwise" in example.traits, "a single item is refused: declare 'pairwise' if it must be")


def check_loss_keeps_input(example: Example) -> None:
    """The input is not changed in place."""
    arguments = example.arguments()
    before = copied(list(_parts(arguments)))
    example.build()(*arguments)
    same(list(_parts(arguments)), before, "the input was changed in place")


def check_loss_dtypes(example: Example) -> None:
    """float64 gives the same value more exactly, and bfloat16 gives a finite one."""
    values = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        loss = example.build()
        loss = loss.to(dtype) if isinstance(loss, nn.Module) else loss
        values[dtype] = loss(*cast(example.arguments(), dtype))
        finite(values[dtype], f"the value in {dtype}")
    close(values[torch.float32], values[torch.float64], "float32 and float64 disagree", tolerance=1e-4)
    require(values[torch.float64].dtype == torch.float64, "float64 input gives a value of another type")


def _leaves(example: Example, arguments: tuple) -> list[Tensor]:
    """The tensors that gradients flow to, made leaves that require one."""
    places = example.stated.get("differentiable", (0,))
    found = [t for place in places for t in floats(list(_parts((arguments[place],))))]
    return [t.requires_grad_() for t in found]


def _parts(arguments: tuple) -> list[Tensor]:
    """All tensors of the arguments, those of modules included."""
    return [t for a in arguments for t in (list(a.parameters()) if isinstance(a, nn.Module) else tensors(a))]


def _replaced(value: Any, by: dict[int, Tensor]) -> Any:
    """The same nesting with some tensors replaced, by identity."""
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(v, by) for v in value)
    if isinstance(value, dict):
        return {k: _replaced(v, by) for k, v in value.items()}
    if isinstance(value, nn.Module):
        raise LeftOut("it is called with a module: a test of its own must check the gradient")
    return value


def _first(arguments: tuple, count: int) -> tuple:
    """The first items of a batch; for a regulariser's list or module, the first parameters."""

    def cut(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return nn.Sequential()
        if isinstance(value, (list, tuple)):
            return type(value)(value[:count])
        return value[:count] if isinstance(value, Tensor) and value.ndim else value

    return tuple(cut(a) for a in arguments)


def _refused_or_finite(example: Example, arguments: tuple, what: str) -> bool:
    try:
        value = example.build()(*arguments)
    except (ValueError, BadInput):
        return True
    finite(torch.as_tensor(value), f"the value of {what}")
    return False
