"""Calibrators that scale logits z (n, k) by the likelihood of held-out labels: temperature, vector, matrix.

    NLL(W, b) = -mean_i log softmax(W z_i + b)_{y_i}        W = I / T, b = 0: temperature; W diagonal: vector

For the temperature, NLL is convex in 1/T with the derivative mean_i (sum_j p_ij z_ij - z_iy), so its only zero is the
minimum. The other two are convex in all parameters and go to L-BFGS, from W = I and b = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 500  # of L-BFGS at most


class TemperatureScaling:
    """p = softmax(z / T): one number for all, which changes no decision.

    Args:
        bounds: of log T. The minimum lies beyond where all examples, or hardly any, are right.

    Attributes:
        temperature_: T, once fitted.
    """

    def __init__(self, bounds: tuple[float, float] = (-5.0, 5.0)):
        if not bounds[0] < bounds[1]:
            raise ValueError(f"TemperatureScaling: bounds={bounds} of log T must rise")
        self.bounds = bounds
        self.temperature_ = 1.0

    def fit(self, logits: Tensor, labels: Tensor) -> TemperatureScaling:
        """Find T on logits (n, k) and classes (n,) that were not trained on."""
        from scipy.optimize import brentq

        z, y = _checked("TemperatureScaling", logits, labels)
        own = z.gather(1, y[:, None]).mean()

        def slope(log_t: float) -> float:
            p = F.softmax(z * math.exp(-log_t), 1)
            return float((p * z).sum(1).mean() - own)

        low, high = self.bounds
        falls, rises = slope(low) > 0, slope(high) < 0
        if falls and rises:
            self.temperature_ = math.exp(brentq(slope, low, high, xtol=1e-12))
        elif falls or rises:
            self.temperature_ = math.exp(high if falls else low)
        else:  # the logits are constant: every T gives the same
            self.temperature_ = math.exp(min(max(0.0, low), high))
        return self

    def logits(self, logits: Tensor) -> Tensor:
        """z / T, in the type of z."""
        return logits / self.temperature_

    def transform(self, logits: Tensor) -> Tensor:
        """p (n, k) in float64."""
        return F.softmax(self.logits(logits.detach().double()), 1)

    def __repr__(self) -> str:
        return f"TemperatureScaling(bounds={self.bounds}, temperature_={self.temperature_:.6g})"


class VectorScaling:
    """p = softmax(w z + b), a factor and an offset for each class.

    Args:
        ridge: weight of |w - 1|^2 + |b|^2, a bound where examples are few.

    Attributes:
        weight_: w (k,), once fitted.
        bias_: b (k,), once fitted.
    """

    def __init__(self, ridge: float = 0.0):
        self.ridge = _positive("VectorScaling", ridge)
        self.weight_, self.bias_ = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def fit(self, logits: Tensor, labels: Tensor) -> VectorScaling:
        """Find w and b on logits (n, k) and classes (n,) that were not trained on."""
        z, y = _checked("VectorScaling", logits, labels)
        w, b = torch.ones(z.shape[1]).double(), torch.zeros(z.shape[1]).double()

        def objective() -> Tensor:
            return F.cross_entropy(z * w + b, y) + self.ridge * ((w - 1).square().sum() + b.square().sum())

        self.weight_, self.bias_ = _minimized(objective, w, b)
        return self

    def logits(self, logits: Tensor) -> Tensor:
        """w z + b, in the type of z."""
        return logits * self.weight_.to(logits) + self.bias_.to(logits)

    def transform(self, logits: Tensor) -> Tensor:
        """p (n, k) in float64."""
        return F.softmax(self.logits(logits.detach().double()), 1)


class MatrixScaling:
    """p = softmax(W z + b). With many classes it fits noise: give a ridge, or take another.

    Args:
        ridge: weight of |W - I|^2 off the diagonal, and |b|^2.

    Attributes:
        weight_: W (k, k), once fitted.
        bias_: b (k,), once fitted.
    """

    def __init__(self, ridge: float = 0.0):
        self.ridge = _positive("MatrixScaling", ridge)
        self.weight_, self.bias_ = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def fit(self, logits: Tensor, labels: Tensor) -> MatrixScaling:
        """Find W and b on logits (n, k) and classes (n,) that were not trained on."""
        z, y = _checked("MatrixScaling", logits, labels)
        w, b = torch.eye(z.shape[1]).double(), torch.zeros(z.shape[1]).double()
        off = 1 - torch.eye(z.shape[1]).double()

        def objective() -> Tensor:
            return F.cross_entropy(z @ w.T + b, y) + self.ridge * ((w * off).square().sum() + b.square().sum())

        self.weight_, self.bias_ = _minimized(objective, w, b)
        return self

    def logits(self, logits: Tensor) -> Tensor:
        """W z + b, in the type of z."""
        return logits @ self.weight_.to(logits).T + self.bias_.to(logits)

    def transform(self, logits: Tensor) -> Tensor:
        """p (n, k) in float64."""
        return F.softmax(self.logits(logits.detach().double()), 1)


def _minimized(objective: Callable[[], Tensor], *variables: Tensor) -> list[Tensor]:
    """The variables at the minimum of a convex function of them."""
    for variable in variables:
        variable.requires_grad_()
    optimizer = torch.optim.LBFGS(
        variables, max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return [variable.detach() for variable in variables]


def _checked(who: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(
            f"{who}: logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: (n, k) and (n,) "
            "with n of at least 1 are needed"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{who}: the logits hold inf or nan")
    return logits.detach().double(), labels.long()


def _positive(who: str, ridge: float) -> float:
    if not ridge >= 0:
        raise ValueError(f"{who}: ridge={ridge} is negative")
    return ridge


CARD = None  # a part of `calibration`
