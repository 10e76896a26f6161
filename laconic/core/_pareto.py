"""The Pareto front of `laconic.core.allocate`, by dynamic programming over units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ._options import Option, Point, point

POINTS = 20_000  # of a front, before it is thinned out: 5 bytes for each and unit are kept
SLACK = 1e-9  # of the room for sizes: sums in another order differ by less


def dynamic(options: Sequence[Sequence[Option]], budget: float = math.inf, points: int = POINTS) -> list[Point]:
    """All choices that none beats in size and cost, by rising size; some are left out of a front longer than `points`.

    Args:
        options: of each group, of rising size and falling cost.
        budget: what exceeds it by more than rounding is left out.
        points: bound of the length of a front.
    """
    least = [table[0].size for table in options]
    rest = np.concatenate([np.cumsum(np.array(least[::-1], dtype=np.float64))[::-1], [0.0]])  # of the groups to come
    room = (budget - rest[0]) * (1 + SLACK) + rest[0] * SLACK if budget < math.inf else math.inf
    over, cost = np.zeros(1), np.zeros(1)  # sizes over the least, so that small differences are not lost
    back: list[tuple[np.ndarray, np.ndarray]] = []
    for table in options:
        more = np.array([option.size - table[0].size for option in table])
        costs = np.array([option.cost for option in table])
        sizes, sums = (over[:, None] + more).ravel(), (cost[:, None] + costs).ravel()
        order = np.lexsort((sums, sizes))
        order = order[sizes[order] <= room]
        lowest = np.minimum.accumulate(sums[order])
        kept = order[np.concatenate([[True], sums[order][1:] < lowest[:-1]])]
        kept = kept[_thinned(sizes[kept], points)]
        over, cost = sizes[kept], sums[kept]
        back.append(((kept // len(table)).astype(np.int32), (kept % len(table)).astype(np.int16)))
    choices = np.zeros((len(over), len(options)), dtype=np.int16)
    at = np.arange(len(over))
    for group in reversed(range(len(options))):
        before, taken = back[group]
        choices[:, group] = taken[at]
        at = before[at]
    return _front([point([t[i] for t, i in zip(options, row, strict=True)]) for row in choices.tolist()])


def _thinned(sizes: np.ndarray, points: int) -> np.ndarray:
    """Places to keep in rising sizes: the first, and the last (the cheapest) of each of `points - 1` intervals."""
    if len(sizes) <= points:
        return np.arange(len(sizes))
    share = (sizes - sizes[0]) / (sizes[-1] - sizes[0])
    interval = np.minimum((share * (points - 1)).astype(np.int64), points - 2)
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True
    return np.flatnonzero(last)


def _front(found: list[Point]) -> list[Point]:
    """Without what exact sums show to be no better."""
    kept: list[Point] = []
    for candidate in sorted(found, key=lambda p: (p.size, p.cost)):
        if not kept or candidate.cost < kept[-1].cost:
            kept.append(candidate)
    return kept
