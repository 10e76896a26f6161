"""`adab2n`: batch normalization for continual learning, balanced over tasks, with a momentum that adapts.

A batch of replayed and new examples x (n, C, ...) is of tasks 0 .. T, with n_t examples of task t (it may have none).
Each layer has a learned w (tasks,), 0 at first. With the concentration a_t = exp(w_t) + n_t of t = 0 .. T:

    pi_t = a_t / sum_t a_t,   an example of task t weighs pi_t / n_t
    mean = sum_i weight_i mean_places(x_i),   var = sum_i weight_i mean_places((x_i - mean)^2)

What a task without examples would weigh is lost, so that the weights then sum to less than 1 (`renormalize` divides by
the sum). During the first task, or without tasks, they are the plain batch's. The running statistics move by

    run <- (1 - eta_i) run + eta_i stat          var biased
    eta_1 = m^kappa,   eta_i = eta_(i-1) / (eta_(i-1) + (1 - m)^kappa)

with torch's momentum m: kappa = 1 gives m always, kappa = 0 gives 1/i, the mean over all batches. A regulariser ties the
batch to what is kept, the running values already moved and without gradient:

    stat_loss = MSE(mean, running_mean) + MSE(var, running_var)        summed over layers, times lambda

Source: "Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation", Lyu, Wang,
Zhang, Sun, Su, Zhu, Wang, 2023, arXiv 2310.08855. Official code: lvyilin/AdaB2N, MIT. We differ from it: eta is a
buffer, so that a resumed training goes on with it.

At inference it is a batch norm, and `as_affine` and `AdaB2NContext.finish` say which. Use it in replay-based continual
learning, where ordinary running statistics are those of the last task. Where all data come mixed, it is a batch norm.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.adapt import AdaB2NContext
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> context = AdaB2NContext(model, num_tasks=2, kappa=0.4)
    >>> context.end_task()
    >>> with context.batch(torch.tensor([0, 1, 1])):
    ...     loss = model(torch.randn(3, 1, 8, 8)).square().mean() + 0.1 * context.stat_loss()
    >>> type(context.finish()[1]).__name__
    'BatchNorm2d'
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.statistics import widened
from laconic.core.test_time import attach, unfit
from laconic.errors import BadInput


def task_weights(tasks: Tensor, task_weight: Tensor, renormalize: bool = False) -> Tensor:
    """What each example weighs, (n,).

    Args:
        tasks: (n,) of each example, 0 .. T.
        task_weight: w (T + 1,).
        renormalize: let them sum to 1 although a task has no examples.
    """
    counts = torch.bincount(tasks, minlength=len(task_weight)).to(task_weight)
    concentration = task_weight.exp() + counts
    share = concentration / concentration.sum()
    weights = (share / counts.clamp(min=1))[tasks]
    return weights / weights.sum() if renormalize else weights


def weighted_statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of x (n, C, ...) whose examples weigh `weights` (n,)."""
    flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    mean = weights @ flat.mean(2)
    var = weights @ (flat - mean[:, None]).square().mean(2)
    return mean, var


class AdaB2N(nn.Module):
    """The layer, in the place of `torch.nn.BatchNorm1d`, 2d or 3d; `AdaB2NContext` handles all of a model.

    Args:
        num_features, eps, momentum, affine: as torch's batch norms have them.
        num_tasks: how many there will be.
        kappa: 1 is a constant momentum, 0 the mean over all batches.
        balanced_from_task: the first task, from 0, whose batches are weighed by task.
        renormalize: see `task_weights`.
        device, dtype: of parameters and buffers.

    Attributes:
        current_task: T, 0 at first.
        stat_loss: of the last training batch, or None.
        eta: of the last training batch.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        num_features: int,
        num_tasks: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        kappa: float = 1.0,
        balanced_from_task: int = 1,
        renormalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_tasks < 1 or not 0 < momentum < 1 or not 0 <= kappa <= 1 or balanced_from_task < 0:
            raise ValueError(
                f"AdaB2N: num_tasks={num_tasks}, momentum={momentum}, kappa={kappa}, "
                f"balanced_from_task={balanced_from_task}: at least one task, momentum in (0, 1), kappa in [0, 1], and "
                "tasks count from 0"
            )
        self.num_features, self.num_tasks, self.eps = num_features, num_tasks, eps
        self.momentum, self.affine, self.kappa = momentum, affine, kappa
        self.balanced_from_task, self.renormalize = balanced_from_task, renormalize
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features, **place)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features, **place)) if affine else None)
        self.task_weight = nn.Parameter(torch.zeros(num_tasks, **place))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.eta: Tensor
        self.current_task: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features, **place))
        self.register_buffer("running_var", torch.ones(num_features, **place))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("current_task", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("eta", torch.zeros((), dtype=torch.float64, device=device))
        self.stat_loss: Tensor | None = None
        self._tasks: Tensor | None = None

    @classmethod
    def from_batchnorm(cls, norm: nn.Module, num_tasks: int, **options: Any) -> Self:
        """A layer that goes on from a batch norm's values, copied, and in its mode.

        Raises:
            BadInput: it is no batch norm, keeps no running statistics, or averages cumulatively (momentum=None).
        """
        reason = unfit(norm)
        if reason or norm.momentum is None:
            raise BadInput(f"AdaB2N: {reason or 'momentum=None has no share to adapt: kappa=0 is that average'}")
        held = norm.running_mean
        made = cls(
            norm.num_features, num_tasks, norm.eps, norm.momentum, norm.affine, device=held.device, dtype=held.dtype,
            **options,
        )  # fmt: skip
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                if getattr(norm, name) is not None:
                    getattr(made, name).copy_(getattr(norm, name))
        return made.train(norm.training)

    def set_tasks(self, tasks: Tensor | None) -> None:
        """Which task each example of the coming batches is of, (n,), from 0; None: unknown, so not weighed.

        Raises:
            ValueError: a task that has not begun.
        """
        if tasks is not None:
            latest = int(self.current_task)
            if tasks.ndim != 1 or tasks.is_floating_point() or not len(tasks):
                raise ValueError(f"AdaB2N: tasks are whole numbers (n,), not {tuple(tasks.shape)} {tasks.dtype}")
            if not 0 <= int(tasks.min()) <= int(tasks.max()) <= latest:
                raise ValueError(
                    f"AdaB2N: tasks go from {int(tasks.min())} to {int(tasks.max())}, and the latest is {latest}: call "
                    "end_task when another begins"
                )
        self._tasks = tasks

    def end_task(self) -> None:
        """Another task begins.

        Raises:
            ValueError: it was the last of `num_tasks`.
        """
        if int(self.current_task) + 1 >= self.num_tasks:
            raise ValueError(f"AdaB2N: all of num_tasks={self.num_tasks} have begun")
        self.current_task += 1
        self._tasks = None

    def next_eta(self) -> float:
        """The momentum of the batch that comes next."""
        if not int(self.num_batches_tracked):
            return self.momentum**self.kappa
        last = float(self.eta)
        return last / (last + (1 - self.momentum) ** self.kappa)

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """scale, shift (C,) that it is in evaluation mode."""
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is None:
            return scale, -self.running_mean * scale
        return self.weight * scale, self.bias - self.running_mean * self.weight * scale

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"AdaB2N: x is (n, {self.num_features}, ...), not {tuple(x.shape)}")
        wide = widened(x)
        if self.training:
            mean, var = self._of_batch(wide)
        else:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        shape = (1, -1, *[1] * (x.ndim - 2))
        y = (wide - mean.view(shape)) * torch.rsqrt(var.view(shape) + self.eps)
        if self.weight is not None:
            y = y * self.weight.to(wide.dtype).view(shape) + self.bias.to(wide.dtype).view(shape)
        return y.to(x.dtype)

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's statistics; moves the running ones and keeps the loss."""
        if x.numel() <= self.num_features:
            raise ValueError(
                f"AdaB2N: more than one value per channel is needed in training, and x is {tuple(x.shape)}"
            )
        seen = int(self.current_task)
        if self._tasks is not None and seen >= self.balanced_from_task:
            if len(self._tasks) != len(x):
                raise ValueError(f"AdaB2N: tasks were set for {len(self._tasks)} examples, and the batch has {len(x)}")
            learned = self.task_weight[: seen + 1].to(x.dtype)
            mean, var = weighted_statistics(x, task_weights(self._tasks.to(x.device), learned, self.renormalize))
        else:
            var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        self._move(mean.detach(), var.detach())
        self.stat_loss = F.mse_loss(mean, self.running_mean.to(x.dtype)) + F.mse_loss(var, self.running_var.to(x.dtype))
        return mean, var

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        eta = self.next_eta()
        self.eta.fill_(eta)
        self.num_batches_tracked += 1
        # New tensors, not in place: the loss of an earlier micro-batch may still need the old values.
        self.running_mean = torch.lerp(self.running_mean, mean.to(self.running_mean), eta)
        self.running_var = torch.lerp(self.running_var, var.to(self.running_var), eta)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_tasks={self.num_tasks}, eps={self.eps}, kappa={self.kappa}"


class AdaB2NContext:
    """All batch norms of a model as `AdaB2N`, told together what the batch holds.

    Args:
        model: its batch norms are replaced by layers that go on from their values, in place.
        num_tasks: how many there will be.
        kappa, balanced_from_task, renormalize: see `AdaB2N`.
        loss_from_task: the first task, from 0, that `stat_loss` counts in.

    Attributes:
        layers: path -> layer.

    Raises:
        BadInput: the model has no batch norm with statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        *,
        kappa: float = 1.0,
        loss_from_task: int = 0,
        balanced_from_task: int = 1,
        renormalize: bool = False,
    ):
        options: dict[str, Any] = {
            "kappa": kappa, "balanced_from_task": balanced_from_task, "renormalize": renormalize,
        }  # fmt: skip
        self._attached = attach(model, lambda norm: AdaB2N.from_batchnorm(norm, num_tasks, **options))
        self.model, self.loss_from_task = model, loss_from_task
        self.layers: dict[str, AdaB2N] = {p: m for p, m in self._attached.layers.items() if isinstance(m, AdaB2N)}

    @contextmanager
    def batch(self, tasks: Tensor | None) -> Iterator[None]:
        """Within the block training batches are of these tasks, (n,) from 0."""
        for layer in self.layers.values():
            layer.set_tasks(tasks)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.set_tasks(None)

    def stat_loss(self) -> Tensor:
        """The regulariser of the last training batch, summed over layers; 0 before `loss_from_task`.

        Raises:
            BadInput: no batch was run in training mode.
        """
        layers = list(dict.fromkeys(self.layers.values()))
        losses = [layer.stat_loss for layer in layers if layer.stat_loss is not None]
        if len(losses) != len(layers):
            raise BadInput("AdaB2N: there is no loss before the model was run in training mode")
        if int(layers[0].current_task) < self.loss_from_task:
            return torch.zeros_like(losses[0])
        return torch.stack(losses).sum()

    def end_task(self) -> None:
        """Another task begins."""
        for layer in dict.fromkeys(self.layers.values()):
            layer.end_task()

    def finish(self) -> nn.Module:
        """The model with ordinary batch norms that hold what was learned; evaluation is the same."""
        learned = dict(self.layers)
        self._attached.detach()
        with torch.no_grad():
            for path, layer in learned.items():
                norm = self.model.get_submodule(path)
                for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                    if getattr(norm, name) is not None:
                        getattr(norm, name).copy_(getattr(layer, name))
        return self.model


CARD = Card(
    id="adab2n",
    title="Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation",
    authors="Lyu, Wang, Zhang, Sun, Su, Zhu, Wang",
    year=2023,
    source="arXiv 2310.08855",
    family="adapt",
    summary="Batch normalization for continual learning: batches weighed by task, and a momentum that does not forget.",
    objects={"AdaB2N": "Layer"},
    traits={"AdaB2N": ("gradient:exact", "batch_independent_eval", "folds")},
    use="In replay-based continual learning of networks with batch normalization.",
    avoid="Where all data come mixed, or nothing of earlier tasks is replayed.",
    composes=("nmc",),
    vectors=("adab2n",),
    code="github.com/lvyilin/AdaB2N, MIT",
    claim={
        "text": "In online continual learning with replay it ends with an average accuracy over all tasks that is more "
        "than one point higher than with batch normalization.",
        "metric": "average accuracy over tasks at the end",
        "direction": "higher",
        "margin": 0.01,
        "arms": ("batchnorm", "adab2n"),
        "seeds": 5,
        "minutes": 3,
        "task": "mnist-cnn",
    },
)
