"""`allocate`: which option each unit gets, so that the total cost is least and the total size within a
budget.

The multiple-choice knapsack problem, for units u with options o:

    min sum_u cost[u][x_u]    subject to    sum_u size[u][x_u] <= budget

Solved exactly (to a relative gap) as an integer program by SciPy's HiGHS. It is limited by gap and by nodes of its
search, never by time, so that the same numbers give the same answer on any machine. The gap g is a part of the excess
e(x) = sum_u cost[u][x_u] - min_o cost[u][o], whatever the magnitudes of the costs:

    e(x) <= (1 + g) e(x*)      and so      e(x(B')) <= (1 + g) e(x(B))   for budgets B' >= B

with x* the optimum: more budget never costs more, up to the gap, unless the node limit ended the search. `frontier`
gives the corners of the lower convex hull of all (size, cost) that are reachable, by greedy ratios: the same problem
with fractional choices, for plots and as a safe answer.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from laconic.errors import Impossible

__all__ = ["Point", "allocate", "allocate_within", "frontier"]

Table = Sequence[Sequence[float]]

# HiGHS's tolerances are absolute: 1e-6 on a gap, on a constraint and on a whole number. These scales bring the cost of
# the answer and the room for sizes to numbers of which that is a negligible part.
COST_SCALE, SIZE_SCALE = 1e3, 1e5
COARSE = 10.0  # an answer that is so many times better than what was known is looked for again on a finer scale
ATTEMPTS = 3  # at an answer that exceeds the budget by less than the solver's tolerance


@dataclass(frozen=True)
class Point:
    """One choice for all units: total size, total cost, and the option of each unit."""

    size: float
    cost: float
    choice: tuple[int, ...]


@dataclass(frozen=True)
class _Option:
    size: float
    cost: float
    index: int


def allocate(
    cost: Table,
    size: Table,
    budget: float,
    *,
    tied: Sequence[Sequence[int]] = (),
    gap: float = 1e-6,
    node_limit: int = 100_000,
) -> list[int]:
    """Index of the option that each unit gets.

    Args:
        cost: for each unit, the cost of each option; inf forbids one, negative is allowed.
        size: likewise, not negative.
        budget: bound of the total size.
        tied: groups of units that must take options of the same index, and so have equally many.
        gap: how far from the optimum the answer may be, as a part of what the optimum costs more than if every unit had
            its cheapest option.
        node_limit: nodes of the search tree after which the best answer so far is taken.

    Returns:
        One index a unit. Where options are equally good, the smaller and then the earlier one.

    Raises:
        Impossible: even the smallest options exceed the budget; the message says by how much.
        ValueError: tables that do not fit together, or nan.
    """
    groups, options = _checked(cost, size, tied)
    hull = _walk(options)
    if hull[0].size > budget:
        raise Impossible(
            f"the smallest options add up to {_number(hull[0].size)}, which is more than the budget of "
            f"{_number(budget)}"
        )
    best = [point for point in hull if point.size <= budget][-1]
    if best is not hull[-1]:  # else every unit has its cheapest option already
        best = _improved(options, budget, best, gap, node_limit)
    return _per_unit(best.choice, groups, len(cost))


def allocate_within(
    cost: Table, limits: Sequence[tuple[str, Table, float]], *, gap: float = 1e-3, node_limit: int = 10_000
) -> list[int]:
    """Index of the option that each unit gets, where several things are bounded at once (bytes and milliseconds).

    Args:
        cost: for each unit, the cost of each option; finite.
        limits: name, table of the same shape, and bound of the total of each thing that is bounded; entries may be
            negative.
        gap: how far from the optimum the answer may be, as a part of the largest difference in cost.
        node_limit: nodes of the search tree after which the best answer so far is taken.

    Returns:
        One index a unit.

    Raises:
        Impossible: one bound by itself, or all of them together, cannot be kept.
        ValueError: tables that do not fit together, or numbers that are not finite.
    """
    for name, table, _ in limits:
        if len(table) != len(cost) or any(len(a) != len(b) for a, b in zip(cost, table, strict=True)):
            raise ValueError(f"allocate_within: cost and {name} need the same units with the same options")
    if not all(math.isfinite(x) for table in (cost, *(t for _, t, _ in limits)) for row in table for x in row):
        raise ValueError("allocate_within: a cost, size or time is not finite")
    if not cost:
        return []
    numbers = np.array([number for number, row in enumerate(cost) for _ in row])
    flat = np.array([x - min(row) for row in cost for x in row])
    one_each = csr_array((np.ones(len(flat)), (numbers, np.arange(len(flat)))), shape=(len(cost), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, table, bound in limits:
        least = math.fsum(min(row) for row in table)
        if least > bound:
            raise Impossible(f"the least {name} is {_number(least)}, which is more than the bound of {_number(bound)}")
        # Over each unit's least, as parts of the room that these leave: numbers of the order of one.
        over = np.array([x - min(row) for row in table for x in row]) / ((bound - least) or 1.0)
        constraints.append(LinearConstraint(over[None, :] * SIZE_SCALE, -np.inf, SIZE_SCALE))
    with _quiet():
        result = milp(
            c=flat / (flat.max() or 1.0) * COST_SCALE,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "node_limit": node_limit},
        )
    if result.x is None:
        raise Impossible(f"no choice keeps all bounds together: {', '.join(name for name, _, _ in limits)}")
    taken = result.x > 0.5
    starts = np.searchsorted(numbers, np.arange(len(cost)))
    return [int(np.flatnonzero(taken[start : start + len(row)])[0]) for start, row in zip(starts, cost, strict=True)]


def frontier(cost: Table, size: Table, *, tied: Sequence[Sequence[int]] = ()) -> list[Point]:
    """Corners of the lower convex hull of reachable (size, cost), from the smallest to the cheapest.

    Every one of them is an optimum of `allocate` for its own size as the budget. Consecutive corners differ
    in one unit (or group of tied units).

    Args:
        cost: see `allocate`.
        size: see `allocate`.
        tied: see `allocate`.

    Returns:
        Points of rising size and falling cost; choices have one index a unit.
    """
    groups, options = _checked(cost, size, tied)
    return [
        Point(point.size, point.cost, tuple(_per_unit(point.choice, groups, len(cost)))) for point in _walk(options)
    ]


def _checked(cost: Table, size: Table, tied: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[_Option]]]:
    """Units grouped by ties, and for each group the options that could ever be chosen, by rising size."""
    if len(cost) != len(size) or any(len(c) != len(s) for c, s in zip(cost, size, strict=True)):
        raise ValueError("allocate: cost and size need the same units with the same options")
    in_ties = [unit for group in tied for unit in group]
    if len(set(in_ties)) != len(in_ties) or any(not 0 <= unit < len(cost) for unit in in_ties):
        raise ValueError("allocate: a tied unit does not exist, or stands in two groups")
    groups = [list(group) for group in tied if group] + [[u] for u in range(len(cost)) if u not in set(in_ties)]
    groups.sort()
    tables = []
    for group in groups:
        if len({len(cost[u]) for u in group}) != 1:
            raise ValueError(f"allocate: tied units {group} differ in their number of options")
        sums = [
            _Option(sum(size[u][o] for u in group), sum(cost[u][o] for u in group), o)
            for o in range(len(cost[group[0]]))
        ]
        if any(math.isnan(o.cost) or not 0 <= o.size < math.inf or o.cost == -math.inf for o in sums):
            raise ValueError(f"allocate: units {group} have nan, or sizes that are negative or infinite")
        kept = _undominated([option for option in sums if option.cost < math.inf])
        if not kept:
            raise Impossible(f"units {group} have no option that is allowed")
        tables.append(kept)
    return groups, tables


def _undominated(options: list[_Option]) -> list[_Option]:
    """Options of rising size and falling cost; of equal ones the first."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.cost, o.index)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _walk(options: list[list[_Option]]) -> list[Point]:
    """The greedy walk: from the smallest options, always the step that buys most cost per size."""
    steps: list[tuple[float, int, _Option, _Option]] = []
    for unit, table in enumerate(options):
        hull: list[_Option] = []
        for option in table:
            while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
                hull.pop()
            hull.append(option)
        steps += [(_gain(a, b), unit, a, b) for a, b in zip(hull, hull[1:], strict=False)]
    steps.sort(key=lambda step: (-step[0], step[1], step[3].size))
    now = [table[0] for table in options]
    points = [_point(now)]
    for _, unit, _, after in steps:
        now[unit] = after
        points.append(_point(now))
    return points


def _gain(a: _Option, b: _Option) -> float:
    return (a.cost - b.cost) / (b.size - a.size)


def _point(chosen: list[_Option]) -> Point:
    return Point(math.fsum(o.size for o in chosen), math.fsum(o.cost for o in chosen), tuple(o.index for o in chosen))


def _excess(options: list[list[_Option]], point: Point) -> float:
    """What a choice costs more than every unit's cheapest option; summed by itself, so that no digits are lost."""
    cheapest = [table[-1] for table in options]
    chosen = [
        next(option for option in table if option.index == index)
        for table, index in zip(options, point.choice, strict=True)
    ]
    return math.fsum(option.cost - least.cost for option, least in zip(chosen, cheapest, strict=True))


def _improved(options: list[list[_Option]], budget: float, greedy: Point, gap: float, node_limit: int) -> Point:
    """The best choice within the budget, starting from the greedy one.

    HiGHS stops at a relative gap, but at an absolute one of 1e-6 as well, so costs are given to it as parts of the best
    excess known. Where the answer is far better than that, the measure was too coarse, and the search is made once more
    with the new one: every round but the last divides the excess by `COARSE` at least.
    """
    best, known = greedy, _excess(options, greedy)
    while True:
        found = _solve(options, budget, known, gap, node_limit)
        # A search stopped by its node limit may be worse than what is known.
        excess = math.inf if found is None else _excess(options, found)
        if found is None or excess >= known:
            return best
        best = found
        if excess > known / COARSE:
            return best
        known = excess


def _solve(options: list[list[_Option]], budget: float, known: float, gap: float, node_limit: int) -> Point | None:
    """The integer program with costs as parts of an excess that is `known`; None if the search ended without an answer that fits.

    It is about what the options exceed the least of their kind by: costs over each unit's cheapest, and sizes over each
    unit's smallest, as parts of the room that these leave. An option that alone exceeds the room, or what is known,
    is left out, so that all numbers are of the order of one.
    """
    room = budget - math.fsum(table[0].size for table in options)
    kept = [
        [option for option in table if option.size - table[0].size <= room and option.cost - table[-1].cost <= known]
        for table in options
    ]
    flat = [(number, option) for number, table in enumerate(kept) for option in table]
    numbers = np.array([number for number, _ in flat])
    costs = np.array([option.cost - options[number][-1].cost for number, option in flat])
    sizes = np.array([option.size - options[number][0].size for number, option in flat])
    ones = np.ones(len(flat))
    one_each = csr_array((ones, (numbers, np.arange(len(flat)))), shape=(len(options), len(flat)))
    allowed = SIZE_SCALE
    for _ in range(ATTEMPTS):
        with _quiet():
            result = milp(
                c=costs / known * COST_SCALE,
                integrality=ones,
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(sizes[None, :] / (room or 1.0) * SIZE_SCALE, -np.inf, allowed),
                ],
                options={"mip_rel_gap": gap, "node_limit": node_limit},
            )
        if result.x is None:
            return None
        chosen = [option for (_, option), taken in zip(flat, result.x, strict=True) if taken > 0.5]
        point = _point(chosen)
        if len(chosen) != len(options):
            return None
        if point.size <= budget:
            return point
        allowed -= 2 * SIZE_SCALE * (point.size - budget) / (room or 1.0)  # it was within the solver's tolerance
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off standard output, which may be JSON for a program, what HiGHS prints from C++ unasked."""
    if sys.platform == "win32":  # pragma: no cover - another C library
        yield
        return
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # what is still in C's buffer would otherwise come out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _per_unit(choice: Sequence[int], groups: list[list[int]], units: int) -> list[int]:
    out = [0] * units
    for index, group in zip(choice, groups, strict=True):
        for unit in group:
            out[unit] = index
    return out


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"
