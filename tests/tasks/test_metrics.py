"""Metrics and the paired bootstrap: arithmetic, direction, and coverage on simulated effects."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laconic.errors import BadInput
from laconic.tasks.metrics import ACCURACY, FIDELITY, PERPLEXITY, Evaluation, Metric, compare, pair


def evaluation(per_example, metric=ACCURACY, **more):
    scores = np.asarray(per_example, float)
    return Evaluation(metric.value(scores), scores, **more)


def test_no_change_is_zero_with_no_interval_and_no_flips():
    rng = np.random.default_rng(0)
    for metric, scores in ((ACCURACY, rng.integers(2, size=50)), (PERPLEXITY, rng.uniform(50, 90, (50, 2)))):
        said = list(range(50))
        found = compare(
            evaluation(scores, metric, answers=said), evaluation(scores, metric, answers=said), metric
        )
        assert (found.drop, found.low, found.high, found.flips, found.n) == (0, 0, 0, 0, 50)


def test_drop_of_a_bounded_metric_is_in_points_and_positive_is_worse():
    before, after = evaluation([1, 1, 1, 0]), evaluation([1, 0, 0, 0])
    assert compare(before, after, ACCURACY).drop == 50.0
    assert compare(after, before, ACCURACY).drop == -50.0


def test_drop_of_perplexity_is_relative_and_weighted_by_tokens():
    before = evaluation([[10.0, 10], [90.0, 30]], PERPLEXITY)
    after = evaluation([[14.0, 10], [90.0, 30]], PERPLEXITY)
    assert before.value == pytest.approx(math.exp(100 / 40))
    found = compare(before, after, PERPLEXITY)
    assert found.drop == pytest.approx(100 * (math.exp(104 / 40) / math.exp(100 / 40) - 1))
    assert (found.before, found.after) == (before.value, after.value)


@pytest.mark.parametrize("higher, drop", [(True, 50.0), (False, -50.0)])
def test_direction_of_an_unbounded_metric(higher, drop):
    metric = Metric("score", higher_is_better=higher, bounded=False)
    assert compare(evaluation([4.0, 4.0], metric), evaluation([2.0, 2.0], metric), metric).drop == drop


def test_flips_count_changed_answers():
    before, after = (
        evaluation([1, 1, 0], answers=["a", "b", "c"]),
        evaluation([1, 0, 0], answers=["a", "c", "d"]),
    )
    assert compare(before, after, ACCURACY).flips == 2


def test_a_broken_model_has_an_infinite_drop():
    before, after = (
        evaluation([[3.0, 2], [4.0, 2]], PERPLEXITY),
        evaluation([[np.inf, 2], [4.0, 2]], PERPLEXITY),
    )
    found = compare(before, after, PERPLEXITY)
    assert found.drop == found.low == found.high == math.inf
    huge = evaluation([[1e6, 2], [1e6, 2]], PERPLEXITY)
    assert compare(before, huge, PERPLEXITY).high == math.inf


def test_one_example_has_no_interval():
    found = compare(evaluation([1.0]), evaluation([0.0]), ACCURACY)
    assert found.drop == 100.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_comparison_is_the_same_for_the_same_seed_only():
    rng = np.random.default_rng(1)
    before, after = evaluation(rng.uniform(size=40)), evaluation(rng.uniform(size=40))
    assert compare(before, after, ACCURACY, seed=3) == compare(before, after, ACCURACY, seed=3)
    assert compare(before, after, ACCURACY, seed=3) != compare(before, after, ACCURACY, seed=4)


def test_different_examples_are_refused():
    with pytest.raises(BadInput, match="cannot compare 2 examples before with 3 after"):
        compare(evaluation([1, 0]), evaluation([1, 0, 1]), ACCURACY)
    with pytest.raises(BadInput, match="no example"):
        compare(evaluation(np.zeros(0)), evaluation(np.zeros(0)), ACCURACY)


def coverage(draw, metric, truth, trials=300):
    """Share of trials whose 95 % interval holds the true drop."""
    held = 0
    for trial in range(trials):
        before, after = draw(np.random.default_rng(trial))
        found = compare(
            evaluation(before, metric), evaluation(after, metric), metric, seed=trial, resamples=400
        )
        held += found.low <= truth <= found.high
    return held / trials


def test_interval_of_accuracy_covers_the_true_drop():
    def draw(
        rng,
    ):  # 6 % of hits are lost and 2 % of examples are won: a true drop of 0.8 * 6 - 0.2 * 10 = 2.8 points
        before = rng.random(400) < 0.8
        after = np.where(before, rng.random(400) >= 0.06, rng.random(400) < 0.10)
        return before, after

    assert 0.91 <= coverage(draw, ACCURACY, 2.8) <= 0.98


def test_interval_of_perplexity_covers_the_true_drop():
    def draw(rng):  # each window's loss per token rises by 0.05 on average
        tokens = rng.integers(20, 60, 80)
        before = rng.normal(3, 0.5, 80)
        after = before + rng.normal(0.05, 0.08, 80)
        return np.stack([before * tokens, tokens], 1), np.stack([after * tokens, tokens], 1)

    assert 0.91 <= coverage(draw, PERPLEXITY, 100 * math.expm1(0.05)) <= 0.98


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    before = (rng.random(2000) < 0.9).astype(float)
    after = before.copy()
    after[:10] = 0  # a handful of examples lost
    paired = compare(evaluation(before), evaluation(after), ACCURACY)
    shuffled = compare(evaluation(before), evaluation(rng.permutation(after)), ACCURACY)
    assert paired.high - paired.low < 0.3 * (shuffled.high - shuffled.low)


def test_fidelity_pairs_the_outputs():
    y = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    z = np.array([[2.0, 0.0], [1.0, -1.0], [np.nan, 0.0]])
    before, after = Evaluation(1.0, np.ones(3), outputs=y), Evaluation(1.0, np.ones(3), outputs=z)
    np.testing.assert_allclose(pair(before, after, FIDELITY).per_example, [1, 0, 0], atol=1e-12)
    found = compare(before, after, FIDELITY)
    assert found.drop == pytest.approx(100 * 2 / 3)
    assert found.after == pytest.approx(1 / 3)
    same = compare(before, before, FIDELITY)
    assert (same.drop, same.low, same.high) == (0, 0, 0)
    assert pair(before, after, ACCURACY) is after


def test_fidelity_refuses_other_shapes():
    before, after = (Evaluation(1.0, np.ones(2), outputs=np.ones((2, d))) for d in (3, 4))
    with pytest.raises(BadInput, match=r"different shapes: \(2, 3\) before and \(2, 4\) after"):
        compare(before, after, FIDELITY)
