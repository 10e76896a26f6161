"""`norm_loss`: pull the length of every row of a weight towards one, in place of weight decay.

For weights W_l (out, rest), rows w_r = W_l[r], target t:

    L = sum_l sum_r (t - |w_r|)^2                     added to the task's loss, times lambda
    dL/dw_r = 2 (1 - t / |w_r|) w_r                   longer rows shrink, shorter ones grow; 0 where w_r = 0
    w_r <- (1 - 2 lr lambda (1 - t / |w_r|)) w_r      decoupled, before the optimizer's step (`decay_norms`)

Weight decay is the case t = 0. Rows are what one output is a product with: biases and the gains of norms are left out.

Source: "Norm Loss: An efficient yet effective regularization method for deep neural networks", Georgiou, Schmitt,
Baeck, Chen, Lew, 2021, arXiv 2103.06583. No official code was found; whether the paper sums or averages over rows is
not confirmed, so `average` is an option. The decoupled form is that of optimizers which use it (Ranger21).

Nothing is left of it at inference. Use it instead of weight decay, not with it, where decay is hard to tune; with
adaptive optimizers take the decoupled form, since they would divide the gradient of the loss away. Rows must be free to
have length one: not on embeddings.

Example:
    >>> import torch
    >>> from laconic.weight import norm_loss
    >>> round(norm_loss([torch.tensor([[3.0, 4.0], [0.6, 0.8]])]).item(), 4)  # (1 - 5)^2 + (1 - 1)^2
    16.0
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.constraint import Handle
from laconic.core.hooks import Hook, Run
from laconic.errors import BadInput

from ._layers import matrix_layers, per_output, rows_of


def norm_loss(weights: nn.Module | Iterable[Tensor], target: float = 1.0, *, average: bool = False) -> Tensor:
    """L, a scalar in the type of the weights (float32 for narrower ones).

    Args:
        weights: a module, for the weights of its linear layers and convolutions; or weights, rows along their first
            dimension.
        target: t, the length that rows are to have.
        average: divide by the number of rows.

    Raises:
        BadInput: there are no rows, a weight has a single dimension, or the target is negative.
    """
    if not target >= 0:
        raise BadInput(f"norm_loss: target is {target}: the length of a row is not negative")
    lengths = [_lengths(rows) for rows in _rows(weights)]
    if not sum(each.numel() for each in lengths):
        raise BadInput("norm_loss: there are no weights of linear layers or convolutions")
    found = torch.cat([(target - each).square() for each in lengths])
    return found.mean() if average else found.sum()


class NormLoss(Hook):
    """The regulariser, times its strength: call it, or give it to `laconic.fit` as a hook.

    Args:
        strength: lambda; the paper's value is not confirmed.
        target, average: see `norm_loss`.

    Raises:
        BadInput: strength or target is negative.
    """

    def __init__(self, strength: float = 1e-2, target: float = 1.0, *, average: bool = False):
        if not (strength >= 0 and target >= 0):
            raise BadInput(f"norm_loss: strength is {strength} and target {target}: they must not be negative")
        self.strength, self.target, self.average = strength, target, average

    def __call__(self, weights: nn.Module | Iterable[Tensor]) -> Tensor:
        """lambda L."""
        return self.strength * norm_loss(weights, self.target, average=self.average)

    def loss(self, run: Run, loss: Tensor, batch: Any, output: Any) -> Tensor:
        return loss + self(run.model)


def decay_norms(
    optimizer: torch.optim.Optimizer, model: nn.Module, strength: float = 1e-2, target: float = 1.0
) -> Handle:
    """Pull rows towards the target before every step, by the learning rate of each group and apart from its moments.

    Args:
        optimizer: set its own weight decay to 0.
        model: whose linear layers and convolutions are meant, as far as the optimizer trains their weights.
        strength: lambda, of the sum over rows.
        target: t.

    Returns:
        Its `remove()` ends it.

    Raises:
        BadInput: the optimizer trains no such weight, or strength or target is negative.
    """
    if not (strength >= 0 and target >= 0):
        raise BadInput(f"norm_loss: strength is {strength} and target {target}: they must not be negative")
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    chosen = [(layer, group_of[id(layer.weight)]) for _, layer in matrix_layers(model) if id(layer.weight) in group_of]
    if not chosen:
        raise BadInput(f"norm_loss: the optimizer trains no linear layer or convolution of {type(model).__name__}")

    @torch.no_grad()
    def decay(*_: Any) -> None:
        for layer, group in chosen:
            lengths = _lengths(rows_of(layer, layer.weight))
            # 1 - t / |w| is infinite for a dead row, which stays where it is, as under the gradient.
            pull = torch.where(lengths > 0, 1 - target / lengths, 0.0)
            factor = 1 - 2 * group["lr"] * strength * pull
            layer.weight.mul_(per_output(layer, factor).to(layer.weight.dtype))

    return Handle([optimizer.register_step_pre_hook(decay)])


def _rows(weights: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(weights, nn.Module):
        return [rows_of(layer, layer.weight) for _, layer in matrix_layers(weights)]
    found = list(weights)
    for weight in found:
        if weight.ndim < 2:
            raise BadInput(
                f"norm_loss: a tensor of shape {tuple(weight.shape)} has no rows: leave biases and gains out"
            )
    return [weight.flatten(1) for weight in found]


def _lengths(rows: Tensor) -> Tensor:
    """(outputs,); the gradient of the length of a row of zeros is 0."""
    wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return torch.linalg.vector_norm(wide, dim=1)


CARD = Card(
    id="norm_loss",
    title="Norm Loss: An efficient yet effective regularization method for deep neural networks",
    authors="Georgiou, Schmitt, Baeck, Chen, Lew",
    year=2021,
    source="arXiv 2103.06583",
    family="weight",
    summary="A regulariser that pulls the length of every output's weights towards one, in place of weight decay.",
    objects={"NormLoss": "Loss"},
    traits={"NormLoss": ("gradient:exact", "regulariser")},
    use="Instead of weight decay, where its strength is hard to tune.",
    avoid="Together with weight decay; on embeddings; with adaptive optimizers, unless decoupled (`decay_norms`).",
    composes=("weight_standardization", "elr_probe"),
    claim={
        "text": "Accuracy depends less on the strength of the regularization than with weight decay: over strengths "
        "from 0.0001 to 1 the best and the worst are closer together by more than five points.",
        "metric": "spread of accuracy over strengths",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("weight_decay", "norm_loss"),
        "seeds": 5,
        "minutes": 6,
        "task": "digits",
    },
)
