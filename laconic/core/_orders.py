"""Solvers of `laconic.core.allocate` that go step by step: greedy, threshold by an order, bisection by evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laconic.errors import BadInput, Impossible

from ._options import Option, Point, Table, grouped, number, per_unit, point, steps


def greedy(options: list[list[Option]], budget: float) -> Point:
    """From the smallest options, always the step that saves most cost for its size, of those that still fit.

    A group whose next step does not fit stays where it is, the others go on. The result costs no more than the largest
    point of `frontier` within the budget.
    """
    now = [table[0] for table in options]
    stopped: set[int] = set()
    for group, after in steps(options):
        if group in stopped:
            continue
        before, now[group] = now[group], after
        if math.fsum(option.size for option in now) > budget:
            now[group] = before
            stopped.add(group)
    return point(now)


def threshold(
    cost: Table, size: Table, budget: float, order: Sequence[int] | None, tied: Sequence[Sequence[int]]
) -> list[int]:
    """Every unit at its largest option, then unit by unit of the order one option down, until the sum fits.

    After the last unit of the order the first goes another option down, so that two neighbouring sizes occur at most
    where all units have the same options.

    Args:
        cost: infinite where an option is forbidden; without an order, units go down by rising cost of going all the way.
        size: of each option.
        budget: bound of the total size.
        order: units, the least important first.
        tied: groups of units that go together, with the first of them in the order.
    """
    groups, tables = grouped(cost, size, tied)
    ladders = [sorted(table, key=lambda option: (-option.size, option.cost, option.index)) for table in tables]
    if order is None:
        places = sorted(range(len(groups)), key=lambda g: (ladders[g][-1].cost - ladders[g][0].cost, g))
    else:
        places = _places(order, groups, len(cost))
    now = [ladder[0] for ladder in ladders]
    total = math.fsum(option.size for option in now)
    for rung in range(1, max((len(ladder) for ladder in ladders), default=1)):
        for place in places:
            if total <= budget:
                break
            if rung < len(ladders[place]):
                now[place] = ladders[place][rung]
                total = math.fsum(option.size for option in now)
    if not total <= budget:
        raise Impossible(
            f"the smallest options add up to {number(total)}, which is more than the budget of {number(budget)}"
        )
    return per_unit([option.index for option in now], groups, len(cost))


@dataclass(frozen=True)
class Bisected:
    """What `bisect` found.

    Attributes:
        choice: the option of each unit, of the last choice that was verified.
        result: what the evaluation of it gave.
        moved: how many units went down at each level.
        trials: each choice that was evaluated, and its result, in order.
    """

    choice: tuple[int, ...]
    result: float
    moved: tuple[int, ...]
    trials: tuple[tuple[tuple[int, ...], float], ...] = field(repr=False)


def bisect(
    order: Sequence[int],
    options: Sequence[int],
    evaluate: Callable[[tuple[int, ...]], float],
    least: float,
    *,
    tied: Sequence[Sequence[int]] = (),
) -> Bisected:
    """Units by an order as far down as evaluations allow, level by level.

    All units begin at options[0]. At each further option, the largest prefix of the order, among units that went down at
    the level before, is looked for that can go down again with evaluate(choice) >= least, in ceil(log2(n + 1))
    evaluations for n units. Results need not fall along the order: what is returned was itself evaluated and passed.

    Args:
        order: the units, the least important first.
        options: of every unit, those of least loss first, such as the indices of 16, 8 and 4 bits.
        evaluate: the quality of one option for each unit, higher is better; nan has not passed.
        least: what it must reach.
        tied: groups of units that go together, with the first of them in the order.

    Raises:
        Impossible: not even every unit at options[0] reaches it.
        BadInput: an order that is not one of the units, or no options.
    """
    search = Bisection(order, options, least, tied=tied)
    trials: list[tuple[tuple[int, ...], float]] = []
    while asked := search.ask():
        trials.append((asked[0], float(evaluate(asked[0]))))
        search.tell(*trials[-1])
    choice = search.best()
    if choice is None:
        raise Impossible(
            f"bisect: with option {options[0]} for every unit the result is {trials[-1][1]:.6g}, "
            f"and {least:.6g} is asked for"
        )
    return Bisected(choice, dict(trials)[choice], tuple(search.moved), tuple(trials))


class Bisection:
    """`bisect` step by step: ask for a choice, evaluate it, tell the result. Arguments are those of `bisect`.

    Attributes:
        moved: units that went down at each level that is done.
    """

    def __init__(
        self, order: Sequence[int], options: Sequence[int], least: float, *, tied: Sequence[Sequence[int]] = ()
    ):
        if not options:
            raise BadInput("bisect: at least one option is needed, the one that every unit begins with")
        units = len(order)
        together = {unit: sorted(group) for group in tied for unit in group}
        groups = [group for unit in range(units) if (group := together.get(unit, [unit]))[0] == unit]
        self.options, self.least = tuple(options), least
        self._going = [groups[place] for place in _places(order, groups, units)]
        self.moved: list[int] = []
        self._low, self._high = 0, len(self._going)
        self._base = self._passed = (self.options[0],) * units
        self._verified = self._failed = False
        self._settle()

    def ask(self) -> list[tuple[int, ...]]:
        """The choice to evaluate next; none when it is done."""
        if len(self.moved) < len(self.options) - 1:
            return [self._tried()]
        return [] if self._verified or self._failed else [self._base]

    def tell(self, choice: tuple[int, ...], result: float) -> None:
        """What the evaluation of the choice that was asked for gave."""
        passes, searching = result >= self.least, len(self.moved) < len(self.options) - 1
        self._verified = self._verified or passes
        if not searching:
            self._failed = not passes
        elif passes:
            self._low, self._passed = self._middle, choice
        else:
            self._high = self._middle - 1
        self._settle()

    def best(self) -> tuple[int, ...] | None:
        """The last choice that passed, which is the smallest; None before one did."""
        return self._passed if self._verified else None

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "going": len(self._going), "moved": list(self.moved), "low": self._low, "high": self._high,
            "base": list(self._base), "passed": list(self._passed), "verified": self._verified, "failed": self._failed,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, of a search that was made with the same arguments."""
        del self._going[state["going"] :]
        self.moved, self._low, self._high = list(state["moved"]), state["low"], state["high"]
        self._base, self._passed = tuple(state["base"]), tuple(state["passed"])
        self._verified, self._failed = state["verified"], state["failed"]

    @property
    def _middle(self) -> int:
        return (self._low + self._high + 1) // 2

    def _tried(self) -> tuple[int, ...]:
        return _with(self._base, self._going[: self._middle], self.options[len(self.moved) + 1])

    def _settle(self) -> None:
        """Go to the next level where this one is decided."""
        while len(self.moved) < len(self.options) - 1 and self._low >= self._high:
            del self._going[self._low :]
            self._base = self._passed
            self.moved.append(sum(map(len, self._going)))
            self._low, self._high = 0, len(self._going)


def _with(choice: tuple[int, ...], groups: Sequence[Sequence[int]], option: int) -> tuple[int, ...]:
    changed = {unit for group in groups for unit in group}
    return tuple(option if unit in changed else old for unit, old in enumerate(choice))


def _places(order: Sequence[int], groups: list[list[int]], units: int) -> list[int]:
    """The order of groups, each at its first unit."""
    if sorted(order) != list(range(units)):
        raise BadInput(f"an order names each of the {units} units once, by number; found {list(order)}")
    home = {unit: place for place, group in enumerate(groups) for unit in group}
    return list(dict.fromkeys(home[unit] for unit in order))
