"""`adamp`: AdamP and SGDP, which take out of a step what would only make a scale-invariant weight longer.

A weight before a normalization is scale-invariant: its gradient is orthogonal to it, so every step makes it longer, and
the longer it is, the less a step turns it. Momentum adds old steps that are no longer orthogonal, and makes it grow
faster still. Both optimizers project the step u onto the tangent space of the weight's sphere. With p and g seen as
rows of d values (the channels: p.shape[0] rows; then the layer: one row), the first view for which

    max over rows |cos(g_r, p_r)| < delta / sqrt(d)

tells that the weight is scale-invariant in this view, and then

    u_r <- u_r - n_r <n_r, u_r>        n_r = p_r / (|p_r| + eps)        decay <- wd_ratio decay

With no such view, and for parameters of one dimension, u stays. Then

    AdamP:  m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        for step t = 1, 2, ...
            u = m / (sqrt(v / (1 - b2^t)) + eps)        nesterov: b1 m + (1 - b1) g for m
            p <- p (1 - lr decay) - lr / (1 - b1^t) u
    SGDP:   m <- mu m + (1 - dampening) g               u = m        nesterov: g + mu m
            p <- p (1 - lr decay / (1 - mu)) - lr u

Source: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", Heo, Chun, Oh, Han, Yun,
Kim, Uh, Ha, 2020, arXiv 2006.08217. Official code: clovaai/AdamP, MIT. We differ from it in one thing: in the released
SGDP the momentum and the step are one tensor as long as `nesterov` is off, so that the projection changes the stored
momentum too, which the paper's algorithm does not; `project_buffer=True` gives that.

Nothing is left at inference: these are steps of training. Use SGD or AdamW where the network has no normalization:
the test then finds nothing to project, and costs a product of gradient and weight.

Example:
    >>> import torch
    >>> from laconic.optim import AdamP
    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = AdamP([weight], lr=0.1)
    >>> weight.grad = torch.tensor([[4.0, -3.0]])  # orthogonal to the weight
    >>> optimizer.step()
    >>> (optimizer.state[weight]["exp_avg"] * torch.tensor([[3.0, 4.0]])).sum().item()  # the momentum is left alone
    0.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from laconic.core.card import Card

from ._common import evaluate, not_negative, share, trained


def invariant_rows(p: Tensor, gradient: Tensor, delta: float, eps: float) -> int | None:
    """In how many rows a weight is scale-invariant: its channels, 1 for the layer as a whole, or None."""
    if p.ndim < 2 or not p.numel():
        return None
    for rows in (p.shape[0], 1):
        weights = p.reshape(rows, -1)
        cosines = F.cosine_similarity(gradient.reshape(rows, -1), weights, dim=1, eps=eps)
        if cosines.abs().max() < delta / math.sqrt(weights.shape[1]):
            return rows
    return None


def tangent(p: Tensor, update: Tensor, rows: int, eps: float) -> Tensor:
    """The part of a step that is orthogonal to each of the `rows` rows of p."""
    weights, steps = p.reshape(rows, -1), update.reshape(rows, -1)
    normal = weights / (weights.norm(dim=1, keepdim=True) + eps)
    return (steps - normal * (normal * steps).sum(1, keepdim=True)).view_as(update)


def projected(
    p: Tensor, gradient: Tensor, update: Tensor, *, delta: float, wd_ratio: float, eps: float
) -> tuple[Tensor, float]:
    """The step, projected if the weight is scale-invariant, and the factor of its weight decay."""
    rows = invariant_rows(p, gradient, delta, eps)
    return (update, 1.0) if rows is None else (tangent(p, update, rows, eps), wd_ratio)


def adamp(
    p: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    nesterov: bool,
    delta: float,
    wd_ratio: float,
) -> None:
    """Step number `step` (1 is the first) of p, in place; `mean` is m and `square` is v."""
    b1, b2 = betas
    mean.mul_(b1).add_(gradient, alpha=1 - b1)
    square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    numerator = b1 * mean + (1 - b1) * gradient if nesterov else mean
    update = numerator / ((square / (1 - b2**step)).sqrt() + eps)
    update, ratio = projected(p, gradient, update, delta=delta, wd_ratio=wd_ratio, eps=eps)
    p.mul_(1 - lr * weight_decay * ratio).add_(update, alpha=-lr / (1 - b1**step))


def sgdp(
    p: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    eps: float,
    delta: float,
    wd_ratio: float,
    project_buffer: bool,
) -> None:
    """One step of p, in place; `buffer` is m."""
    buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
    update = gradient + momentum * buffer if nesterov else buffer
    update, ratio = projected(p, gradient, update, delta=delta, wd_ratio=wd_ratio, eps=eps)
    if project_buffer and not nesterov:
        buffer.copy_(update)
    p.mul_(1 - lr * weight_decay * ratio / (1 - momentum)).add_(update, alpha=-lr)


class AdamP(Optimizer):
    """Adam without the part of a step that only makes scale-invariant weights longer.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the mean of gradients and of the mean of their squares.
        eps: added to the root of the mean square, and to the norm of a weight.
        weight_decay: pull towards zero, apart from the gradient as in AdamW.
        delta: how nearly orthogonal to its gradient a weight must be to count as scale-invariant.
        wd_ratio: share of the weight decay that scale-invariant weights get.
        nesterov: Nesterov momentum.

    Raises:
        BadInput: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ):
        options = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        not_negative("AdamP", **options)
        share("AdamP", **{"betas[0]": betas[0], "betas[1]": betas[1]})
        super().__init__(params, {**options, "betas": tuple(betas), "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; `closure` computes the loss and its gradients anew.

        Raises:
            BadInput: a gradient is sparse.
        """
        loss = evaluate(closure)
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name in self.defaults}
            for p, gradient in trained("AdamP", group):
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                adamp(p, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], **options)
        return loss


class SGDP(Optimizer):
    """SGD with momentum, without the part of a step that only makes scale-invariant weights longer.

    The momentum starts at zero and takes in (1 - dampening) g from the first step on, unlike that of `torch.optim.SGD`,
    which starts at the first gradient.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: mu.
        dampening: of what the momentum takes in.
        weight_decay: pull towards zero, apart from the gradient; it is divided by 1 - mu.
        nesterov: Nesterov momentum.
        eps: added to the norm of a weight.
        delta: how nearly orthogonal to its gradient a weight must be to count as scale-invariant.
        wd_ratio: share of the weight decay that scale-invariant weights get.
        project_buffer: project the stored momentum too, as the released code does; without Nesterov momentum only.

    Raises:
        BadInput: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_buffer: bool = False,
    ):
        options = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        not_negative("SGDP", **options)
        share("SGDP", momentum=momentum)
        flags = {"nesterov": nesterov, "project_buffer": project_buffer}
        super().__init__(params, {**options, **flags, "momentum": momentum, "dampening": dampening})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; `closure` computes the loss and its gradients anew.

        Raises:
            BadInput: a gradient is sparse.
        """
        loss = evaluate(closure)
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name in self.defaults}
            for p, gradient in trained("SGDP", group):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                sgdp(p, gradient, state["momentum_buffer"], **options)
        return loss


CARD = Card(
    id="adamp",
    title="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    authors="Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha",
    year=2020,
    source="arXiv 2006.08217",
    family="optim",
    summary="Adam and SGD whose steps do not make scale-invariant weights (those before a normalization) longer.",
    objects={"AdamP": "Optimizer", "SGDP": "Optimizer"},
    use="Networks with normalization after their weights, trained with momentum and little weight decay.",
    avoid="Networks without normalization: there is nothing to project, and AdamW is cheaper.",
    composes=("weight_standardization", "rmt_lr"),
    vectors=("adamp", "sgdp"),
    code="clovaai/AdamP, MIT",
    claim={
        "text": "With momentum, scale-invariant weights grow less under SGDP than under SGD: the squared norms of the "
        "weights before a batch normalization gain at most half as much, in their geometric mean.",
        "metric": "log of the relative gain in squared norm",
        "direction": "lower",
        "margin": 0.6931,
        "arms": ("sgd", "sgdp"),
        "seeds": 5,
        "minutes": 5,
        "task": "digits",
    },
)
