"""The contract of a Constraint: `project_(p)` puts a parameter back where it must be, after each step.

    Example(lambda: UnitNorm(dim=1), kind="Constraint", inputs=[(6, 4)], holds=lambda p: ...)

`inputs`: the parameter, (6, 4) where nothing is given. `holds(p)`: whether the constraint holds, up to the rounding of
the parameter's type; it says in an independent way what `project_` must reach.
With the trait "tangent": `tangent(p, x)` is the part of x along which p stays on the constraint to first order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from ..contract import Broken, needs, require
from ..example import Example
from ..tensors import close, copied, same


def check_constraint_holds_after_each_step(example: Example) -> None:
    """The constraint holds after every step of an optimizer that knows nothing of it."""
    rule, parameter = example.build(), _parameter(example)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: rule.project_(parameter))
    for step in range(5):
        parameter.grad = torch.randn(parameter.shape, generator=example.generator(step))
        optimizer.step()
        require(_holds(example, parameter), f"the constraint does not hold after step {step + 1}")


def check_constraint_idempotent(example: Example) -> None:
    """A parameter on the constraint stays where it is."""
    rule, parameter = example.build(), _parameter(example, torch.float64)
    rule.project_(parameter)
    before = copied([parameter])
    rule.project_(parameter)
    close([parameter], before, "projecting twice is not projecting once")


def check_constraint_no_gradient(example: Example) -> None:
    """It works in place on a leaf, outside of autograd, and leaves the gradient as it was."""
    rule, parameter = example.build(), _parameter(example)
    parameter.grad = torch.ones_like(parameter)
    place = parameter.data_ptr()
    rule.project_(parameter)
    require(parameter.is_leaf and parameter.grad_fn is None, "the projection is recorded by autograd")
    require(parameter.requires_grad, "the parameter is no longer trained")
    require(parameter.data_ptr() == place, "the parameter was moved instead of changed in place")
    same([parameter.grad], [torch.ones_like(parameter)], "the gradient was changed")


def check_constraint_dtypes(example: Example) -> None:
    """It keeps the parameter's type, and holds in float32, float64 and bfloat16."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rule, parameter = example.build(), _parameter(example, dtype)
        rule.project_(parameter)
        require(parameter.dtype == dtype, f"a {dtype} parameter became {parameter.dtype}")
        require(bool(torch.isfinite(parameter).all()), f"the projection in {dtype} is not finite")
        require(_holds(example, parameter), f"the constraint does not hold in {dtype}")


@needs("tangent")
def check_constraint_tangent(example: Example) -> None:
    """A step along the tangent leaves the constraint by the square of its length only, and tangents are kept."""
    rule, parameter = example.build(), _parameter(example, torch.float64)
    rule.project_(parameter)
    point = parameter.detach()
    direction = torch.randn(point.shape, generator=example.generator(1), dtype=torch.float64)
    along = rule.tangent(point, direction)
    close(rule.tangent(point, along), along, "the tangent part of a tangent is another")
    length = 1e-5
    moved = nn.Parameter(point + length * along)
    back = moved.detach().clone()
    rule.project_(moved)
    drift = float((moved.detach() - back).norm()) / length
    require(
        drift <= 1e-2 * max(1.0, float(along.norm())),
        f"a step of {length} along the tangent drifts by {drift:.3g} of it",
    )


def _parameter(example: Example, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(example.arguments([(6, 4)], dtype=dtype)[0])


def _holds(example: Example, parameter: Tensor) -> bool:
    if example.holds is None:
        raise BadInput(f"the example {example.name} does not say what must hold: give Example(holds=...)")
    verdict = example.holds(parameter.detach())
    if not isinstance(verdict, (bool, Tensor)):
        raise Broken(f"holds gave {type(verdict).__name__} where a bool is needed")
    return bool(verdict)
