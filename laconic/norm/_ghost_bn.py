"""`ghost_bn`: batch norm over parts of a large batch, and the training regime that goes with large batches.

A batch of B examples is cut into K = ceil(B / m) ghosts of m examples or a little fewer. Ghost k is normalized by its
own mean and (biased) variance; gain and shift are shared. The running statistics follow the ghosts one by one,

    run <- (1 - eta) run + eta stat_k,   k = 1 .. K
    so that run <- (1 - eta)^K run + eta sum_k (1 - eta)^(K - k) stat_k

as if they had been batches of their own. Evaluation is that of batch norm. With it the paper trains at B as follows,
m being the batch size that a recipe was tuned at (`large_batch_regime`):

    learning rate     lr sqrt(B / m)
    adaptation        epochs, and those at which the rate falls, times ceil(B / m): as many updates as before
    noise instead     example n counts z_n ~ N(1, B / m - 1), the learning rate stays

The variance of z is our derivation: the second moment of a mean over B, (1 + sigma^2) / B, is then that over m, 1 / m.

Source: "Train longer, generalize better: closing the generalization gap in large batch training of neural networks",
Hoffer, Hubara, Soudry, 2017, arXiv 1705.08741. Official code: eladhoffer/bigBatch, MIT. It runs the ghosts as
micro-batches, and clips gradients at a norm of 5 (`clip=5.0` of `laconic.fit`). We differ in that all ghosts run at
once, that the last is joined to the one before it where it is a single example, and that epochs are whole.

At inference it folds like batch norm: see `fold_affine`.

Use it where batches are far larger than those that a recipe was tuned at. Under DistributedDataParallel every device's
share is a ghost already. With batches no larger than m it is batch norm.

Example:
    >>> import torch
    >>> from laconic.norm import GhostBatchNorm1d, Regime, large_batch_regime
    >>> norm = GhostBatchNorm1d(1, ghost_size=2)
    >>> norm(torch.tensor([[0.0], [2.0], [10.0], [14.0]])).round(decimals=2).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    >>> large_batch_regime(Regime(lr=0.1, epochs=10, milestones=(5, 8)), batch=512, base_batch=128)
    Regime(lr=0.2, epochs=40, milestones=(20, 32))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.affine import Affine, affine_of
from laconic.core.card import Card
from laconic.core.hooks import Hook, Run
from laconic.core.statistics import RunningStat, moments, widened
from laconic.errors import BadInput

LR_RULES = {"sqrt": 0.5, "linear": 1.0, "same": 0.0}
"""How the learning rate grows with the batch size, and the power of B / m."""


def ghost_sizes(batch: int, ghost_size: int) -> list[int]:
    """Examples of each ghost: those of `torch.chunk`, but that no ghost is a single example where it need not be."""
    count = max(math.ceil(batch / ghost_size), 1)
    each = max(math.ceil(batch / count), 1)
    sizes = [each] * (batch // each) + [batch % each] * bool(batch % each)
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [each + 1]
    return sizes


def ghost_moments(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each ghost and channel, both (K, C), of x (B, C, ...)."""
    inner = tuple(range(2, x.ndim))
    if len(set(sizes)) == 1:
        mean, var = moments(x.unflatten(0, (len(sizes), -1)), (1, *(axis + 1 for axis in inner)), keepdim=False)
        assert mean is not None
        return mean, var
    parts = [moments(part, (0, *inner), keepdim=False) for part in x.split(list(sizes))]
    return torch.stack([mean for mean, _ in parts if mean is not None]), torch.stack([var for _, var in parts])


class _GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of x (B, C, ...) by ghosts: what both layers have."""

    channel_dim = 1

    def __init__(
        self,
        num_features: int,
        ghost_size: int = 128,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        if ghost_size < 2:
            raise ValueError(f"{type(self).__name__}: ghost_size is {ghost_size}: it must be 2 or more")
        self.ghost_size = ghost_size
        self.stat = RunningStat(momentum)

    def forward(self, x: Tensor) -> Tensor:
        """y, of the shape and type of x.

        Raises:
            ValueError: other channels or axes, or one value per channel in training mode.
        """
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"{type(self).__name__}: {self.num_features} channels are wanted, not {tuple(x.shape)}")
        shape = [-1, self.num_features, *[1] * (x.ndim - 2)]
        wide = widened(x)
        if self.training:
            sizes = ghost_sizes(x.shape[0], self.ghost_size)
            counts = [size * math.prod(x.shape[2:]) for size in sizes]
            if min(counts, default=1) == 1:
                raise ValueError(
                    f"{type(self).__name__}: one value per channel in training mode, from {tuple(x.shape)}"
                )
            mean, var = ghost_moments(wide, sizes)
            for k, count in enumerate(counts):
                self.stat.update_moments(
                    self.running_mean, self.running_var, mean[k], var[k], count, self.num_batches_tracked
                )
            repeats = torch.tensor(sizes, device=x.device)
            mean, var = mean.repeat_interleave(repeats, 0), var.repeat_interleave(repeats, 0)
        else:
            mean, var = self.running_mean[None], self.running_var[None]
        factor = torch.rsqrt(widened(var) + self.eps)
        if self.weight is not None:
            factor = factor * self.weight
        y = (wide - mean.view(shape)) * factor.view(shape)
        return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)

    def as_affine(self) -> Affine:
        """That of batch norm.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError(f"{type(self).__name__} is in training mode: call model.eval() first")
        return affine_of(self.running_var, self.eps, self.running_mean, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, ghost_size={self.ghost_size}, eps={self.eps}, momentum={self.momentum}"


class GhostBatchNorm1d(_GhostBatchNorm):
    """Batch norm of x (B, C) or (B, C, L) by ghosts; arguments as those of `GhostBatchNorm2d`."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim not in (2, 3):
            raise ValueError(f"GhostBatchNorm1d: the input has 2 or 3 axes, not {x.ndim}")


class GhostBatchNorm2d(_GhostBatchNorm):
    """Batch norm of x (B, C, H, W) by ghosts.

    Args:
        num_features: channels C.
        ghost_size: m, the examples that are normalized together, at most (one more where one would be left over).
        eps, momentum, affine, device, dtype: as of torch's batch norm.

    Raises:
        ValueError: `ghost_size` is below 2.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"GhostBatchNorm2d: the input has 4 axes, not {x.ndim}")


@dataclass(frozen=True)
class Regime:
    """A training recipe, as far as the batch size bears on it.

    Attributes:
        lr: learning rate.
        epochs: passes over the data.
        milestones: epochs at which the learning rate falls.
    """

    lr: float
    epochs: int
    milestones: tuple[int, ...] = ()


def large_batch_regime(regime: Regime, batch: int, base_batch: int, *, lr: str = "sqrt", epochs: bool = True) -> Regime:
    """A recipe for a batch size that it was not tuned at.

    Args:
        regime: right at `base_batch`.
        batch: B.
        base_batch: m.
        lr: "sqrt", "linear" or "same".
        epochs: train so much longer that the number of updates stays.

    Raises:
        BadInput: no such rule, or batches of no example.
    """
    if lr not in LR_RULES:
        raise BadInput(f"large_batch_regime: lr is {lr!r}: choose {', '.join(LR_RULES)}")
    if min(batch, base_batch) < 1:
        raise BadInput(f"large_batch_regime: batch={batch}, base_batch={base_batch}: both must be 1 or more")
    times = math.ceil(batch / base_batch) if epochs else 1
    rate = regime.lr * (batch / base_batch) ** LR_RULES[lr]
    return Regime(rate, times * regime.epochs, tuple(times * at for at in regime.milestones))


class MultiplicativeGradNoise:
    """The mean of losses, each counting z_n ~ N(1, B / m - 1): gradients as noisy as those of batches of m.

    Args:
        base_batch: m.
        generator: of z; torch's own by default.

    Raises:
        BadInput: m is below 1.
    """

    def __init__(self, base_batch: int, generator: torch.Generator | None = None):
        if base_batch < 1:
            raise BadInput(f"MultiplicativeGradNoise: base_batch is {base_batch}: it must be 1 or more")
        self.base_batch, self.generator = base_batch, generator

    def __call__(self, losses: Tensor) -> Tensor:
        """The scalar to descend, from the losses (B,) of the examples; a batch of m or fewer gives their mean."""
        variance = max(len(losses) / self.base_batch - 1, 0.0)
        noise = torch.randn(losses.shape, generator=self.generator, device=losses.device, dtype=losses.dtype)
        return ((1 + math.sqrt(variance) * noise) * losses).mean()


class WeightDistance(Hook):
    """The Euclidean distance of the weights from where they started, after each step; the paper: it grows as log t.

    Attributes:
        distances: by step, the first at 0.
    """

    def __init__(self) -> None:
        self.distances: list[float] = []
        self._start: list[Tensor] = []

    def start(self, run: Run) -> None:
        self._start = [parameter.detach().clone() for parameter in run.model.parameters()]

    def step(self, run: Run) -> None:
        off = [
            (p.detach() - q).double().square().sum() for p, q in zip(run.model.parameters(), self._start, strict=True)
        ]
        self.distances.append(math.sqrt(float(sum(off))))

    def state_dict(self) -> dict[str, Any]:
        return {"distances": list(self.distances), "start": list(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        like = self._start
        self.distances = list(state["distances"])
        self._start = [old.to(new) for old, new in zip(state["start"], like, strict=True)] if like else state["start"]


CARD = Card(
    id="ghost_bn",
    title="Train longer, generalize better: closing the generalization gap in large batch training of neural networks",
    authors="Hoffer, Hubara, Soudry",
    year=2017,
    source="arXiv 1705.08741",
    family="norm",
    summary="Batch norm over small parts of a large batch, with the learning rate and number of epochs that large "
    "batches want.",
    objects={"GhostBatchNorm1d": "Layer", "GhostBatchNorm2d": "Layer"},
    traits={
        "GhostBatchNorm1d": ("gradient:exact", "batch_independent_eval", "folds"),
        "GhostBatchNorm2d": ("gradient:exact", "batch_independent_eval", "folds"),
    },
    use="Batches far larger than those that the recipe was tuned at.",
    avoid="Batches of the recipe's own size, and data-parallel training with small shares, which are ghosts already.",
    composes=("fold_affine", "rmt_lr"),
    code="github.com/eladhoffer/bigBatch, MIT",
    claim={
        "text": "At a large batch size ghost batch norm generalizes better than batch norm; here: at 256 images to a "
        "batch, with ghosts of 32, test accuracy is higher by more than half a point.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("batchnorm", "ghost_batchnorm"),
        "seeds": 5,
        "minutes": 5,
        "task": "mnist-cnn",
    },
)
