"""`rmt_lr`: what the learning rate should become when the batch size changes, from the spectrum of batch curvature.

The curvature of a batch is that of the whole data plus sampling noise, and noise makes the largest eigenvalue larger.
For P parameters, noise of deviation sigma per example, b = B / (1 - B / N) for B of N examples, and lambda the largest
eigenvalue over all data, in the spiked models (P large, b / P fixed):

    Hessian (additive noise), with s = sigma sqrt(P / b):
        lambda + s^2 / lambda                                   where lambda > s
        2 s                                                     otherwise
    Gauss-Newton (a sum of b outer products), with r = sqrt(P / b):
        lambda (1 + r^2 sigma^2 / (lambda - sigma^2))           where lambda > sigma^2 (1 + r)
        sigma^2 (1 + r)^2                                       otherwise

Gradient descent is stable up to 2 / eigenvalue. With kappa(B) = 1 + c (1 / B - 1 / N), which is the Gauss-Newton case
with the critical batch size c = P sigma^2 / (lambda - sigma^2), the largest stable learning rates are related by

    SGD  ("linear"):  lr(B') = lr(B) kappa(B) / kappa(B')               -> lr(B) B' / B         for B, B' << c
    Adam ("sqrt"):    lr(B') = lr(B) sqrt(kappa(B) / kappa(B'))         -> lr(B) sqrt(B' / B)   for B, B' << c

since Adam divides by a root of the curvature. Without `critical` the limits on the right are the rules. They saturate:
above c a larger batch does not bear a larger learning rate.

Source: "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
Granziol, Zohren, Roberts, 2020, arXiv 2006.09092. Official code: none found. The formulas are those of the spiked
Wigner and covariance models, checked against random matrices. The Hessian's alone never gives the linear rule (the
slope of log lr over log B is at most 1/2); the Gauss-Newton one does, and is what `critical` means here. The paper's
estimator of learning rate and momentum from Lanczos quadrature is not part of this.

Nothing is left at inference. Use it when a recipe that was tuned at one batch size must run at another, or when the
batch grows in the course of training. Tune anew where that is affordable: both rules only hold below the critical size.

Example:
    >>> from laconic.optim import scale_lr
    >>> scale_lr(0.1, batch=32, new_batch=128), scale_lr(0.001, batch=32, new_batch=128, rule="sqrt")
    (0.4, 0.002)
    >>> round(scale_lr(0.1, batch=32, new_batch=128, critical=64), 3)
    0.2
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from laconic.core.card import Card
from laconic.errors import BadInput

RULES: Mapping[str, float] = {"linear": 1.0, "sqrt": 0.5}
"""The rules, and the power of the curvature ratio in each: linear for SGD, sqrt for Adam and its like."""


def batch_eigenvalue(largest: float, deviation: float, parameters: int, batch: float, matrix: str = "hessian") -> float:
    """The largest eigenvalue that a batch shows.

    Args:
        largest: lambda, the largest eigenvalue over all data.
        deviation: sigma. Hessian: of an entry of one example's matrix around the mean. Gauss-Newton: of an example's
            gradient in the directions without signal.
        parameters: P.
        batch: b, the effective batch size.
        matrix: "hessian" or "gauss_newton".

    Raises:
        BadInput: no such matrix, or a number that is not positive.
    """
    if min(largest, deviation, parameters, batch) <= 0:
        raise BadInput(f"batch_eigenvalue: {largest=}, {deviation=}, {parameters=}, {batch=}: all must be positive")
    if matrix == "hessian":
        edge = deviation * math.sqrt(parameters / batch)
        return largest + edge**2 / largest if largest > edge else 2 * edge
    if matrix == "gauss_newton":
        noise, root = deviation**2, math.sqrt(parameters / batch)
        if largest > noise * (1 + root):
            return largest * (1 + root**2 * noise / (largest - noise))
        return noise * (1 + root) ** 2
    raise BadInput(f"batch_eigenvalue: matrix is {matrix!r}: choose hessian or gauss_newton")


def scale_lr(
    lr: float,
    batch: int,
    new_batch: int,
    rule: str = "linear",
    *,
    critical: float | None = None,
    examples: int | None = None,
) -> float:
    """The learning rate at another batch size.

    Args:
        lr: learning rate that is right at `batch`.
        batch: B, examples to a step.
        new_batch: B'.
        rule: "linear" for SGD, with and without momentum, "sqrt" for Adam and its like.
        critical: c, the batch size at which noise doubles the curvature; unbounded by default.
        examples: N, of the training data; unbounded by default, and without effect unless `critical` is given.

    Raises:
        BadInput: no such rule, or sizes that cannot be.
    """
    _check(rule, critical, examples, batch, new_batch)
    if critical is None:
        return lr * (new_batch / batch) ** RULES[rule]
    ratio = _curvature(batch, critical, examples) / _curvature(new_batch, critical, examples)
    return lr * ratio ** RULES[rule]


class BatchSizeLR(LRScheduler):
    """Learning rates that follow the batch size; step it once per optimizer step.

    The optimizer's learning rates are those that are right at `base`.

    Args:
        optimizer: whose learning rates are scheduled.
        batch_sizes: examples to a step: one number for all of training, or {first step: batch size}; before the first
            of these it is `base`.
        base: batch size that the learning rates were tuned at.
        rule: "linear" for SGD, "sqrt" for Adam and its like.
        critical: as in `scale_lr`.
        examples: as in `scale_lr`.
        last_epoch: as torch has it: steps taken already, less one.

    Raises:
        BadInput: no such rule, or sizes that cannot be.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        batch_sizes: int | Mapping[int, int],
        *,
        base: int,
        rule: str = "linear",
        critical: float | None = None,
        examples: int | None = None,
        last_epoch: int = -1,
    ):
        changes = dict(sorted(batch_sizes.items())) if isinstance(batch_sizes, Mapping) else {0: batch_sizes}
        _check(rule, critical, examples, base, *changes.values())
        if any(step < 0 for step in changes):
            raise BadInput(f"rmt_lr: the batch size changes at step {min(changes)}: the first step is 0")
        self.changes, self.base, self.rule = changes, base, rule
        self.critical, self.examples = critical, examples
        super().__init__(optimizer, last_epoch)

    def batch_size(self, step: int) -> int:
        """Examples of a step; 0 is the first."""
        return next((size for start, size in reversed(self.changes.items()) if start <= step), self.base)

    def get_lr(self) -> list[float]:
        """The learning rate of each group at the present step."""
        size = self.batch_size(self.last_epoch)
        factor = scale_lr(1.0, self.base, size, self.rule, critical=self.critical, examples=self.examples)
        return [base * factor for base in self.base_lrs]


def _curvature(batch: int, critical: float, examples: int | None) -> float:
    """kappa(B), the curvature of a batch relative to that of all data."""
    return 1 + critical * (1 / batch - (0 if examples is None else 1 / examples))


def _check(rule: str, critical: float | None, examples: int | None, *sizes: int) -> None:
    if rule not in RULES:
        raise BadInput(f"rmt_lr: rule is {rule!r}: choose {' or '.join(RULES)}")
    if critical is not None and not 0 <= critical < math.inf:
        raise BadInput(f"rmt_lr: critical is {critical}: it must be finite and not negative, or None")
    for size in sizes:
        if not size >= 1:
            raise BadInput(f"rmt_lr: a batch of {size} examples: it must be at least 1")
        if examples is not None and size > examples:
            raise BadInput(f"rmt_lr: a batch of {size} examples of {examples}: it cannot be larger than the data")


CARD = Card(
    id="rmt_lr",
    title="Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
    authors="Granziol, Zohren, Roberts",
    year=2020,
    source="arXiv 2006.09092",
    family="optim",
    summary="Scales the learning rate with the batch size: linearly for SGD, by the square root for Adam.",
    objects={"BatchSizeLR": "Schedule"},
    use="A recipe tuned at one batch size must run at another, or the batch grows in the course of training.",
    avoid="The batch is above the critical size, or the learning rate can be tuned anew: no rule beats measuring.",
    composes=("adamp",),
    claim={
        "text": "For Adam the learning rate should grow with the square root of the batch size, not linearly: at 16 "
        "times the batch size and equal epochs, test accuracy is higher by the square root.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("linear", "sqrt"),
        "seeds": 5,
        "minutes": 3,
        "task": "digits",
    },
)
