"""What layers and models are both asked: one implementation, two contracts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laconic.errors import BadInput

from ..contract import Broken, require
from ..example import Example
from ..tensors import close, copied, floats, gradcheck, same, tensors

REFUSALS = (ValueError, BadInput, RuntimeError)


def state_round_trip(example: Example) -> None:
    """What a state dict holds is all that matters in evaluation mode."""
    first, arguments = example.build(), example.arguments()
    trained(first, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(example.seed + 1)  # other initial values: what is not in the state dict shows
        second = example.build()
    second.load_state_dict(first.state_dict(), strict=True)
    want, got = first.eval()(*arguments), second.eval()(*arguments)
    same(got, want, "an object that loaded the state dict gives another output")
    same(second.state_dict(), first.state_dict(), "the state dict after loading is another")


def trained(module: nn.Module, arguments: tuple) -> None:
    """Two steps in training mode, so that parameters and running statistics are no longer the initial ones."""
    module.train()
    for _ in range(2):
        module(*arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def eval_deterministic(example: Example) -> None:
    """In evaluation mode the same input gives the same bits, and nothing is changed on the way."""
    module, arguments = example.build(), example.arguments()
    trained(module, arguments)
    module.eval()
    before = copied(module.state_dict())
    first, second = module(*arguments), module(*arguments)
    same(second, first, "two calls in evaluation mode differ")
    same(module.state_dict(), before, "a call in evaluation mode changed the state")


def keeps_input(example: Example) -> None:
    """The input is as it was."""
    for training in (True, False):
        module, arguments = example.build().train(training), example.arguments()
        before = copied(arguments)
        module(*arguments)
        same(arguments, before, f"the input was changed in place ({'training' if training else 'evaluation'} mode)")


def exports(example: Example) -> None:
    """`torch.export` takes it, and what it exports computes the same."""
    module, arguments = example.build().eval(), example.arguments()
    with torch.no_grad():
        want = module(*arguments)
        exported = torch.export.export(module, arguments, strict=False).module()
        close(exported(*arguments), want, "the exported program gives another output")


def finite(value: Any, what: str) -> None:
    """Require that every floating-point tensor is finite."""
    for tensor in floats(value):
        require(bool(torch.isfinite(tensor).all()), f"{what} is not finite")


def gradients_arrive(module: nn.Module, arguments: tuple, inputs: Iterable[Tensor]) -> None:
    """Every trainable parameter and every floating-point input gets a finite gradient.

    Raises:
        Broken: one gets none, or one that is not finite.
    """
    outputs = [t for t in floats(module(*arguments)) if t.requires_grad]
    require(outputs, "no output carries a gradient")
    generator = torch.Generator().manual_seed(0)
    total = sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
    total.backward()  # type: ignore[union-attr]
    named = itertools.chain(module.named_parameters(), ((f"input {i}", x) for i, x in enumerate(inputs)))
    for name, tensor in named:
        if tensor.requires_grad:
            require(tensor.grad is not None, f"no gradient reaches {name}")
            finite(tensor.grad, f"the gradient of {name}")


def gradient_exact(module: nn.Module, arguments: tuple, who: str) -> None:
    """The backward is the derivative of the forward, for inputs and parameters, in the module's present mode."""
    module = module.double()
    names = [n for n, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
    parameters = dict(module.named_parameters())
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point()]

    def function(*variables: Tensor) -> tuple[Tensor, ...]:
        given = list(arguments)
        for place, value in zip(places, variables, strict=False):
            given[place] = value
        state = dict(zip(names, variables[len(places) :], strict=True))
        # Fresh buffers and the same random numbers each time: the function must be one.
        torch.manual_seed(0)
        fresh = {n: b.clone() for n, b in buffers.items()}
        return tuple(t for t in floats(functional_call(module, {**state, **fresh}, tuple(given))))

    variables = [arguments[i] for i in places] + [parameters[n] for n in names]
    gradcheck(function, variables, who)


def refuses(call: Any, arguments: tuple, right: tuple, what: str) -> None:
    """A wrong shape is refused by an error that names the size it found.

    Raises:
        Broken: it was taken, or refused by an error that does not help.
    """
    try:
        call(*arguments)
    except REFUSALS as error:
        text = str(error)
    except Exception as error:
        raise Broken(f"{what} raised {type(error).__name__} ({error}): a ValueError or BadInput is clear") from error
    else:
        raise Broken(f"{what} was taken without a word")
    sizes = {size for a, b in zip(tensors(arguments), tensors(right), strict=False) for size in _unlike(a, b)}
    require(any(str(size) in text for size in sizes), f"the error on {what} names none of {sorted(sizes)}: {text}")


def _unlike(wrong: Tensor, right: Tensor) -> set[int]:
    if wrong.ndim != right.ndim:
        return {wrong.ndim, right.ndim, *wrong.shape}
    return {w for w, r in zip(wrong.shape, right.shape, strict=True) if w != r}
