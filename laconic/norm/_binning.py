"""Calibrators that map a confidence to the share that is right there: histogram, isotonic, BBQ.

Each maps one number x in [0, 1] and is fitted on whether the example was right. With logits (n, k) there is one map a
class, "this class or another", and the k results of a row are divided by their sum; a row of zeros becomes 1 / k each.

    histogram   theta_b = m_b / n_b in bin b, its centre where the bin is empty      m_b right among n_b
    isotonic    the non-decreasing function nearest to the outcomes in squares, linear between examples
    BBQ         the mean of histograms with B = B_0 ... B_1 bins, weighted by how likely each makes the outcomes

BBQ's weights are those of the paper: equal mass, a Beta prior of strength N' = 2 over all bins, and with alpha_b =
N' c_b / B, beta_b = N' (1 - c_b) / B around the bin's centre c_b:

    p(D | B) = prod_b G(N'/B) / G(n_b + N'/B) * G(m_b + alpha_b) / G(alpha_b) * G(n_b - m_b + beta_b) / G(beta_b)
    theta_b = (m_b + alpha_b) / (n_b + N'/B)                                         G the Gamma function

or, with `score="bic"`, plain histograms weighted by v_B = exp(-BIC_B / 2), BIC_B = B log n - 2 log likelihood. An
`elbow` then keeps the best ones up to the first step between neighbours (in falling order) of less than elbow * var(v).

Sources: histogram: Zadrozny, Elkan, 2001; isotonic: Zadrozny, Elkan, 2002; BBQ: "Obtaining Well Calibrated
Probabilities Using Bayesian Binning", Naeini, Cooper, Hauskrecht, 2015. The second form is that of
EFS-OpenSource/calibration-framework (Apache-2.0), of which no code was used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Curve = Callable[[np.ndarray], np.ndarray]


def probabilities(logits: Tensor) -> Tensor:
    """softmax in float32 or wider, as float64."""
    z = logits.detach()
    return (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).softmax(-1).double()


def bin_edges(x: Tensor, bins: int, equal: str) -> Tensor:
    """Edges (B + 1,) from 0 to 1: of one width, or with equally many of x (n,) between, equal edges once."""
    if bins < 1 or equal not in ("width", "mass"):
        raise ValueError(f"bins={bins}, equal={equal!r}: at least one bin, and equal is 'width' or 'mass'")
    edges = np.linspace(0.0, 1.0, bins + 1)
    if equal == "mass":
        inner = np.quantile(x.numpy(), edges[1:-1])
        edges = np.concatenate([[0.0], np.unique(inner[(inner > 0) & (inner < 1)]), [1.0]])
    return torch.from_numpy(edges)


class _OneMap:
    """Fits one map to confidences (n,), or one for each class to logits (n, k)."""

    def __init__(self) -> None:
        self.maps_: list[Curve] = []

    def _curve(self, x: np.ndarray, right: np.ndarray) -> Curve:
        raise NotImplementedError

    def fit(self, scores: Tensor, labels: Tensor) -> Any:
        """Fit on examples that were not trained on.

        Args:
            scores: logits (n, k), or confidences (n,) in [0, 1].
            labels: classes (n,), or whether each was right (n,).

        Raises:
            ValueError: shapes or values that cannot be.
        """
        x = _unit(type(self).__name__, scores)
        if labels.shape != x.shape[:1] or not len(x):
            raise ValueError(
                f"{type(self).__name__}: scores of shape {tuple(scores.shape)} and labels of shape "
                f"{tuple(labels.shape)}: (n, k) or (n,), and (n,), with n of at least 1 are needed"
            )
        y = labels.cpu().numpy()
        if x.ndim == 1:
            self.maps_ = [self._curve(x, y.astype(np.float64))]
        else:
            self.maps_ = [self._curve(x[:, k], (y == k).astype(np.float64)) for k in range(x.shape[1])]
        return self

    def transform(self, scores: Tensor) -> Tensor:
        """Calibrated confidences (n,), or probabilities (n, k), in float64."""
        x = _unit(type(self).__name__, scores)
        wanted = 1 if x.ndim == 1 else x.shape[1]
        if len(self.maps_) != wanted:
            raise ValueError(
                f"{type(self).__name__}: fitted for {len(self.maps_)} classes, asked for {wanted}: call fit on those"
            )
        if x.ndim == 1:
            return torch.from_numpy(self.maps_[0](x))
        each = torch.from_numpy(np.stack([curve(x[:, k]) for k, curve in enumerate(self.maps_)], axis=1))
        total = each.sum(1, keepdim=True)
        return torch.where(total > 0, each / total, 1 / x.shape[1])


class HistogramBinning(_OneMap):
    """theta_b of the bin.

    Args:
        bins: how many.
        equal: "width" or "mass".
    """

    def __init__(self, bins: int = 15, equal: str = "width"):
        super().__init__()
        bin_edges(torch.ones(1), bins, equal)
        self.bins, self.equal = bins, equal

    def _curve(self, x: np.ndarray, right: np.ndarray) -> Curve:
        return _Histogram(x, right, bin_edges(torch.from_numpy(x), self.bins, self.equal).numpy())


class IsotonicCalibration(_OneMap):
    """The nearest function that never falls; constant beyond the examples."""

    def _curve(self, x: np.ndarray, right: np.ndarray) -> Curve:
        from scipy.optimize import isotonic_regression

        # Equal confidences are one point, which weighs as much as they are.
        places, at, count = np.unique(x, return_inverse=True, return_counts=True)
        share = np.bincount(at, right) / count
        return Polyline(places, np.clip(isotonic_regression(share, weights=count).x, 0.0, 1.0))


class BBQ(_OneMap):
    """Bayesian binning into quantiles.

    Args:
        C: bins go from n^(1/3) / C to C n^(1/3), at least 1 and at most n / 5.
        prior: N', strength of the Beta prior, for `score="bayes"`.
        equal: "mass" or "width".
        score: "bayes" as in the paper, or "bic".
        elbow: keep the best models alone, see above; None keeps all.
    """

    def __init__(
        self, C: float = 10.0, prior: float = 2.0, *, equal: str = "mass", score: str = "bayes",
        elbow: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if score not in ("bayes", "bic") or not C >= 1 or not prior > 0:
            raise ValueError(f"BBQ: C={C}, prior={prior}, score={score!r}: C >= 1, prior > 0, score 'bayes' or 'bic'")
        bin_edges(torch.ones(1), 1, equal)
        self.C, self.prior, self.equal, self.score, self.elbow = C, prior, equal, score, elbow

    def bins(self, n: int) -> range:
        """The numbers of bins that n examples are given."""
        root = n ** (1 / 3)
        return range(max(1, math.floor(root / self.C)), max(1, min(math.ceil(n / 5), math.ceil(root * self.C))) + 1)

    def _curve(self, x: np.ndarray, right: np.ndarray) -> Curve:
        models, scores = [], []
        for bins in self.bins(len(x)):
            edges = bin_edges(torch.from_numpy(x), bins, self.equal).numpy()
            model = _Histogram(x, right, edges, self.prior if self.score == "bayes" else None)
            models.append(model)
            scores.append(model.evidence if self.score == "bayes" else model.bic(x, right))
        likely = np.exp(np.array(scores) - max(scores))
        kept = np.argsort(-likely, kind="stable")
        if self.elbow is not None:
            kept = kept[: _up_to_elbow(likely[kept], self.elbow)]
        return _mixed(likely[kept] / likely[kept].sum(), [models[i] for i in kept])


class Steps:
    """theta (B,) in the bins between edges (B + 1,)."""

    def __init__(self, edges: np.ndarray, theta: np.ndarray):
        self.edges, self.theta = edges, theta

    def _at(self, x: np.ndarray) -> np.ndarray:
        """Bins (lo, hi], and 0 with the first."""
        return np.clip(np.searchsorted(self.edges, x, side="left") - 1, 0, len(self.edges) - 2)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.theta[self._at(x)]


class Polyline:
    """Linear between (places, values), constant beyond."""

    def __init__(self, places: np.ndarray, values: np.ndarray):
        self.places, self.values = places, values

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.interp(x, self.places, self.values)


def _mixed(weights: np.ndarray, models: list[_Histogram]) -> Steps:
    """The weighted mean of histograms, which is one over all their edges."""
    edges = np.unique(np.concatenate([model.edges for model in models]))
    right_ends = edges[1:]
    return Steps(edges, np.sum([w * model(right_ends) for w, model in zip(weights, models, strict=True)], axis=0))


class _Histogram(Steps):
    """theta by bin, with a Beta prior of strength N' around the centres, or without."""

    def __init__(self, x: np.ndarray, right: np.ndarray, edges: np.ndarray, prior: float | None = None):
        from scipy.special import gammaln

        self.edges, size = edges, len(edges) - 1
        at = self._at(x)
        n, m = np.bincount(at, minlength=size), np.bincount(at, right, size)
        centre = (edges[:-1] + edges[1:]) / 2
        if prior is None:
            self.theta = np.where(n > 0, m / np.maximum(n, 1), centre)
            return
        each = prior / size
        alpha, beta = each * centre, each * (1 - centre)
        self.theta = (m + alpha) / (n + each)
        self.evidence = float(
            (gammaln(each) - gammaln(n + each) + gammaln(m + alpha) - gammaln(alpha)
             + gammaln(n - m + beta) - gammaln(beta)).sum()
        )  # fmt: skip

    def bic(self, x: np.ndarray, right: np.ndarray) -> float:
        """-BIC / 2 = log likelihood - B / 2 log n."""
        small = np.finfo(np.float64).eps
        p = np.clip(self(x), small, 1 - small)
        likelihood = np.sum(right * np.log(p) + (1 - right) * np.log1p(-p))
        return float(likelihood - len(self.theta) / 2 * np.log(len(x)))


def _up_to_elbow(likely: np.ndarray, elbow: float) -> int:
    """How many of the falling values to keep: those equal to the best, and on while steps are large."""
    variance, k = np.var(likely), 0
    while k + 1 < len(likely) and likely[k] == likely[k + 1]:
        k += 1
    while k + 1 < len(likely) and likely[k] - likely[k + 1] > elbow * variance:
        k += 1
    return k + 1


def _unit(who: str, scores: Tensor) -> np.ndarray:
    """Confidences in [0, 1]: of logits by the softmax."""
    if scores.ndim == 2:
        return probabilities(scores).cpu().numpy()
    values = scores.detach().double().cpu()
    if scores.ndim != 1 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{who}: scores are logits (n, k), or confidences (n,) within 0 and 1")
    return values.numpy()


CARD = None  # a part of `calibration`
