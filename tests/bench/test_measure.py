"""Alternating rounds and ratios, on clocks that say what they are told."""

from __future__ import annotations

import numpy as np
import pytest

from laconic.bench.measure import LEAST, Timed, alternate, ratio


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def work(self, name: str, seconds: float):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.calls.append("rest")
        self.now += seconds


def timed(clock, rounds=4, seed=0, **seconds):
    runs = {name: Timed(clock.work(name, s)) for name, s in seconds.items()}
    return alternate(runs, rounds, seed, clock=clock, sleep=clock.sleep)


def test_what_is_timed_is_the_work_alone():
    found = timed(Clock(), a=0.125, b=0.5)
    assert found == {"a": pytest.approx([0.125] * 4), "b": pytest.approx([0.5] * 4)}


def test_short_work_is_repeated_until_it_counts():
    clock = Clock()
    found = timed(clock, rounds=1, short=LEAST / 4, long=2 * LEAST)
    assert found["short"] == pytest.approx([LEAST / 4])
    # once beforehand, once to warm up in the round, four that count
    assert clock.calls.count("short") == 6 and clock.calls.count("long") == 3


def test_long_work_is_not_warmed_up_again():
    clock = Clock()
    timed(clock, rounds=3, long=1.0)
    assert clock.calls.count("long") == 4


def test_turns_share_the_time_of_a_call():
    clock = Clock()
    found = alternate({"ten": Timed(clock.work("ten", 5.0), turns=10)}, 2, clock=clock, sleep=clock.sleep)
    assert found["ten"] == pytest.approx([0.5, 0.5])


def test_every_round_runs_everybody_in_an_order_of_its_own():
    clock = Clock()
    timed(clock, rounds=20, a=1.0, b=1.0, c=1.0)
    ran = [name for name in clock.calls if name != "rest"][3:]
    orders = [tuple(ran[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(set(orders)) > 3
    again = Clock()
    timed(again, rounds=20, a=1.0, b=1.0, c=1.0)
    assert again.calls == clock.calls
    other = Clock()
    timed(other, rounds=20, seed=1, a=1.0, b=1.0, c=1.0)
    assert other.calls != clock.calls


def test_rounds_are_told():
    clock, told = Clock(), []
    alternate({"a": Timed(clock.work("a", 1.0))}, 3, tick=told.append, clock=clock, sleep=clock.sleep)
    assert told == [1, 2, 3]


def test_what_slows_down_whole_rounds_cancels():
    """Two that always differ by a factor of two, on a machine that is up to ten times slower in some rounds."""
    slow = np.random.default_rng(0).uniform(1, 10, 15)
    found = ratio((2 * slow).tolist(), slow.tolist())
    assert found.value == pytest.approx(2) and found.low == pytest.approx(2) and found.high == pytest.approx(2)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, hits, n = np.random.default_rng(0), 0, 200
    for _ in range(n):
        a, b = 3 * rng.lognormal(0, 0.2, 15), rng.lognormal(0, 0.2, 15)
        found = ratio(a.tolist(), b.tolist())
        assert found.low <= found.value <= found.high
        hits += found.low <= 3 <= found.high
    assert 0.85 <= hits / n <= 1.0


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="2 rounds of one and 1 of the other"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 rounds"):
        ratio([], [])
