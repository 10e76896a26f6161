"""The options of a multiple-choice knapsack problem, as all solvers of `laconic.core.allocate` read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from laconic.errors import Impossible

Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Point:
    """One choice for all units: total size, total cost, and the option of each unit."""

    size: float
    cost: float
    choice: tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """One option of a group of units: index in the tables, total size and cost."""

    size: float
    cost: float
    index: int


def checked(cost: Table, size: Table, tied: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[Option]]]:
    """Units grouped by ties, and for each group the options that could ever be chosen, by rising size."""
    groups, tables = grouped(cost, size, tied)
    return groups, [undominated(table) for table in tables]


def grouped(cost: Table, size: Table, tied: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[Option]]]:
    """Units grouped by ties, and for each group the options that are allowed, as the tables have them."""
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
            Option(sum(size[u][o] for u in group), sum(cost[u][o] for u in group), o)
            for o in range(len(cost[group[0]]))
        ]
        if any(math.isnan(o.cost) or not 0 <= o.size < math.inf or o.cost == -math.inf for o in sums):
            raise ValueError(f"allocate: units {group} have nan, or sizes that are negative or infinite")
        kept = [option for option in sums if option.cost < math.inf]
        if not kept:
            raise Impossible(f"units {group} have no option that is allowed")
        tables.append(kept)
    return groups, tables


def undominated(options: list[Option]) -> list[Option]:
    """Options of rising size and falling cost; of equal ones the first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.cost, o.index)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def walk(options: list[list[Option]]) -> list[Point]:
    """The greedy walk: from the smallest options, always the step that buys most cost per size."""
    now = [table[0] for table in options]
    points = [point(now)]
    for group, after in steps(options):
        now[group] = after
        points.append(point(now))
    return points


def steps(options: list[list[Option]]) -> list[tuple[int, Option]]:
    """Steps of a group to an option along the lower hull of its own, those that buy most cost per size first."""
    found: list[tuple[float, int, Option]] = []
    for group, table in enumerate(options):
        hull: list[Option] = []
        for option in table:
            while len(hull) > 1 and gain(hull[-2], hull[-1]) <= gain(hull[-2], option):
                hull.pop()
            hull.append(option)
        found += [(gain(a, b), group, b) for a, b in zip(hull, hull[1:], strict=False)]
    found.sort(key=lambda step: (-step[0], step[1], step[2].size))
    return [(group, after) for _, group, after in found]


def gain(a: Option, b: Option) -> float:
    """Cost saved by each unit of size, from one option to a larger one."""
    return (a.cost - b.cost) / (b.size - a.size)


def point(chosen: Sequence[Option]) -> Point:
    """What one option for each group adds up to; the choice has one index a group."""
    return Point(math.fsum(o.size for o in chosen), math.fsum(o.cost for o in chosen), tuple(o.index for o in chosen))


def per_unit(choice: Sequence[int], groups: list[list[int]], units: int) -> list[int]:
    """One index a unit, from one a group."""
    out = [0] * units
    for index, group in zip(choice, groups, strict=True):
        for unit in group:
            out[unit] = index
    return out


def number(value: float) -> str:
    """A size, as messages say it."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"
