"""`bn_only`: train gains and shifts of the norms alone, in a network of random features, and count what they switch off.

All other weights stay as they were drawn. Per channel c of each norm two numbers are learned:

    y_c = gamma_c (x_c - mean_c) / sqrt(var_c + eps) + beta_c        gamma ~ U(0, 1), beta = 0 at first

Running statistics are updated as ever. A channel is dead where |gamma| < 0.01: with random features behind it, the
network has learned to do without it. The control trains as many numbers elsewhere: two random weights of every channel
of each convolution and linear layer, everything else frozen (`train_random_weights`).

Source: "Training BatchNorm and Only BatchNorm: On the Expressive Power of Random Features in CNNs", Frankle, Schwab,
Morcos, 2020, arXiv 2003.00152. Official code: facebookresearch/open_lth, MIT. The paper trains 160 epochs by SGD with
momentum 0.9, rate 0.1 and weight decay 1e-4, and Kaiming normal weights; the decay is part of what drives gammas to 0.
The headline results freeze the output layer too; `output=True` trains it.

Nothing changes at inference; a dead channel can be pruned. Use it to measure what norms can do by themselves, and to
fine-tune with very few parameters. It is no way to the best accuracy.

Example:
    >>> from torch import nn
    >>> from laconic.norm import train_only
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> [tuple(p.shape) for p in train_only(model)]
    [(8,), (8,)]
    >>> len(train_only(model, output=True))
    4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.figure import bars
from laconic.errors import BadInput

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "norm": NORMS,
    "conv": MATRICES[1:],
    "linear": MATRICES[:1],
    "embedding": (nn.Embedding,),
}
DEAD = 0.01
# Lowest and highest gamma, and beta, by name.
GAMMAS: Mapping[str, tuple[float, float, float]] = {
    "uniform": (0.0, 1.0, 0.0),
    "fixed": (1.0, 1.0, 0.0),
    "oneone": (1.0, 1.0, 1.0),
    "positivenegative": (-1.0, 1.0, 0.0),
}

M = TypeVar("M", bound=nn.Module)


def train_only(
    model: nn.Module, kinds: Sequence[str] = ("norm",), output: bool = False, exceptions: Sequence[str] = ()
) -> list[nn.Parameter]:
    """Freeze all parameters of a model but those of some kinds of layers, in place.

    Give the optimizer what this returns: a frozen parameter without gradient would still decay.

    Args:
        model: to train in part.
        kinds: of the layers whose parameters are trained: names of `KINDS`, "norm" among them.
        output: train the last linear layer too.
        exceptions: names of further parameters to train, `*` standing for anything.

    Returns:
        The parameters that are trained, each once.

    Raises:
        BadInput: an unknown kind, an exception that names nothing, no linear layer for `output`, or nothing to train.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadInput(f"bn_only: there is no kind {unknown[0]!r} of layers: they are {', '.join(KINDS)}")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in exceptions:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(f"bn_only: no parameter's name fits {pattern!r}")
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if output and not linear:
        raise BadInput(f"bn_only: {type(model).__name__} has no linear layer to be its output")
    classes = tuple(one for kind in kinds for one in KINDS[kind])
    chosen: list[nn.Module] = [module for module in model.modules() if isinstance(module, classes)]
    kept = {id(parameter) for module in chosen + linear[-1:] * output for parameter in module.parameters()}
    named = list(model.named_parameters(remove_duplicate=False))
    kept |= {id(p) for name, p in named if any(fnmatchcase(name, pattern) for pattern in exceptions)}
    if not kept:
        raise BadInput(f"bn_only: {type(model).__name__} has no parameters of a {' or a '.join(kinds)}")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def init_gamma_(module: M, kind: str = "uniform", generator: torch.Generator | None = None) -> M:
    """Fill gain and shift of every norm, in place.

    Args:
        module: a norm, or a module that holds some.
        kind: "uniform" gamma in U(0, 1), beta 0; "fixed" 1 and 0; "oneone" 1 and 1; "positivenegative" U(-1, 1) and 0.
        generator: of the numbers; the global one by default.

    Returns:
        The module.

    Raises:
        BadInput: an unknown kind, or no norm with a gain.
    """
    if kind not in GAMMAS:
        raise BadInput(f"bn_only: gammas are {', '.join(GAMMAS)}, not {kind!r}")
    low, high, beta = GAMMAS[kind]
    norms = _gained(module)
    if not norms:
        raise BadInput(f"bn_only: {type(module).__name__} has no norm with a gain")
    for norm in norms.values():
        nn.init.uniform_(norm.weight, low, high, generator=generator)
        if getattr(norm, "bias", None) is not None:
            nn.init.constant_(norm.bias, beta)
    return module


class _SomeWeights(nn.Module):
    """A frozen weight to which trained numbers are added at some places: the control's parametrization."""

    at: Tensor

    def __init__(self, at: Tensor, like: Tensor):
        super().__init__()
        self.register_buffer("at", at)
        self.values = nn.Parameter(torch.zeros(at.shape, dtype=like.dtype, device=like.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten().index_add(0, self.at, self.values).view_as(weight)


def train_random_weights(
    model: nn.Module, per_channel: int = 2, *, generator: torch.Generator | None = None
) -> list[nn.Parameter]:
    """The control: freeze a model but for some random weights of every output channel of its matrices, in place.

    `torch.nn.utils.parametrize.remove_parametrizations` makes plain weights of them again.

    Args:
        model: to train in part.
        per_channel: weights to a channel; a channel that has fewer trains all of them.
        generator: of the choice.

    Returns:
        The parameters that are trained: changes of the chosen weights, 0 at first.

    Raises:
        BadInput: `per_channel` below 1, or no linear layer and no convolution.
    """
    layers = [module for module in model.modules() if isinstance(module, MATRICES)]
    if per_channel < 1 or not layers:
        raise BadInput(f"bn_only: {per_channel} weights to a channel of {len(layers)} layers are none to train")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = []
    for layer in layers:
        rows, width = layer.weight.shape[0], layer.weight[0].numel()
        order = torch.rand(rows, width, generator=generator).argsort(1)[:, : min(per_channel, width)]
        at = (order + torch.arange(rows)[:, None] * width).flatten().to(layer.weight.device)
        chosen = _SomeWeights(at, layer.weight)
        parametrize.register_parametrization(layer, "weight", chosen)
        trained.append(chosen.values)
    return trained


# --- the probe --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DeadGammas:
    """What was found.

    Attributes:
        table: a row for each norm: norm, channels, dead, share; the last row, "all", sums them up.
        cost: what it took.
    """

    table: Sequence[Mapping[str, Any]]
    cost: str = "no forward pass: the gains are read"

    @property
    def share(self) -> float:
        """Share of all channels that are dead."""
        return float(self.table[-1]["share"])

    def plot(self) -> str:
        """A bar for each norm, in SVG."""
        rows = [(str(row["norm"])[-40:], row["share"], f"{100 * row['share']:.1f} %") for row in self.table]
        label = f"{100 * self.share:.1f} % of the gains are near 0"
        return bars(rows, "channels whose gain is near 0", label, left=260, right=70, whole=True)


class DeadGammaProbe:
    """The probe: how many gains of each norm lie below a threshold.

    Args:
        threshold: of |gamma|.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, threshold: float = DEAD):
        if not threshold > 0:
            raise ValueError(f"bn_only: the threshold is {threshold}: it must be positive")
        self.threshold = threshold

    def __call__(self, model: nn.Module, data: Any = None) -> DeadGammas:
        """What it finds; data is not looked at.

        Raises:
            BadInput: the model has no norm with a gain.
        """
        norms = _gained(model)
        if not norms:
            raise BadInput(f"bn_only: {type(model).__name__} has no norm with a gain")
        gains = {path: norm.weight.detach() for path, norm in norms.items()}
        counts = {path: (g.numel(), int((g.abs() < self.threshold).sum())) for path, g in gains.items()}
        counts["all"] = (sum(n for n, _ in counts.values()), sum(d for _, d in counts.values()))
        return DeadGammas([{"norm": p, "channels": n, "dead": d, "share": d / n} for p, (n, d) in counts.items()])


def dead_gamma_report(model: nn.Module, threshold: float = DEAD) -> DeadGammas:
    """How many gains of each norm lie below a threshold."""
    return DeadGammaProbe(threshold)(model)


def _gained(module: nn.Module) -> dict[str, Any]:
    found = [(path, part) for path, part in module.named_modules() if isinstance(part, NORMS)]
    return {path or "(itself)": part for path, part in found if getattr(part, "weight", None) is not None}


CARD = Card(
    id="bn_only",
    title="Training BatchNorm and Only BatchNorm: On the Expressive Power of Random Features in CNNs",
    authors="Frankle, Schwab, Morcos",
    year=2020,
    source="arXiv 2003.00152",
    family="norm",
    summary="Trains gains and shifts of the norms alone, all other weights staying random, and counts the channels that "
    "they switch off.",
    objects={"init_gamma_": "Init", "DeadGammaProbe": "Probe"},
    use="To measure what norms do by themselves, or to fine-tune very few parameters.",
    avoid="Where accuracy is what counts and all weights may be trained.",
    composes=("zero_init",),
    code="github.com/facebookresearch/open_lth, MIT",
    claim={
        "text": "Gains and shifts of the norms of a random residual network reach a higher accuracy than as many random "
        "weights of its convolutions, by more than ten points.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.10,
        "arms": ("random_weights", "norms"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
