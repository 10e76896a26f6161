r"""The verdict on a claim, from the values of two arms over the same seeds.

For seed i let d_i be how much better the method is than the baseline, in the claim's direction:

    d_i = s (method_i - baseline_i),   s = 1 where higher is better, -1 where lower is
    mean = sum_i d_i / n,   se = sqrt(sum_i (d_i - mean)^2 / (n - 1)) / sqrt(n)
    interval = mean +- t(0.975, n - 1) se

- **confirmed**: the whole interval lies above the margin, mean - t se > margin.
- **refuted** (at this scale): the whole interval lies below the margin, mean + t se < margin.
- **inconclusive**: the margin lies inside. Then it matters what could have been seen at all: a true effect of

    smallest = margin + (t(0.975, n - 1) + t(0.8, n - 1)) se

  would have been confirmed in about four runs of five.

Where the true effect is the margin itself, a claim is wrongly confirmed in 2.5 % of runs if the differences are
normally distributed. Fewer than five pairs give no verdict: with two the interval is 12.7 standard errors wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laconic.core.card import DIRECTIONS, LEAST_SEEDS
from laconic.errors import BadInput

__all__ = ["CONFIRMED", "INCONCLUSIVE", "LEVEL", "POWER", "REFUTED", "Verdict", "differences", "judge"]

CONFIRMED, REFUTED, INCONCLUSIVE = "confirmed", "refuted", "inconclusive"
LEVEL, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about a claim. Effects are in the metric's unit; positive means the method is better.

    Attributes:
        word: confirmed, refuted or inconclusive.
        effect: mean difference of the paired seeds.
        low, high: its interval; infinite where there are fewer than two seeds.
        margin: what the effect had to exceed.
        smallest: the least true effect that would have been confirmed with a probability of `POWER`.
        n: pairs.
    """

    word: str
    effect: float
    low: float
    high: float
    margin: float
    smallest: float
    n: int

    @property
    def sentence(self) -> str:
        """The verdict as a reader wants it: effect, interval, margin, and what could have been seen."""
        if self.n < 2:
            return f"{self.word}: one pair of seeds says nothing about chance"
        how, by, low, high = "better", self.effect, self.low, self.high
        if self.effect < 0:
            how, by, low, high = "worse", -self.effect, -self.high, -self.low
        found = f"{self.word}: the method is {how} by {by:.4g} (95 %: {low:.4g} to {high:.4g}, {self.n} seeds)"
        asked = f"better by more than {self.margin:.4g} was claimed"
        if self.word != INCONCLUSIVE:
            return f"{found}; {asked}"
        if self.n < LEAST_SEEDS:
            return f"{found}; {asked}, and a verdict needs {LEAST_SEEDS} seeds"
        return f"{found}; {asked}, and an effect of {self.smallest:.4g} could have been seen"


def differences(baseline: Sequence[float], method: Sequence[float], direction: str) -> np.ndarray:
    """How much better the method is, seed by seed: (n,).

    Raises:
        BadInput: the arms have different numbers of seeds, a value is not finite, or the direction is none.
    """
    if direction not in DIRECTIONS:
        raise BadInput(f"the direction of a claim is {' or '.join(DIRECTIONS)}, not {direction!r}")
    if len(baseline) != len(method) or not len(method):
        raise BadInput(
            f"paired seeds are needed; there are {len(baseline)} of the baseline, {len(method)} of the method"
        )
    pairs = np.array([baseline, method], np.float64)
    if not np.isfinite(pairs).all():
        arm, at = np.argwhere(~np.isfinite(pairs))[0]
        raise BadInput(
            f"the {('baseline', 'method')[arm]} gave {pairs[arm, at]} for pair {at}: the metric of a claim has to be "
            "finite, also for a training that diverged"
        )
    return (pairs[1] - pairs[0]) * (1 if direction == "higher" else -1)


def judge(
    baseline: Sequence[float], method: Sequence[float], *, direction: str, margin: float, least: int = LEAST_SEEDS
) -> Verdict:
    """The verdict on paired seeds.

    Args:
        baseline: the metric of the baseline for each seed.
        method: of the method, for the same seeds in the same order.
        direction: "higher" or "lower": where the metric is better.
        margin: by how much the method is claimed to be better.
        least: with fewer pairs the verdict is inconclusive.

    Raises:
        BadInput: as in `differences`, or the margin is not finite.
    """
    from scipy.special import stdtrit

    if not math.isfinite(margin):
        raise BadInput(f"the margin of a claim is a finite number, not {margin}")
    d = differences(baseline, method, direction)
    n, effect = len(d), float(d.mean())
    if n < 2:
        return Verdict(INCONCLUSIVE, effect, -math.inf, math.inf, margin, math.inf, n)
    error = float(d.std(ddof=1)) / math.sqrt(n)
    reach = float(stdtrit(n - 1, 0.5 + LEVEL / 2))
    low, high = effect - reach * error, effect + reach * error
    smallest = margin + (reach + float(stdtrit(n - 1, POWER))) * error
    word = INCONCLUSIVE
    if n >= least and low > margin:
        word = CONFIRMED
    elif n >= least and high < margin:
        word = REFUTED
    return Verdict(word, effect, low, high, margin, smallest, n)
