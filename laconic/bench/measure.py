"""Timing in alternating rounds, and ratios with their intervals.

Let t_ir be the time of one turn of contestant i in round r. Every round runs every contestant once, in an order that is
shuffled anew, and a contestant is repeated within a round until `LEAST` seconds have gone. Then

    median_i = median over r of t_ir
    ratio of i to j = median_i / median_j

and the interval of a ratio is that of a bootstrap over rounds: the same rounds are drawn for i and for j, so that what
slowed down a whole round cancels.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LEAST", "LEVEL", "ROUNDS", "Ratio", "Timed", "alternate", "ratio"]

ROUNDS = 15  # the least for figures that are to be kept
LEAST = 0.02  # seconds that a contestant works in a round: the first of them follow somebody else's data in the caches
SETTLE = 0.01  # seconds between contestants: thread pools of other runtimes spin for a while after their work
WARM = 0.05  # what takes longer than this many seconds a call is not warmed up again in every round
LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Timed:
    """Something to time: `call` does the work `turns` times."""

    call: Callable[[], Any]
    turns: int = 1


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """[value, low, high], as records hold it."""
        return [self.value, self.low, self.high]


def alternate(
    timed: Mapping[str, Timed],
    rounds: int,
    seed: int = 0,
    *,
    least: float = LEAST,
    settle: float = SETTLE,
    tick: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """Seconds of one turn of each, one figure a round.

    Args:
        timed: name -> what to time; each is called once beforehand, which does not count.
        rounds: how many.
        seed: of the order within the rounds.
        least: seconds that each works in a round at least.
        settle: seconds of rest before each.
        tick: is called with the number of rounds done.
        clock, sleep: for tests.
    """
    order, shuffle = list(timed), random.Random(seed).shuffle
    last = {}
    for name, one in timed.items():
        begin = clock()
        one.call()
        last[name] = clock() - begin
    found: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds):
        shuffle(order)
        for name in order:
            sleep(settle)
            call = timed[name].call
            if last[name] < WARM:
                call()
            calls, begin = 0, clock()
            while True:
                call()
                calls += 1
                took = clock() - begin
                if took >= least:
                    break
            last[name] = took / calls
            found[name].append(took / calls / timed[name].turns)
        tick(number + 1)
    return found


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Ratio:
    """median(above) / median(below) of rounds in pairs, with its bootstrap interval.

    Raises:
        ValueError: the numbers of rounds differ, or there are none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} rounds of one and {len(below)} of the other do not pair")
    pairs = np.array([above, below], np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    a, b = (np.median(row[drawn], axis=1) for row in pairs)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(a / b, [tail, 100 - tail])
    return Ratio(float(np.median(pairs[0]) / np.median(pairs[1])), float(low), float(high))
