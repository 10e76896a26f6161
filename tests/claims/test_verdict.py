"""The verdict on simulated effects: how often it is wrong where nothing is there, and right where something is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laconic.claims.verdict import CONFIRMED, INCONCLUSIVE, REFUTED, differences, judge
from laconic.errors import BadInput

RUNS = 2000  # the standard error of a share of 2.5 % is 0.35 points


def share(word: str, effect: float, *, seeds: int = 5, margin: float = 0.0, direction: str = "higher", draw="normal"):
    """How often the verdict is `word`, for a true effect in units of the noise of a difference."""
    rng = np.random.default_rng(0)
    sign = 1 if direction == "higher" else -1
    hits = 0
    for _ in range(RUNS):
        shared = 5 * rng.normal(size=seeds)  # what a seed does to both arms cancels in the pair
        noise = {
            "normal": lambda: rng.normal(size=seeds),
            "uniform": lambda: rng.uniform(-math.sqrt(3), math.sqrt(3), seeds),
            "heavy tails": lambda: rng.standard_t(3, seeds) / math.sqrt(3),
            "steps of a half": lambda: np.round(2 * rng.normal(size=seeds)) / 2,
        }[draw]()
        found = judge(shared, shared + sign * (effect + noise), direction=direction, margin=margin)
        hits += found.word == word
    return hits / RUNS


@pytest.mark.parametrize("draw", ["normal", "uniform", "heavy tails", "steps of a half"])
@pytest.mark.parametrize("seeds", [5, 10])
def test_nothing_there_is_rarely_confirmed_or_refuted(draw, seeds):
    assert share(CONFIRMED, 0.0, seeds=seeds, draw=draw) <= 0.05
    assert share(REFUTED, 0.0, seeds=seeds, draw=draw) <= 0.05


def test_normal_noise_gives_the_nominal_rate():
    assert share(CONFIRMED, 0.0) == pytest.approx(0.025, abs=0.011)  # three standard errors


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_an_effect_of_exactly_the_margin_is_rarely_confirmed(direction):
    assert share(CONFIRMED, 2.0, margin=2.0, direction=direction) <= 0.05
    assert share(REFUTED, 2.0, margin=2.0, direction=direction) <= 0.05


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_a_large_effect_is_seen(direction):
    assert share(CONFIRMED, 3.0, direction=direction) > 0.95
    assert share(REFUTED, -3.0, direction=direction) > 0.95
    assert share(CONFIRMED, 5.0, margin=2.0, direction=direction) > 0.95
    assert share(REFUTED, -1.0, margin=2.0, direction=direction) > 0.95  # better, or worse, by less than was claimed


def test_an_effect_between_is_mostly_left_open():
    assert share(INCONCLUSIVE, 0.8) > 0.5
    assert share(REFUTED, 0.8) < 0.02


def test_what_could_have_been_seen_is_seen_in_four_of_five():
    rng = np.random.default_rng(1)
    smallest = np.mean(
        [judge(np.zeros(5), rng.normal(size=5), direction="higher", margin=0.0).smallest for _ in range(RUNS)]
    )
    assert share(CONFIRMED, float(smallest)) == pytest.approx(0.8, abs=0.06)


def test_the_figures_against_the_equations_written_out():
    baseline, method = [0.50, 0.60, 0.40, 0.55, 0.45], [0.56, 0.63, 0.49, 0.59, 0.53]
    found = judge(baseline, method, direction="higher", margin=0.01)
    d = [0.06, 0.03, 0.09, 0.04, 0.08]
    mean = sum(d) / 5
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / 4 / 5)
    assert found.effect == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - 2.776445 * error, mean + 2.776445 * error), abs=1e-7)
    assert found.smallest == pytest.approx(0.01 + (2.776445 + 0.940965) * error, abs=1e-7)
    assert found.word == CONFIRMED and found.n == 5
    assert "better by 0.06" in found.sentence and "better by more than 0.01 was claimed" in found.sentence


def test_lower_is_the_mirror_of_higher():
    a, b = [3.0, 4.0, 5.0, 4.5, 3.5], [2.0, 3.1, 4.2, 3.4, 2.6]
    up, down = judge(a, b, direction="higher", margin=0.5), judge(a, b, direction="lower", margin=0.5)
    assert (down.word, up.word) == (CONFIRMED, REFUTED)
    assert f"the method is worse by {-up.effect:.4g} (95 %: {-up.high:.4g} to {-up.low:.4g}" in up.sentence
    assert (down.effect, down.low, down.high) == pytest.approx((-up.effect, -up.high, -up.low))


def test_arms_without_noise():
    same = judge([1.0] * 5, [1.0] * 5, direction="higher", margin=0.0)
    assert same.word == INCONCLUSIVE and same.low == same.high == 0.0
    assert judge([1.0] * 5, [2.0] * 5, direction="higher", margin=0.5).word == CONFIRMED
    assert judge([1.0] * 5, [1.25] * 5, direction="higher", margin=0.5).word == REFUTED


def test_few_seeds_give_no_verdict():
    four = judge([0.0] * 4, [1.0, 1.1, 1.0, 0.9], direction="higher", margin=0.0)
    assert four.word == INCONCLUSIVE and four.low > 0 and "needs 5 seeds" in four.sentence
    one = judge([0.0], [1.0], direction="higher", margin=0.0)
    assert one.word == INCONCLUSIVE and one.low == -math.inf and "one pair" in one.sentence


def test_an_open_verdict_says_what_could_have_been_seen():
    found = judge([0.0] * 5, [1.0, -1.0, 0.5, -0.5, 0.2], direction="higher", margin=0.0)
    assert f"an effect of {found.smallest:.4g} could have been seen" in found.sentence


@pytest.mark.parametrize(
    ("baseline", "method", "direction", "margin", "says"),
    [
        ([1.0], [1.0, 2.0], "higher", 0.0, "1 of the baseline, 2 of the method"),
        ([], [], "higher", 0.0, "paired seeds are needed"),
        ([1.0, 1.0], [1.0, math.nan], "higher", 0.0, "the method gave nan for pair 1"),
        ([math.inf], [1.0], "lower", 0.0, "the baseline gave inf for pair 0"),
        ([1.0], [1.0], "up", 0.0, "higher or lower, not 'up'"),
        ([1.0], [1.0], "lower", math.nan, "a finite number, not nan"),
    ],
)
def test_what_cannot_be_judged_is_refused(baseline, method, direction, margin, says):
    with pytest.raises(BadInput, match=says):
        judge(baseline, method, direction=direction, margin=margin)


def test_differences_are_in_the_claims_direction():
    assert differences([1.0, 2.0], [1.5, 1.0], "lower").tolist() == [-0.5, 1.0]
