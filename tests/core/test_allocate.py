"""Allocation: the optimum, found by brute force too, and clear words where there is none."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from laconic.core.allocate import allocate, frontier
from laconic.errors import Impossible

# Costs are exact in binary, so that sums are the same in any order.
option = st.tuples(
    st.integers(0, 60), st.integers(-16, 400).map(lambda eighths: eighths / 8) | st.just(math.inf)
)
units = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def split(tables: list[list[tuple[int, float]]]) -> tuple[list[list[float]], list[list[float]]]:
    return [[c for _, c in table] for table in tables], [[float(s) for s, _ in table] for table in tables]


def totals(cost: list, size: list, choice: list[int]) -> tuple[float, float]:
    picked = list(enumerate(choice))
    return sum(size[u][o] for u, o in picked), sum(cost[u][o] for u, o in picked)


def brute(cost: list, size: list, budget: float) -> float:
    choices = itertools.product(*(range(len(table)) for table in cost))
    reached = [totals(cost, size, list(choice)) for choice in choices]
    return min((c for s, c in reached if s <= budget and c < math.inf), default=math.inf)


@settings(max_examples=120, deadline=None)
@given(units, st.integers(0, 250))
def test_the_optimum(tables: list, budget: int) -> None:
    cost, size = split(tables)
    best = brute(cost, size, budget)
    if best == math.inf:
        with pytest.raises(Impossible):
            allocate(cost, size, budget)
        return
    choice = allocate(cost, size, budget)
    used, paid = totals(cost, size, choice)
    assert used <= budget
    spread = sum(max(row) - min(row) for row in ([c for c in row if c < math.inf] for row in cost))
    assert paid == pytest.approx(best, abs=1e-5 * (1 + spread))
    assert choice == allocate(cost, size, budget)


# Costs over 24 orders of magnitude, sizes of parameters in bytes: what a network has.
wide_option = st.tuples(
    st.integers(0, 10**9), st.tuples(st.integers(1, 999), st.integers(-40, 40)).map(lambda c: math.ldexp(*c))
)
wide_units = st.lists(st.lists(wide_option, min_size=2, max_size=4), min_size=2, max_size=5)
WITHIN = 1 + 2e-6  # the gap that was asked for, and the solver's own rounding


def excess(cost: list, choice: list[int]) -> float:
    return math.fsum(row[o] - min(row) for row, o in zip(cost, choice, strict=True))


@settings(max_examples=150, deadline=None)
@given(wide_units, st.floats(0, 1), st.floats(0, 1))
def test_within_the_gap_and_monotone_in_the_budget_whatever_the_magnitudes(
    tables: list, one: float, other: float
) -> None:
    cost, size = split(tables)
    least, most = sum(min(row) for row in size), sum(max(row) for row in size)
    choices = [list(choice) for choice in itertools.product(*(range(len(table)) for table in cost))]
    found = []
    for share in sorted((one, other)):
        budget = least + share * (most - least)
        choice = allocate(cost, size, budget)
        assert totals(cost, size, choice)[0] <= budget
        best = min(excess(cost, c) for c in choices if totals(cost, size, c)[0] <= budget)
        found.append(excess(cost, choice))
        assert found[-1] <= best * WITHIN
    assert found[1] <= found[0] * WITHIN


@settings(max_examples=30, deadline=None)
@given(units, st.floats(0, 1), st.sampled_from((-900, -60, 60, 900)))
def test_the_unit_of_costs_does_not_matter(tables: list, share: float, exponent: int) -> None:
    cost, size = split(tables)
    if any(min(row) == math.inf for row in cost):
        return
    budget = sum(min(row) for row in size) * (1 - share) + sum(max(row) for row in size) * share
    scaled = [[math.ldexp(c, exponent) for c in row] for row in cost]
    try:
        want = allocate(cost, size, budget)
    except Impossible:  # the smallest option of a unit is not allowed
        with pytest.raises(Impossible):
            allocate(scaled, size, budget)
        return
    assert allocate(scaled, size, budget) == want


def test_monotone_on_a_network_where_one_unit_costs_a_million_times_the_others() -> None:
    cost, size, _ = large(60)
    cost = [[c * 10.0 ** -(u % 13) for c in row] for u, row in enumerate(cost)]
    least, most = sum(row[0] for row in size), sum(row[-1] for row in size)
    found = [
        excess(cost, allocate(cost, size, least + share / 12 * (most - least), node_limit=20_000)) for share in range(13)
    ]
    assert found[-1] == 0.0
    assert all(later <= earlier * WITHIN for earlier, later in itertools.pairwise(found))


@settings(max_examples=60, deadline=None)
@given(units)
def test_the_frontier_is_the_lower_hull(tables: list) -> None:
    cost, size = split(tables)
    if any(min(row) == math.inf for row in cost):
        with pytest.raises(Impossible, match="no option that is allowed"):
            frontier(cost, size)
        return
    points = frontier(cost, size)
    for point in points:
        assert (point.size, point.cost) == pytest.approx(totals(cost, size, list(point.choice)))
        assert point.cost == pytest.approx(brute(cost, size, point.size), abs=1e-9)
    slopes = [(b.cost - a.cost) / (b.size - a.size) for a, b in itertools.pairwise(points)]
    assert all(slope < 0 for slope in slopes)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))
    assert points[0].size == sum(min(s for s, c in zip(*row, strict=True) if c < math.inf)
                                 for row in zip(size, cost, strict=True))  # fmt: skip
    assert points[-1].cost == pytest.approx(sum(min(row) for row in cost))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(option, min_size=3, max_size=3), min_size=3, max_size=4), st.integers(0, 200))
def test_tied_units_choose_together(tables: list, budget: int) -> None:
    cost, size = split(tables)
    merged_cost = [[a + b for a, b in zip(cost[0], cost[2], strict=True)], cost[1], *cost[3:]]
    merged_size = [[a + b for a, b in zip(size[0], size[2], strict=True)], size[1], *size[3:]]
    try:
        want = allocate(merged_cost, merged_size, budget)
    except Impossible:
        with pytest.raises(Impossible):
            allocate(cost, size, budget, tied=[(0, 2)])
        return
    got = allocate(cost, size, budget, tied=[(2, 0)])
    assert got == [want[0], want[1], want[0], *want[2:]]
    for point in frontier(cost, size, tied=[(0, 2)]):
        assert point.choice[0] == point.choice[2]


def large(n: int) -> tuple[list, list, float]:
    """A network's worth of units of very different sizes."""
    size = [[float((1 + (u * 7919) % 9973) * 1000 * b) for b in range(2, 9)] for u in range(n)]
    cost = [[((u * 31) % 17 + 1) * 4.0**-b for b in range(2, 9)] for u in range(n)]
    return cost, size, sum(row[2] for row in size) + 12345


def test_a_network_of_units_in_a_moment_and_within_the_budget() -> None:
    cost, size, budget = large(200)
    used, paid = totals(cost, size, allocate(cost, size, budget))
    assert used <= budget
    greedy = [point.cost for point in frontier(cost, size) if point.size <= budget][-1]
    assert paid <= greedy
    # One node is no search at all: the answer is still within the budget, and not worse than the greedy one.
    used, paid = totals(cost, size, allocate(cost, size, budget, node_limit=1))
    assert used <= budget and paid <= greedy


def test_the_solver_prints_nothing() -> None:
    """What C++ writes can only be seen from outside: `--json` promises one line."""
    code = (
        "from tests.core.test_allocate import *; c, s, b = large(300); allocate(c, s, b); print('one line')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "one line\n"


def test_everything_fits() -> None:
    assert allocate([[3, 1, 1], [5, 0, 2]], [[1, 2, 3], [1, 9, 9]], 100) == [1, 1]
    assert allocate([], [], 0) == []
    assert allocate([[2.0]], [[0]], 0) == [0]


def test_clear_words() -> None:
    with pytest.raises(Impossible, match=r"add up to 3,000, which is more than the budget of 2,999\.5"):
        allocate([[1, 0], [1, 0]], [[1000, 5000], [2000, 5000]], 2999.5)
    with pytest.raises(Impossible, match=r"units \[1\] have no option that is allowed"):
        allocate([[1], [math.inf]], [[1], [1]], 9)
    for cost, size in (
        ([[1]], [[1, 2]]),
        ([[1]], []),
        ([[math.nan]], [[1]]),
        ([[1]], [[-1]]),
        ([[1]], [[math.inf]]),
    ):
        with pytest.raises(ValueError):
            allocate(cost, size, 9)
    with pytest.raises(ValueError, match="differ in their number of options"):
        allocate([[1], [1, 2]], [[1], [1, 2]], 9, tied=[(0, 1)])
    with pytest.raises(ValueError, match="two groups"):
        allocate([[1], [1]], [[1], [1]], 9, tied=[(0, 1), (1,)])
