"""The other solvers of `laconic.core.allocate`: dynamic program, greedy, threshold by an order, bisection."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from laconic.core.allocate import SOLVERS, Point, allocate, bisect, frontier, pareto
from laconic.errors import BadInput, Impossible

option = st.tuples(st.integers(0, 60), st.integers(-16, 400).map(lambda eighths: eighths / 8) | st.just(math.inf))
finite = st.tuples(st.integers(0, 60), st.integers(-16, 400).map(lambda eighths: eighths / 8))
units = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def split(tables: list) -> tuple[list[list[float]], list[list[float]]]:
    return [[c for _, c in table] for table in tables], [[float(s) for s, _ in table] for table in tables]


def totals(cost: list, size: list, choice) -> tuple[float, float]:
    picked = list(enumerate(choice))
    return sum(size[u][o] for u, o in picked), sum(cost[u][o] for u, o in picked)


def brute_front(cost: list, size: list) -> list[tuple[float, float]]:
    """By rising size, every (size, cost) below whose cost nothing smaller or as small gets."""
    reached = [totals(cost, size, choice) for choice in itertools.product(*(range(len(table)) for table in cost))]
    kept: list[tuple[float, float]] = []
    for at in sorted(at for at in reached if at[1] < math.inf):
        if not kept or at[1] < kept[-1][1]:
            kept.append(at)
    return kept


@settings(max_examples=120, deadline=None)
@given(units)
def test_the_dynamic_program_finds_every_point_of_the_front(tables: list) -> None:
    cost, size = split(tables)
    if any(min(row) == math.inf for row in cost):
        with pytest.raises(Impossible, match="no option that is allowed"):
            pareto(cost, size)
        return
    points = pareto(cost, size)
    assert [(p.size, p.cost) for p in points] == brute_front(cost, size)
    assert all((p.size, p.cost) == totals(cost, size, p.choice) for p in points)
    corners = {(p.size, p.cost) for p in frontier(cost, size)}
    assert corners <= {(p.size, p.cost) for p in points}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(finite, min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1))
def test_solvers_keep_the_budget_and_none_beats_the_dynamic_program(tables: list, share: float) -> None:
    cost, size = split(tables)
    budget = sum(map(min, size)) * (1 - share) + sum(map(max, size)) * share
    budget = max(budget, sum(map(min, size)))
    found = {solver: totals(cost, size, allocate(cost, size, budget, solver=solver)) for solver in SOLVERS}
    assert all(used <= budget for used, _ in found.values())
    best = [c for s, c in brute_front(cost, size) if s <= budget][-1]
    assert found["pareto"][1] == best and found["program"][1] == pytest.approx(best, abs=1e-3)
    hull = [p.cost for p in frontier(cost, size) if p.size <= budget][-1]
    assert best <= found["greedy"][1] <= hull
    assert found["threshold"][1] >= best
    cut = pareto(cost, size, budget=budget)
    assert [(p.size, p.cost) for p in cut] == [at for at in brute_front(cost, size) if at[0] <= budget]


def test_a_thinned_front_is_real_keeps_its_ends_and_loses_little() -> None:
    size = [[float((1 + (u * 7919) % 9973) * b) for b in (2, 3, 4, 8)] for u in range(24)]
    cost = [[((u * 31) % 17 + 1) * 4.0**-b for b in (2, 3, 4, 8)] for u in range(24)]
    whole, thin = pareto(cost, size, points=20_000), pareto(cost, size, points=400)
    assert len(thin) <= 400 < len(whole) <= 20_000
    assert all((p.size, p.cost) == pytest.approx(totals(cost, size, p.choice)) for p in thin)
    assert (thin[0].choice, thin[-1].choice) == ((0,) * 24, (3,) * 24)
    for share in (0.2, 0.5, 0.8):
        budget = thin[0].size + share * (thin[-1].size - thin[0].size)
        exact = totals(cost, size, allocate(cost, size, budget))[1]
        rough = [p for p in thin if p.size <= budget][-1].cost
        assert exact * (1 - 1e-6) <= rough <= exact * 1.2


def test_tied_units_are_one_in_all_solvers() -> None:
    cost, size = [[0.0, 1.0], [0.0, 9.0], [0.0, 1.0]], [[8.0, 2.0]] * 3
    for solver in SOLVERS:
        choice = allocate(cost, size, 14.0, tied=[(0, 2)], solver=solver)
        assert choice == [1, 0, 1]
    assert [p.choice for p in pareto(cost, size, tied=[(0, 2)])] == [(1, 1, 1), (1, 0, 1), (0, 0, 0)]


def test_threshold_follows_the_order_and_not_the_costs() -> None:
    cost, size = [[0.0, 5.0], [0.0, 1.0], [0.0, 2.0]], [[4.0, 2.0], [4.0, 2.0], [8.0, 4.0]]
    lowered = [allocate(cost, size, 16 - k, solver="threshold", order=[2, 0, 1]) for k in (0, 1, 4, 5, 6, 7, 8)]
    assert lowered == [[0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]
    assert allocate(cost, size, 14, solver="threshold") == [0, 1, 0]  # by what it costs, if no order is given
    # Costs need not say anything: an order is enough.
    assert allocate([[0, 0]] * 3, size, 12, solver="threshold", order=[2, 0, 1]) == [0, 0, 1]
    # Three options: every unit goes one down before any goes two.
    size = [[8.0, 4.0, 2.0]] * 3
    steps = [allocate([[0.0] * 3] * 3, size, b, solver="threshold", order=[1, 2, 0]) for b in (20, 12, 10, 6)]
    assert steps == [[0, 1, 0], [1, 1, 1], [1, 2, 1], [2, 2, 2]]


def test_threshold_passes_over_what_is_forbidden_and_units_with_fewer_options() -> None:
    cost, size = [[0.0, math.inf, 1.0], [0.0]], [[8.0, 4.0, 2.0], [5.0]]
    assert allocate(cost, size, 8.0, solver="threshold", order=[1, 0]) == [2, 0]
    with pytest.raises(Impossible, match="add up to 7, which is more than the budget of 6"):
        allocate(cost, size, 6.0, solver="threshold", order=[1, 0])


def test_greedy_goes_on_where_a_step_does_not_fit() -> None:
    cost, size = [[10.0, 0.0], [3.0, 0.0]], [[0.0, 10.0], [0.0, 4.0]]
    assert allocate(cost, size, 5.0, solver="greedy") == [0, 1]
    assert [p.choice for p in frontier(cost, size) if p.size <= 5] == [(0, 0)]


class Counted:
    """A quality that falls by a part for each unit that goes down, and what was asked."""

    def __init__(self, losses, levels=(0.0, 1.0, 3.0)):
        self.losses, self.levels, self.asked = losses, levels, []

    def __call__(self, choice: tuple[int, ...]) -> float:
        self.asked.append(choice)
        return 1.0 - sum(loss * self.levels[o] for loss, o in zip(self.losses, choice, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 64).map(lambda n: n / 1024), min_size=1, max_size=12), st.integers(0, 16), st.randoms())
def test_bisect_moves_the_largest_prefix_where_quality_falls(losses: list, bound: int, random) -> None:
    order = list(range(len(losses)))
    random.shuffle(order)
    quality, least = Counted(losses), 1 - bound / 64
    found = bisect(order, (0, 1), quality, least)
    fits = [n for n in range(len(order) + 1) if 1 - sum(losses[u] for u in order[:n]) >= least]
    assert found.moved == (max(fits),)
    assert found.choice == tuple(int(u in order[: max(fits)]) for u in range(len(losses)))
    assert found.result == quality(found.choice) >= least
    asked = quality.asked[:-1]
    assert len(asked) == len(set(asked)) == len(found.trials) <= math.ceil(math.log2(len(order) + 1)) + 1


def test_bisect_goes_level_by_level_among_those_that_went_before() -> None:
    found = bisect([2, 0, 1, 3], (0, 1, 2), Counted([0.01, 0.05, 0.001, 0.5]), 0.91)
    # 2, 0 and 1 together lose 0.061; then 2 and 0 may lose three times as much, 1 may not.
    assert found.moved == (3, 2) and found.choice == (2, 1, 2, 0)
    assert found.result == pytest.approx(1 - 0.05 - 3 * 0.011)


def test_bisect_keeps_what_was_verified_where_quality_does_not_fall_steadily() -> None:
    table = {0: 1.0, 1: 0.2, 2: 0.9, 3: 0.1, 4: math.nan}
    found = bisect(range(4), (0, 1), lambda choice: table[sum(choice)], 0.5)
    assert found.moved == (2,) and found.result == 0.9
    assert all(any(choice == tried for tried, _ in found.trials) for choice in (found.choice,))
    with pytest.raises(Impossible, match="option 7 for every unit the result is 0.2, and 0.5 is asked for"):
        bisect(range(2), (7, 1), lambda choice: 0.2, 0.5)
    assert bisect([], (0, 1), lambda choice: 1.0, 0.5).choice == ()


def test_bisect_moves_tied_units_together() -> None:
    found = bisect([1, 0, 2], (0, 1), Counted([0.1, 0.01, 0.1]), 0.85, tied=[(1, 2)])
    assert found.choice == (0, 1, 1) and found.moved == (2,)


def test_clear_words() -> None:
    with pytest.raises(BadInput, match=r"no solver 'ilp'; they are program, pareto, greedy, threshold"):
        allocate([[1]], [[1]], 1, solver="ilp")
    with pytest.raises(BadInput, match="an order says nothing to the solver 'program'"):
        allocate([[1]], [[1]], 1, order=[0])
    for order in ([0], [0, 0], [0, 2]):
        with pytest.raises(BadInput, match=r"an order names each of the 2 units once, by number; found \[0"):
            allocate([[1], [1]], [[1], [1]], 9, solver="threshold", order=order)
        with pytest.raises(BadInput):
            bisect(order, (0, 1), lambda choice: float("x"), 1) if order != [0] else bisect([1], (0,), len, 1)
    with pytest.raises(BadInput, match="at least one option"):
        bisect([0], (), lambda choice: 1.0, 0.0)
    with pytest.raises(BadInput, match="at least 2, not 1"):
        pareto([[1]], [[1]], points=1)
    for solver in ("pareto", "greedy", "threshold"):
        with pytest.raises(Impossible, match="add up to 3, which is more than the budget of 2"):
            allocate([[1, 0], [1, 0]], [[1, 5], [2, 5]], 2, solver=solver)
        with pytest.raises(ValueError, match="nan"):
            allocate([[math.nan]], [[1]], 1, solver=solver)
        assert allocate([], [], 0, solver=solver) == []
    assert pareto([], []) == [Point(0.0, 0.0, ())]
