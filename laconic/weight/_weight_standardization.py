"""`weight_standardization`: every output channel's weights with mean 0 and deviation 1, recomputed at each use.

For a weight W (out, in / groups, kernel) with rows of I entries, one row to an output channel i:

    W'_i = (W_i - mean_i) / (s_i + eps)              eps_in "std", s_i = sqrt(sum_j (W_ij - mean_i)^2 / (I - 1))
    W'_i = (W_i - mean_i) / sqrt(s_i^2 + eps)        eps_in "sqrt"; unbiased=False divides by I instead of I - 1

The gradient flows through mean and deviation, which takes from it what would change either. There is no gain: the
normalization after the layer has one, and makes the scale of W' immaterial.

Source: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", Qiao, Wang, Liu, Shen,
Yuille, 2019, arXiv 1903.10520. Official code: joe-siyuan-qiao/WeightStandardization, without a licence: its convention
is the default here; "timm" is that of timm and BiT, whose weights need it. We differ in that float16 and bfloat16 are
computed in float32.

At inference W' is baked into the weight, `torch.nn.utils.parametrize.remove_parametrizations`, and costs nothing.

Use it with GroupNorm, or another norm that does not look at the batch, where batches are of a few examples. Not on a
layer that no norm follows (the classifier), nor on depthwise convolutions, whose rows are too short. Weight decay on W
only sets the effective learning rate: see `elr_probe`.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.weight import standardize_
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU())
    >>> standardize_(model)
    ['0']
    >>> rows = model[0].weight.flatten(1)
    >>> bool((rows.mean(1).abs() < 1e-6).all() and ((rows.std(1) - 1).abs() < 1e-3).all())
    True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.standardized import EPS_IN, check_rows, standardize
from laconic.errors import BadInput

from ._layers import CONVS, MATRIX_LAYERS, matrix_layers, output_dim

CONVENTIONS: Mapping[str, Mapping[str, Any]] = {
    "official": {"eps": 1e-5, "unbiased": True, "eps_in": "std"},
    "timm": {"eps": 1e-6, "unbiased": False, "eps_in": "sqrt"},
}


class Standardize(nn.Module):
    """The parametrization, for `torch.nn.utils.parametrize.register_parametrization`.

    Args:
        eps, unbiased, eps_in, dim: see `standardize`; `CONVENTIONS` has those that released weights were trained with,
            `Standardize(**CONVENTIONS["timm"])`.

    Raises:
        ValueError: another `eps_in`, or eps is not positive.
    """

    def __init__(self, eps: float = 1e-5, *, unbiased: bool = True, eps_in: str = "std", dim: int = 0):
        super().__init__()
        if not eps > 0:
            raise ValueError(f"weight_standardization: eps is {eps}: it must be positive")
        if eps_in not in EPS_IN:
            raise ValueError(f"weight_standardization: eps_in is {eps_in!r}: it must be one of {', '.join(EPS_IN)}")
        self.eps, self.unbiased, self.eps_in, self.dim = eps, unbiased, eps_in, dim

    def forward(self, weight: Tensor) -> Tensor:
        return standardize(weight, self.eps, unbiased=self.unbiased, eps_in=self.eps_in, dim=self.dim)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, unbiased={self.unbiased}, eps_in={self.eps_in!r}, dim={self.dim}"


def standardize_(
    model: nn.Module,
    select: Callable[[str, nn.Module], bool] | None = None,
    *,
    convention: str = "official",
    convs_only: bool = True,
) -> list[str]:
    """Register `Standardize` on the layers of a model, in place.

    Args:
        model: the model.
        select: whether to take the layer at a path; by default all that are not depthwise. Take those that a
            normalization follows.
        convention: a name of `CONVENTIONS`.
        convs_only: leave linear layers and transposed convolutions alone.

    Returns:
        The paths of the layers that were changed.

    Raises:
        BadInput: no such convention, no layer is left to change, or a layer's rows are of a single entry.
    """
    if convention not in CONVENTIONS:
        raise BadInput(f"weight_standardization: there is no convention {convention!r}: take {', '.join(CONVENTIONS)}")
    kinds = CONVS if convs_only else MATRIX_LAYERS
    chosen = [
        (path, module)
        for path, module in matrix_layers(model)
        if isinstance(module, kinds) and (select(path, module) if select is not None else not _is_depthwise(module))
    ]
    if not chosen:
        raise BadInput(f"weight_standardization: {type(model).__name__} has no layer to standardize: see `select`")
    for path, module in chosen:
        try:
            check_rows(module.weight, output_dim(module))
        except ValueError as error:
            raise BadInput(f"{path or 'the model'}: {error}") from None
    for _, module in chosen:
        made = Standardize(**CONVENTIONS[convention], dim=output_dim(module))
        parametrize.register_parametrization(module, "weight", made)
    return [path for path, _ in chosen]


def _is_depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels


CARD = Card(
    id="weight_standardization",
    title="Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    authors="Qiao, Wang, Liu, Shen, Yuille",
    year=2019,
    source="arXiv 1903.10520",
    family="weight",
    summary="Gives the weights of every output channel mean zero and deviation one, so that networks train well with "
    "batches of one or two examples.",
    objects={"Standardize": "Weight"},
    use="Convolutions followed by GroupNorm, trained with batches of a few examples.",
    avoid="Layers that no normalization follows, and depthwise convolutions.",
    composes=("elr_probe", "nap"),
    vectors=("weight_standardization",),
    code="github.com/joe-siyuan-qiao/WeightStandardization, no licence",
    claim={
        "text": "With two examples to a batch, GroupNorm with weight standardization is more accurate than GroupNorm "
        "alone, by more than half a point.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("groupnorm", "groupnorm_and_standardization"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
