"""Metrics, evaluations, and the paired comparison of two of them.

A comparison resamples the examples, the same ones for both models (paired bootstrap): most of the variance
between examples is common to both and cancels, so that a drop of a few tenths of a point can be seen on a few
thousand examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from laconic.errors import BadInput

__all__ = ["ACCURACY", "FIDELITY", "PERPLEXITY", "Comparison", "Evaluation", "Metric", "compare", "pair"]

RESAMPLES_AT_ONCE = 1 << 21  # indices drawn in one go: bounds the memory of the bootstrap


@dataclass(frozen=True)
class Metric:
    """What is measured, and in which direction it is good.

    Attributes:
        name: e.g. "accuracy".
        higher_is_better: the direction.
        bounded: a share in [0, 1] (or a cosine): its drop is in points, 100 (before - after); otherwise in
            per cent of before.
        exponential: the value is exp of the mean (perplexity).
        against_float: an example's score says how near an output is to the float model's; see `pair`.
    """

    name: str
    higher_is_better: bool
    bounded: bool
    exponential: bool = False
    against_float: bool = False

    def value(self, per_example: np.ndarray) -> float:
        """The metric over (n,) scores (their mean) or (n, 2) rows of [sum, weight] (sums / weights)."""
        return float(self._finish(_totals(per_example)))

    def _finish(self, totals: np.ndarray) -> np.ndarray:
        """totals (..., 2) of [sum, weight] -> values (...)."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            mean = totals[..., 0] / totals[..., 1]
            return np.exp(mean) if self.exponential else mean

    def drop(self, before: np.ndarray | float, after: np.ndarray | float) -> np.ndarray | float:
        """How much worse `after` is: points if bounded, else per cent of `before`; positive is worse."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            worse = np.subtract(before, after) if self.higher_is_better else np.subtract(after, before)
            return 100.0 * worse if self.bounded else 100.0 * worse / np.abs(before)


ACCURACY = Metric("accuracy", higher_is_better=True, bounded=True)
PERPLEXITY = Metric("perplexity", higher_is_better=False, bounded=False, exponential=True)
FIDELITY = Metric("cosine with the float model", higher_is_better=True, bounded=True, against_float=True)


@dataclass
class Evaluation:
    """What a model scored on one split.

    Attributes:
        value: the metric over all examples.
        per_example: (n,) scores, or (n, 2) rows of [sum, weight], e.g. the summed loss and the tokens of a
            window.
        also: further figures by name.
        answers: what the model said, one per example; empty where the metric has no such thing.
        examples: a short text of each example.
        outputs: (n, d) outputs, only for a metric `against_float`.
    """

    value: float
    per_example: np.ndarray
    also: dict[str, float] = field(default_factory=dict)
    answers: list = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    outputs: np.ndarray | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples.

    Attributes:
        drop: how much worse the second is: points for a bounded metric, else per cent; positive is worse.
        low, high: its bootstrap interval (nan where there are fewer than two examples to resample).
        flips: how many answers differ.
        n: number of examples.
        before, after: the metric's values.
    """

    drop: float
    low: float
    high: float
    flips: int
    n: int
    before: float
    after: float

    @property
    def span(self) -> tuple[float | None, float | None]:
        """The interval, where it has one that can be shown: one number has none, and neither has an infinite drop."""
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return (self.low, self.high) if known else (None, None)


def pair(before: Evaluation, after: Evaluation, metric: Metric) -> Evaluation:
    """Score `after` against the outputs of `before`, a_i = cos(y_i, y'_i); with other metrics change nothing.

    A metric `against_float` cannot be known from one model alone, so `Task.evaluate` keeps the outputs and
    gives a model the score that it has against itself, 1. Non-finite outputs count as 0: they say nothing of
    the float model's.
    """
    if not metric.against_float:
        return after
    y, z = np.asarray(before.outputs, np.float64), np.asarray(after.outputs, np.float64)
    if y.shape != z.shape:
        raise BadInput(f"the outputs to compare have different shapes: {y.shape} before and {z.shape} after")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.linalg.norm(y, axis=1) * np.linalg.norm(z, axis=1)
        cosine = np.einsum("nd,nd->n", y, z) / norms
    cosine = np.where((y == z).all(1), 1.0, np.nan_to_num(cosine, nan=0.0, posinf=0.0, neginf=0.0))
    return replace(after, value=metric.value(cosine), per_example=cosine)


def _totals(per_example: np.ndarray) -> np.ndarray:
    """(n,) or (n, 2) per example -> [sum, weight] (2,)."""
    return _sums_and_weights(per_example).sum(0)


def _sums_and_weights(per_example: np.ndarray) -> np.ndarray:
    scores = np.asarray(per_example, np.float64)
    return scores if scores.ndim == 2 else np.stack([scores, np.ones_like(scores)], axis=1)


def compare(
    before: Evaluation,
    after: Evaluation,
    metric: Metric,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Comparison:
    """Paired bootstrap of the drop from `before` to `after`.

    Draws n examples with replacement, `resamples` times, and takes the drop of the metric of each draw; the
    interval is the central `level` of those drops (two-sided percentiles). A metric that is no longer finite
    afterwards has an infinite drop.

    Args:
        before: the float model on a split.
        after: the other model on the same split, in the same order.
        metric: gives value, direction and unit.
        seed: of the resampling.
        level: share of the drops inside the interval.
        resamples: how many draws.

    Raises:
        BadInput: the two were not measured on the same number of examples, or on none.
    """
    after = pair(before, after, metric)
    b, a = _sums_and_weights(before.per_example), _sums_and_weights(after.per_example)
    if b.shape != a.shape:
        raise BadInput(
            f"cannot compare {len(b)} examples before with {len(a)} after: they must be the same examples"
        )
    n = len(b)
    if n == 0:
        raise BadInput("there is no example to compare the two models on")
    value_before, value_after = metric.value(before.per_example), metric.value(after.per_example)
    drop = float(metric.drop(value_before, value_after))
    low = high = math.nan
    if not math.isfinite(drop):
        drop = low = high = math.inf
    elif n > 1:
        low, high = _interval(b, a, metric, np.random.default_rng(seed), level, resamples)
    flips = sum(x != y for x, y in zip(before.answers, after.answers, strict=True))
    return Comparison(drop, low, high, flips, n, value_before, value_after)


def _interval(
    b: np.ndarray, a: np.ndarray, metric: Metric, rng: np.random.Generator, level: float, resamples: int
) -> tuple[float, float]:
    """Percentiles of the resampled drop; b, a (n, 2) of [sum, weight]."""
    n, drops = len(b), np.empty(resamples)
    at_once = max(1, RESAMPLES_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        stop = min(start + at_once, resamples)
        drawn = rng.integers(n, size=(stop - start, n))
        totals = [np.stack([side[:, k][drawn].sum(1) for k in (0, 1)], axis=-1) for side in (b, a)]
        drops[start:stop] = metric.drop(metric._finish(totals[0]), metric._finish(totals[1]))
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(drops, [tail, 100.0 - tail], method="nearest")
    return float(low), float(high)
