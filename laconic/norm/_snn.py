"""`snn`: deep networks without norms, whose activation brings mean and variance back to 0 and 1 by itself.

    selu(x) = lambda x                     x > 0          lambda = 1.0507009873554805
              lambda alpha (e^x - 1)       otherwise      alpha  = 1.6732632423543772

For independent inputs of mean 0 and variance 1, and weights with row sums 0 and row square sums 1, mean 0 and variance 1
are a fixed point of (mean, variance) from layer to layer, and it attracts. So weights start as N(0, 1 / fan_in), biases
as 0, and inputs are standardised. Dropout that keeps the fixed point drops to alpha' = -lambda alpha, which is what selu
makes of -infinity. With keep probability q = 1 - p, d ~ Bernoulli(q), and a fixed point (mu, nu):

    y = a (x d + alpha' (1 - d)) + b       a = sqrt(nu / (q ((1 - q) (alpha' - mu)^2 + nu)))
                                           b = mu - a (q mu + (1 - q) alpha')

Source: "Self-Normalizing Neural Networks", Klambauer, Unterthiner, Mayr, Hochreiter, 2017, arXiv 1706.02515. Official
code: bioinf-jku/SNNs, GPL-3.0, of which the two constants alone are used. `SELU` is torch's; `AlphaDropout` is torch's
where (mu, nu) is (0, 1), and takes other fixed points besides.

At inference there is nothing to fold, for there are no norms; alpha dropout is the identity.

Use it for perceptrons of many layers on standardised features, with dropout 0.05 to 0.1. Sums of residual branches, max
pooling, weight decay and norms leave the fixed point: with those, use their own means. `nn.init.calculate_gain("selu")`
is 3/4 and not what the paper takes, which is 1. In bfloat16 the constants are rounded, and the mean moves a little.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.norm import to_self_normalizing
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    >>> done = to_self_normalizing(model, generator=torch.Generator().manual_seed(0))
    >>> [type(layer).__name__ for layer in model]
    ['Linear', 'Identity', 'SELU', 'AlphaDropout', 'Linear']
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.surgery import Swapped, swap
from laconic.errors import BadInput

SELU = nn.SELU

LAMBDA, ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
DROPPED = -LAMBDA * ALPHA
RATE = 0.05

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

M = TypeVar("M", bound=nn.Module)


def alpha_dropout(
    x: Tensor, p: float = RATE, *, mean: float = 0.0, variance: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """y, of the shape and type of x, as in training.

    Args:
        x: activations whose fixed point is (mean, variance).
        p: share that is dropped, in [0, 1).
        mean: mu.
        variance: nu.
        generator: of what is dropped; the global one by default.

    Raises:
        ValueError: p outside [0, 1), or a variance that is not positive.
    """
    _check(p, variance)
    q = 1 - p
    a = math.sqrt(variance / (q * (p * (DROPPED - mean) ** 2 + variance)))
    b = mean - a * (q * mean + p * DROPPED)
    kept = torch.rand(x.shape, generator=generator, device=x.device) < q
    return torch.where(kept, a * x + b, torch.full_like(x, a * DROPPED + b))


class AlphaDropout(nn.Module):
    """Alpha dropout; the identity in evaluation mode.

    Args:
        p: share that is dropped.
        mean, variance: the fixed point that is kept.

    Raises:
        ValueError: p outside [0, 1), or a variance that is not positive.
    """

    def __init__(self, p: float = RATE, *, mean: float = 0.0, variance: float = 1.0):
        super().__init__()
        _check(p, variance)
        self.p, self.mean, self.variance = p, mean, variance

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"snn: alpha dropout is for floating-point numbers, not {x.dtype}")
        return alpha_dropout(x, self.p, mean=self.mean, variance=self.variance) if self.training and self.p else x

    def extra_repr(self) -> str:
        other = (self.mean, self.variance) != (0.0, 1.0)
        return f"p={self.p}" + f", mean={self.mean}, variance={self.variance}" * other


@torch.no_grad()
def lecun_normal_(module: M, generator: torch.Generator | None = None) -> M:
    """Fill the weights of all linear layers and convolutions from N(0, 1 / fan_in) and their biases with 0, in place.

    Args:
        module: a layer, or a module that holds some.
        generator: of the numbers; the global one by default.

    Returns:
        The module.

    Raises:
        BadInput: it holds no such layer, or a parametrization computes a weight.
    """
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, MATRICES)]
    if not layers:
        raise BadInput(f"snn: {type(module).__name__} has no linear layer and no convolution to fill")
    for path, layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise BadInput(f"snn: a parametrization computes the weight of {path or 'the module'}: fill it first")
    for _, layer in layers:
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, 0.0, 1 / math.sqrt(fan_in), generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def to_self_normalizing(
    model: nn.Module, p: float = RATE, *, generator: torch.Generator | None = None
) -> list[Swapped]:
    """Make a self-normalizing network of a feed-forward one, in place: to be trained from the start.

    Activations become SELU, dropout becomes alpha dropout at rate `p`, norms become `nn.Identity`, and weights are drawn
    anew. What the functions of the model's own code compute (`F.relu`) cannot be seen from outside and stays.

    Args:
        model: to change.
        p: of alpha dropout; 0 makes dropout the identity.
        generator: of the weights.

    Returns:
        What was replaced, by kind: activations, dropouts, norms; those that the model has.

    Raises:
        BadInput: it has no activation that is a module.
    """
    _check(p, 1.0)
    if not any(isinstance(module, (*ACTIVATIONS, nn.SELU)) for module in model.modules()):
        raise BadInput(f"snn: {type(model).__name__} has no activation that is a module, so none can become SELU")

    def selu(_: nn.Module) -> nn.Module:
        return nn.SELU()

    def dropout(_: nn.Module) -> nn.Module:
        return AlphaDropout(p)

    def nothing(_: nn.Module) -> nn.Module:
        return nn.Identity()

    done = []
    for old, new in ((ACTIVATIONS, selu), (DROPOUTS, dropout), (NORMS, nothing)):
        if any(isinstance(module, old) for module in model.modules()):
            done.append(swap(model, old, new, keep=False))
    lecun_normal_(model, generator)
    return done


def _check(p: float, variance: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"snn: p is {p}: it must be in [0, 1)")
    if not variance > 0:
        raise ValueError(f"snn: variance is {variance}: it must be positive")


CARD = Card(
    id="snn",
    title="Self-Normalizing Neural Networks",
    authors="Klambauer, Unterthiner, Mayr, Hochreiter",
    year=2017,
    source="arXiv 1706.02515",
    family="norm",
    summary="An activation, first weights and a dropout with which deep perceptrons keep mean 0 and variance 1 without "
    "norms.",
    objects={"SELU": "Layer", "AlphaDropout": "Layer", "lecun_normal_": "Init"},
    traits={
        "SELU": ("gradient:exact", "batch_independent_eval"),
        "AlphaDropout": ("gradient:exact", "batch_independent_eval"),
    },
    use="Perceptrons of many layers on standardised features.",
    avoid="Networks with residual sums, max pooling or norms, which leave the fixed point.",
    composes=("weight_standardization",),
    code="github.com/bioinf-jku/SNNs, GPL-3.0 (its two constants alone)",
    claim={
        "text": "A plain perceptron of 32 layers is more accurate with SELU and its weights than with ReLU and those of "
        "He et al., by more than two points.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("relu", "selu"),
        "seeds": 5,
        "minutes": 6,
        "task": "digits",
    },
)
