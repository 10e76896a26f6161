"""`byol_gn_ws`: learn features by predicting one view of a picture from another, without batch statistics anywhere.

With an online network (encoder f, projector g, predictor q) and a target (f', g') that follows it, for views v, v':

    L = 2 - 2 cos(q(g(f(v))), g'(f'(v')))  +  the same with v and v' exchanged        the target has no gradient
    target <- tau target + (1 - tau) online        tau = 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2 at step k of K

Batch norm had been thought to be what keeps all features from becoming one. In its place: GroupNorm over 16 groups, and
weights standardised row by row, W_i <- (W_i - mean_i) / sqrt(var_i + eps). A picture's output is then its own.

Source: "BYOL works even without batch statistics", Richemond, Grill, Altche, Tallec, Strub, Brock, Smith, De, Pascanu,
Piot, Valko, 2020, arXiv 2010.10241. No official code of this version was found; deepmind-research/byol has the one with
batch norm. Whether projector and predictor are standardised too is not said; here the caller chooses. Where 16 does not
divide the channels, or would leave a group of one, the next smaller number of groups that does is taken.

At inference the standardised weight is baked in (`torch.nn.utils.parametrize.remove_parametrizations`). Use it where
batches are small or spread over machines. With large batches on one, batch norm is as good.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.norm import to_gn_ws
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    >>> done = to_gn_ws(model)
    >>> type(model[1]).__name__, model[1].num_groups
    ('GroupNorm', 16)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from laconic.core.affine import BATCH_NORMS
from laconic.core.card import Card
from laconic.core.modes import evaluating
from laconic.core.standardized import check_rows, standardize
from laconic.core.surgery import Swapped, swap
from laconic.errors import BadInput

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
GROUPS, EPS = 16, 1e-5


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos, the mean over the rows of (B, d); no gradient flows into the target."""
    return (2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=-1)).mean()


def momentum_at(step: int, steps: int, first: float) -> float:
    """tau at a step: `first` at step 0, 1 at the last."""
    return 1 - (1 - first) * (math.cos(math.pi * min(step, steps) / steps) + 1) / 2


def groups_for(channels: int, groups: int = GROUPS) -> int:
    """The most groups, `groups` of them at most, that divide the channels and have two or more each; 1 at least."""
    return next((n for n in range(min(groups, channels // 2), 1, -1) if channels % n == 0), 1)


class StandardizedRows(nn.Module):
    """The parametrization: rows with mean 0 and variance 1, eps under the root.

    Args:
        eps: keeps the division finite where a row is constant.
    """

    def __init__(self, eps: float = EPS):
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        return standardize(weight, self.eps, unbiased=False, eps_in="sqrt")


def to_gn_ws(model: nn.Module, groups: int = GROUPS, *, eps: float = EPS) -> Swapped:
    """Take batch statistics out of a model, in place: GroupNorm for every batch norm, standardised weights everywhere.

    Gains and shifts are kept. The function changes: train it afterwards.

    Args:
        model: to change.
        groups: at most so many to a norm.
        eps: of the standardisation.

    Returns:
        The norms that were replaced, and those that were not and why.

    Raises:
        BadInput: there is no batch norm, a weight has a parametrization already, or rows of one entry.
    """
    if groups < 1 or not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise BadInput(f"byol_gn_ws: {type(model).__name__} has no batch norm to replace by {groups} groups")
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, MATRICES)]
    for path, layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise BadInput(f"byol_gn_ws: a parametrization computes the weight of {path} already: remove it first")
        try:
            check_rows(layer.weight, 0)
        except ValueError as error:
            raise BadInput(f"{path or 'the model'}: {error}") from None

    def group_norm(old: Any) -> nn.Module:
        return nn.GroupNorm(groups_for(old.num_features, groups), old.num_features, old.eps, old.affine)

    done = swap(model, BATCH_NORMS, group_norm)
    for _, layer in layers:
        parametrize.register_parametrization(layer, "weight", StandardizedRows(eps))
    return done


class BYOL:
    """The training: `update(v, v')` is a step on two views, `predict(x)` gives the encoder's features.

    Args:
        encoder: f, pictures -> (B, d).
        projector: g, (B, d) -> (B, e).
        predictor: q, (B, e) -> (B, e).
        optimizer: makes the optimizer of the online parameters.
        steps: K, over which tau goes to 1.
        tau: tau_0.

    Raises:
        BadInput: no steps, or tau outside [0, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        steps: int,
        tau: float = 0.996,
    ):
        if steps < 1 or not 0 <= tau <= 1:
            raise BadInput(f"byol_gn_ws: {steps} steps with tau {tau}: there must be one, and tau in [0, 1]")
        self.encoder, self.predictor = encoder, predictor
        self.online = nn.Sequential(encoder, projector)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = optimizer(chain(self.online.parameters(), predictor.parameters()))
        self.steps, self.tau, self.step = steps, tau, 0

    def update(self, first: Tensor, second: Tensor) -> float:
        """A step on two views of the same pictures, (B, ...) each; returns the loss before it.

        Raises:
            ValueError: the views are not of the same pictures.
        """
        if first.shape[0] != second.shape[0]:
            raise ValueError(
                f"byol_gn_ws: {first.shape[0]} and {second.shape[0]} pictures are not two views of the same"
            )
        for part in (self.online, self.target, self.predictor):
            part.train()
        with torch.no_grad():
            targets = self.target(second), self.target(first)
        self.optimizer.zero_grad()
        predictions = (self.predictor(self.online(view)) for view in (first, second))
        loss = torch.stack([byol_loss(p, t) for p, t in zip(predictions, targets, strict=True)]).sum()
        loss.backward()
        self.optimizer.step()
        self._follow()
        return float(loss.detach())

    def predict(self, x: Tensor) -> Tensor:
        """The encoder's features, in evaluation mode; nothing is changed."""
        with evaluating(self.encoder), torch.no_grad():
            return self.encoder(x)

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimizer and the step."""
        return {
            "online": self.online.state_dict(),
            "predictor": self.predictor.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stopped."""
        for name in ("online", "predictor", "target", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = int(state["step"])

    @torch.no_grad()
    def _follow(self) -> None:
        tau = momentum_at(self.step, self.steps, self.tau)
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.lerp_(fast, 1 - tau)
        self.step += 1


CARD = Card(
    id="byol_gn_ws",
    title="BYOL works even without batch statistics",
    authors="Richemond, Grill, Altche, Tallec, Strub, Brock, Smith, De, Pascanu, Piot, Valko",
    year=2020,
    source="arXiv 2010.10241",
    family="norm",
    summary="Self-supervised learning from two views of a picture with GroupNorm and standardised weights: no picture's "
    "features depend on its batch.",
    objects={"BYOL": "Protocol"},
    traits={"BYOL": ("order:dependent",)},
    use="Learning features without labels where batches are small or spread over machines.",
    avoid="Large batches on one machine, where batch norm is as good and needs no standardised weights.",
    composes=("weight_standardization",),
    code="none; deepmind-research/byol (Apache-2.0) has the version with batch norm",
    claim={
        "text": "Features learned with GroupNorm and standardised weights are more accurate under a linear classifier "
        "than those learned without any norm, by more than five points.",
        "metric": "accuracy of a linear classifier",
        "direction": "higher",
        "margin": 0.05,
        "arms": ("no_norm", "gn_ws"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
