"""The contract of a Weight: a parametrization (`torch.nn.utils.parametrize`) that makes a weight from its original.

    Example(lambda: Standardize(), kind="Weight", inputs=[(6, 4)])

`make` is offered the weight (`lambda weight: SpectralNorm(weight)`). `inputs`: the weight, (6, 4) where nothing is given;
it becomes the parameter `weight` of a module that the parametrization is registered on. With a right inverse it must be a
weight that the parametrization can make, as for torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..contract import LeftOut, needs, require
from ..example import Example
from ..tensors import close, copied, same
from . import _modules


class _Host(nn.Module):
    """A module whose forward is its weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self) -> Tensor:
        return self.weight


def check_weight_shape_and_dtype(example: Example) -> None:
    """The weight has the original's shape and type, in float32, float64 and bfloat16, and is finite."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = _weight(example, dtype)
        made = _parametrized(example, weight).weight
        require(made.shape == weight.shape, f"a weight {tuple(weight.shape)} becomes {tuple(made.shape)}")
        require(made.dtype == dtype, f"a {dtype} weight becomes {made.dtype}")
        _modules.finite(made, f"the weight in {dtype}")


def check_weight_gradient(example: Example) -> None:
    """The gradient reaches the original, and is the derivative, unless another gradient is declared."""
    host = _parametrized(example)
    host.weight.square().sum().backward()
    original = _originals(host)[0]
    require(original.grad is not None, "no gradient reaches the original")
    _modules.finite(original.grad, "the gradient of the original")
    if {"gradient:surrogate", "gradient:stateful"} & set(example.traits):
        return
    for training in (True, False):
        host = _parametrized(example, _weight(example, torch.float64))
        host.train(training)
        _modules.gradient_exact(host, (), f"in {'training' if training else 'evaluation'} mode")


def check_weight_keeps_original(example: Example) -> None:
    """Reading the weight does not change the original."""
    host = _parametrized(example)
    before = copied(_originals(host))
    host()
    same(_originals(host), before, "reading the weight changed the original in place")


def check_weight_eval_deterministic(example: Example) -> None:
    """In evaluation mode the weight is the same each time, and no state is changed."""
    _modules.eval_deterministic(_as_layer(example))


def check_weight_bakes(example: Example) -> None:
    """`remove_parametrizations(..., leave_parametrized=True)` leaves a plain parameter of the same value."""
    host = _parametrized(example)
    _modules.trained(host, ())
    host.eval()
    want = host.weight.detach().clone()
    parametrize.remove_parametrizations(host, "weight", leave_parametrized=True)
    same(host.weight, want, "the weight that is left is another")
    require(isinstance(host.weight, nn.Parameter), "what is left is no parameter")


def check_weight_state_dict(example: Example) -> None:
    """The state dict holds everything that the weight depends on."""
    _modules.state_round_trip(_as_layer(example))


@needs("right_inverse")
def check_weight_right_inverse(example: Example) -> None:
    """Assigning a weight that it can make, and reading it, gives that weight."""
    host = _parametrized(example, _weight(example, torch.float64))
    host.eval()
    want = host.weight.detach().clone()
    with torch.no_grad():
        host.weight = want  # type: ignore[assignment]  # goes through right_inverse
    close(host.weight, want, "assigning a weight gives another one back")


def check_weight_without_right_inverse(example: Example) -> None:
    """Where there is no right inverse, none is pretended: assigning a weight is refused."""
    if "right_inverse" in example.traits:
        raise LeftOut("it declares 'right_inverse'")
    parametrization = example.build(_weight(example))
    require(
        not hasattr(parametrization, "right_inverse"), "it has a right_inverse: declare the trait, to have it tested"
    )


def _weight(example: Example, dtype: torch.dtype = torch.float32) -> Tensor:
    return example.arguments([(6, 4)], dtype=dtype)[0]


def _parametrized(example: Example, weight: Tensor | None = None) -> _Host:
    weight = _weight(example) if weight is None else weight
    host = _Host(weight)
    # Buffers of the parametrization follow the weight's type, as they do in a model that is cast as a whole.
    made = example.build(weight.clone())
    parametrize.register_parametrization(host, "weight", made.to(weight.dtype), unsafe=False)
    return host


def _originals(host: nn.Module) -> list[Tensor]:
    return [p for n, p in host.named_parameters() if n.startswith("parametrizations.weight.original")]


def _as_layer(example: Example) -> Example:
    """An example whose object is the host module, called without arguments."""
    return Example(lambda: _parametrized(example), kind="Layer", name=example.name, inputs=(), seed=example.seed)
