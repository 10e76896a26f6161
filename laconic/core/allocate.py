"""`allocate`: which option each unit gets, so that the total cost is least and the total size within a
budget.

The multiple-choice knapsack problem, for units u (layers) with options o (numbers of bits):

    min sum_u cost[u][x_u]    subject to    sum_u size[u][x_u] <= budget

One table, several ways to read it (`solver`):

    "program"     the optimum to a relative gap, as an integer program by SciPy's HiGHS (the default)
    "pareto"      the optimum by dynamic programming; `pareto` gives the best choice for every budget at once
    "greedy"      always the step that saves most cost for its bytes, of those that still fit
    "threshold"   costs are not added up: the least important units go to fewer bytes first, as an order says

The program is limited by gap and by nodes of its search, never by time, so that the same numbers give the same answer
on any machine. The gap g is a part of the excess e(x) = sum_u cost[u][x_u] - min_o cost[u][o], whatever the magnitudes
of the costs:

    e(x) <= (1 + g) e(x*)      and so      e(x(B')) <= (1 + g) e(x(B))   for budgets B' >= B

with x* the optimum: more budget never costs more, up to the gap, unless the node limit ended the search.

Where costs of units do not add up, `bisect` moves units by an order as far as real evaluations allow (`Bisection`
is the same step by step). `frontier` gives
the corners of the lower convex hull of all (size, cost) that are reachable, by greedy ratios: the same problem with
fractional choices, for plots and as a safe answer. `allocate_within` bounds several things at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from laconic.errors import BadInput, Impossible

from ._options import Option, Point, Table, checked, number, per_unit, walk
from ._orders import Bisected, Bisection, bisect, greedy, threshold
from ._pareto import POINTS, dynamic
from ._program import COST_SCALE, SIZE_SCALE, improved, quiet

__all__ = ["SOLVERS", "Bisected", "Bisection", "Point", "allocate", "allocate_within", "bisect", "frontier", "pareto"]

SOLVERS = ("program", "pareto", "greedy", "threshold")


def allocate(
    cost: Table,
    size: Table,
    budget: float,
    *,
    tied: Sequence[Sequence[int]] = (),
    gap: float = 1e-6,
    node_limit: int = 100_000,
    solver: str = "program",
    order: Sequence[int] | None = None,
) -> list[int]:
    """Index of the option that each unit gets.

    Args:
        cost: for each unit, the cost of each option; inf forbids one, negative is allowed.
        size: likewise, not negative.
        budget: bound of the total size.
        tied: groups of units that must take options of the same index, and so have equally many.
        gap: of "program": how far from the optimum the answer may be, as a part of what the optimum costs more than if
            every unit had its cheapest option.
        node_limit: of "program": nodes of the search tree after which the best answer so far is taken.
        solver: one of `SOLVERS`.
        order: of "threshold": the units, the least important first; by what their smallest option costs more than their
            largest if it is left out.

    Returns:
        One index a unit. Where options are equally good, the smaller and then the earlier one.

    Raises:
        Impossible: even the smallest options exceed the budget; the message says by how much.
        BadInput: there is no such solver, or an order that is not one of the units.
        ValueError: tables that do not fit together, or nan.
    """
    if solver not in SOLVERS:
        raise BadInput(f"allocate: there is no solver {solver!r}; they are {', '.join(SOLVERS)}")
    if order is not None and solver != "threshold":
        raise BadInput(f"allocate: an order says nothing to the solver {solver!r}, give it to 'threshold'")
    if solver == "threshold":
        return threshold(cost, size, budget, order, tied)
    groups, options = checked(cost, size, tied)
    _check_budget(math.fsum(table[0].size for table in options), budget)
    solved: dict[str, Callable[[], Point]] = {
        "program": lambda: _program(options, budget, gap, node_limit),
        "pareto": lambda: [p for p in dynamic(options, budget) if p.size <= budget][-1],
        "greedy": lambda: greedy(options, budget),
    }
    return per_unit(solved[solver]().choice, groups, len(cost))


def pareto(
    cost: Table, size: Table, *, tied: Sequence[Sequence[int]] = (), budget: float = math.inf, points: int = POINTS
) -> list[Point]:
    """Every (size, cost) that no other choice beats in both, from the smallest to the cheapest.

    Dynamic programming over units: the front of the first n is that of the sums of the front of the first n - 1 with the
    options of unit n. It is exact while no front on the way is longer than `points`. Beyond, sizes are cut into as many
    equal intervals, and of each the cheapest choice is kept: the result is still of real choices, with a little cost lost.

    Args:
        cost: see `allocate`.
        size: see `allocate`.
        tied: see `allocate`.
        budget: leave out what is larger.
        points: bound of the length of a front.

    Returns:
        Points of rising size and falling cost; choices have one index a unit.

    Raises:
        Impossible: even the smallest options exceed the budget.
        ValueError: see `allocate`.
    """
    if points < 2:
        raise BadInput(f"pareto: a front has two ends, so points is at least 2, not {points}")
    groups, options = checked(cost, size, tied)
    _check_budget(math.fsum(table[0].size for table in options), budget)
    found = [p for p in dynamic(options, budget, points) if p.size <= budget]
    return [Point(p.size, p.cost, tuple(per_unit(p.choice, groups, len(cost)))) for p in found]


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
            raise Impossible(f"the least {name} is {number(least)}, which is more than the bound of {number(bound)}")
        # Over each unit's least, as parts of the room that these leave: numbers of the order of one.
        over = np.array([x - min(row) for row in table for x in row]) / ((bound - least) or 1.0)
        constraints.append(LinearConstraint(over[None, :] * SIZE_SCALE, -np.inf, SIZE_SCALE))
    with quiet():
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
    groups, options = checked(cost, size, tied)
    return [Point(point.size, point.cost, tuple(per_unit(point.choice, groups, len(cost)))) for point in walk(options)]


def _program(options: list[list[Option]], budget: float, gap: float, node_limit: int) -> Point:
    hull = walk(options)
    best = [point for point in hull if point.size <= budget][-1]
    if best is hull[-1]:  # every unit has its cheapest option already
        return best
    return improved(options, budget, best, gap, node_limit)


def _check_budget(least: float, budget: float) -> None:
    if math.isnan(budget):
        raise ValueError("allocate: the budget is nan")
    if least > budget:
        raise Impossible(
            f"the smallest options add up to {number(least)}, which is more than the budget of {number(budget)}"
        )
