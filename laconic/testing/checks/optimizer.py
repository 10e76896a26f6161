"""The contract of an Optimizer: a `torch.optim.Optimizer`.

    Example(lambda parameters: AdamP(parameters, lr=0.02), kind="Optimizer", reference=naive_steps)

`make` gets the parameters (or groups of them). `inputs`: the parameters, (4, 3) and (3,) where nothing is given.
`reference(values, gradients)`: the equations written out: from the initial values (a list of tensors) and the gradients
(a list per step, one tensor per parameter, float64) the values after the last step. Without it the recorded vectors
must hold the equations.
`stated["steps"]` and `stated["factor"]`: after so many steps (200) on a quadratic bowl the loss is below that factor
(0.1) of what it was, at the learning rate of `make`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from ..contract import Broken, LeftOut, needs, require
from ..example import Example
from ..tensors import close, copied, deep, plain, same


def check_optimizer_equations(example: Example) -> None:
    """Three steps give what the equations give."""
    if example.reference is None:
        raise LeftOut("it has no reference: the recorded vectors must hold the equations")
    parameters = _parameters(example, torch.float64)
    gradients = [_gradients(example, parameters, step) for step in range(3)]
    want = example.reference(copied(parameters), [copied(g) for g in gradients])
    _run(example, _optimizer(example, parameters), parameters, gradients)
    close(parameters, list(want), "three steps give other values than the equations")


def check_optimizer_resumes(example: Example) -> None:
    """Stopped after three steps and resumed from its state dict, it goes on bit for bit."""
    through, stopped = _parameters(example), _parameters(example)
    gradients = [_gradients(example, through, step) for step in range(6)]
    _run(example, _optimizer(example, through), through, gradients)
    first = _optimizer(example, stopped)
    _run(example, first, stopped, gradients[:3])
    state = deep(first.state_dict())
    require(plain(state), "the state dict holds what cannot be written without pickle")
    resumed = [nn.Parameter(p.detach().clone()) for p in stopped]
    second = _optimizer(example, resumed)
    second.load_state_dict(state)
    _run(example, second, resumed, gradients[3:])
    same(resumed, through, "a resumed run goes another way")


def check_optimizer_groups(example: Example) -> None:
    """Each group has its own options, which are read at every step."""
    parameters = _parameters(example) + _parameters(example)
    half = len(parameters) // 2
    optimizer = example.build([{"params": parameters[:half]}, {"params": parameters[half:], "lr": 0.0}])
    before = copied(parameters)
    gradients = [_gradients(example, parameters, step) for step in range(2)]
    _run(example, optimizer, parameters, gradients[:1])
    same(parameters[half:], before[half:], "a group with lr 0 moved")
    require(_moved(parameters[:half], before[:half]), "a group with the default lr did not move")
    optimizer.param_groups[0]["lr"] = 0.0
    before = copied(parameters)
    _run(example, optimizer, parameters, gradients[1:])
    same(parameters, before, "a learning rate changed between steps is not read")


def check_optimizer_adds_group(example: Example) -> None:
    """A group added later is trained."""
    parameters, more = _parameters(example), _parameters(example)
    optimizer = _optimizer(example, parameters)
    _run(example, optimizer, parameters, [_gradients(example, parameters, 0)])
    optimizer.add_param_group({"params": more})
    before = copied(more)
    _run(example, optimizer, parameters + more, [_gradients(example, parameters + more, 1)])
    require(_moved(more, before), "a group that was added later does not move")


def check_optimizer_closure(example: Example) -> None:
    """`step(closure)` calls it with gradients enabled and returns its loss."""
    parameters = _parameters(example)
    optimizer = _optimizer(example, parameters)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        require(torch.is_grad_enabled(), "the closure is called without gradients")
        optimizer.zero_grad()
        losses.append(_bowl(parameters))
        losses[-1].backward()
        return losses[-1]

    returned = optimizer.step(closure)
    require(losses, "the closure is not called")
    require(returned is not None, "step(closure) does not return the loss")
    require(
        any(torch.equal(torch.as_tensor(returned).detach(), loss.detach()) for loss in losses),
        "step(closure) returns another loss",
    )


def check_optimizer_skips_missing_gradient(example: Example) -> None:
    """A parameter without a gradient is left alone."""
    parameters = _parameters(example) + _parameters(example)
    optimizer = _optimizer(example, parameters)
    frozen = parameters[-1]
    before = copied([frozen])

    def partial() -> None:
        for p, g in zip(parameters, _gradients(example, parameters, 0), strict=True):
            p.grad = None if p is frozen else g

    _step(example, optimizer, partial)
    same([frozen], before, "a parameter without gradient moved")


def check_optimizer_dtypes(example: Example) -> None:
    """float32, float64 and bfloat16 parameters keep their type, move, and stay finite."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        parameters = _parameters(example, dtype)
        before, optimizer = copied(parameters), _optimizer(example, parameters)
        for step in range(3):
            _run(example, optimizer, parameters, [_gradients(example, parameters, step)])
            for parameter in parameters:
                require(parameter.dtype == dtype, f"a {dtype} parameter became {parameter.dtype}")
                require(bool(torch.isfinite(parameter).all()), f"a {dtype} parameter is not finite after a step")
        require(_moved(parameters, before), f"{dtype} parameters did not move")


def check_optimizer_sparse(example: Example) -> None:
    """Sparse gradients are refused with a sentence, or work where the trait says so."""
    parameters = _parameters(example)
    optimizer = _optimizer(example, parameters)
    before = copied(parameters)

    def sparse() -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter).to_sparse()

    if "sparse" in example.traits:
        _step(example, optimizer, sparse)
        require(_moved(parameters, before), "it declares 'sparse' and does not move")
        return
    try:
        _step(example, optimizer, sparse)
    except (RuntimeError, ValueError, BadInput) as error:
        require("sparse" in str(error).lower(), f"the refusal of a sparse gradient does not say so: {error}")
    else:
        raise Broken("a sparse gradient is taken without a word: refuse it, or declare 'sparse'")


def check_optimizer_converges(example: Example) -> None:
    """It goes down a quadratic bowl."""
    parameters = _parameters(example)
    optimizer = _optimizer(example, parameters)
    begin = float(_bowl(parameters).detach())
    for _ in range(int(example.stated.get("steps", 200))):
        optimizer.step(_closure(optimizer, parameters))
    end, factor = float(_bowl(parameters).detach()), float(example.stated.get("factor", 0.1))
    require(end < factor * begin, f"the loss went from {begin:.4g} to {end:.4g}, and {factor} of the first is stated")


def check_optimizer_keeps_gradients(example: Example) -> None:
    """Gradients are read, not changed."""
    if "closure" in example.traits:
        raise LeftOut("its closure computes gradients anew")
    parameters = _parameters(example)
    gradients = _gradients(example, parameters, 0)
    _run(example, _optimizer(example, parameters), parameters, [copied(gradients)])
    same([p.grad for p in parameters], gradients, "a step changed the gradients in place")


def check_optimizer_zero_gradient(example: Example) -> None:
    """Gradients that are exactly zero give finite values."""
    parameters = _parameters(example)
    zeros = [[torch.zeros_like(p) for p in parameters]] * 2
    _run(example, _optimizer(example, parameters), parameters, zeros)
    for parameter in parameters:
        require(bool(torch.isfinite(parameter).all()), "a gradient of zero gives values that are not finite")


def check_optimizer_refuses_negative_lr(example: Example) -> None:
    """A negative learning rate is refused."""
    parameters = _parameters(example)
    kind = type(_optimizer(example, parameters))
    try:
        kind(parameters, lr=-1.0)
    except (ValueError, BadInput) as error:
        require("-1" in str(error), f"the refusal of lr=-1.0 does not say what was found: {error}")
    else:
        raise Broken("a learning rate of -1 is taken without a word")


def _parameters(example: Example, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in example.arguments([(4, 3), (3,)], dtype=dtype)]


def _optimizer(example: Example, parameters: list[nn.Parameter]) -> Any:
    optimizer = example.build(parameters)
    require(isinstance(optimizer, torch.optim.Optimizer), f"{type(optimizer).__name__} is no torch.optim.Optimizer")
    return optimizer


def _gradients(example: Example, parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = example.generator(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]


def _run(example: Example, optimizer: Any, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for given in gradients:

        def assign(given: list[Tensor] = given) -> None:
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient.clone()

        _step(example, optimizer, assign)


def _step(example: Example, optimizer: Any, assign: Any) -> None:
    if "closure" not in example.traits:
        assign()
        optimizer.step()
        return

    def closure() -> Tensor:
        assign()
        return torch.zeros(())

    optimizer.step(closure)


def _bowl(parameters: list[nn.Parameter]) -> Tensor:
    """sum_i c_i (p_i - 1)^2 / 2 with curvatures from 0.5 to 2, per parameter."""
    total = torch.zeros((), dtype=parameters[0].dtype)
    for parameter in parameters:
        curvature = torch.linspace(0.5, 2.0, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        total = total + (curvature * (parameter - 1).square()).sum() / 2
    return total


def _closure(optimizer: Any, parameters: list[nn.Parameter]) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _bowl(parameters)
        loss.backward()
        return loss

    return closure


def _moved(now: list[nn.Parameter], before: list[Tensor]) -> bool:
    return any(not torch.equal(a.detach(), b) for a, b in zip(now, before, strict=True))


@needs("closure")
def check_optimizer_needs_closure(example: Example) -> None:
    """One that needs a closure says so when there is none."""
    parameters = _parameters(example)
    optimizer = _optimizer(example, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, ValueError, TypeError, BadInput) as error:
        require("closure" in str(error), f"the refusal of a step without closure does not say so: {error}")
    else:
        raise Broken("a step without closure is taken: it does not need the trait 'closure'")
