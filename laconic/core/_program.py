"""The integer program of `laconic.core.allocate`, by SciPy's HiGHS.

It is limited by gap and by nodes of its search, never by time, so that the same numbers give the same answer on any
machine.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ._options import Option, Point, point

# HiGHS's tolerances are absolute: 1e-6 on a gap, on a constraint and on a whole number. These scales bring the cost of
# the answer and the room for sizes to numbers of which that is a negligible part.
COST_SCALE, SIZE_SCALE = 1e3, 1e5
COARSE = 10.0  # an answer that is so many times better than what was known is looked for again on a finer scale
ATTEMPTS = 3  # at an answer that exceeds the budget by less than the solver's tolerance


def excess(options: list[list[Option]], found: Point) -> float:
    """What a choice costs more than every unit's cheapest option; summed by itself, so that no digits are lost."""
    cheapest = [table[-1] for table in options]
    chosen = [
        next(option for option in table if option.index == index)
        for table, index in zip(options, found.choice, strict=True)
    ]
    return math.fsum(option.cost - least.cost for option, least in zip(chosen, cheapest, strict=True))


def improved(options: list[list[Option]], budget: float, greedy: Point, gap: float, node_limit: int) -> Point:
    """The best choice within the budget, starting from the greedy one.

    HiGHS stops at a relative gap, but at an absolute one of 1e-6 as well, so costs are given to it as parts of the best
    excess known. Where the answer is far better than that, the measure was too coarse, and the search is made once more
    with the new one: every round but the last divides the excess by `COARSE` at least.
    """
    best, known = greedy, excess(options, greedy)
    while True:
        found = solve(options, budget, known, gap, node_limit)
        # A search stopped by its node limit may be worse than what is known.
        over = math.inf if found is None else excess(options, found)
        if found is None or over >= known:
            return best
        best = found
        if over > known / COARSE:
            return best
        known = over


def solve(options: list[list[Option]], budget: float, known: float, gap: float, node_limit: int) -> Point | None:
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
        with quiet():
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
        found = point(chosen)
        if len(chosen) != len(options):
            return None
        if found.size <= budget:
            return found
        allowed -= 2 * SIZE_SCALE * (found.size - budget) / (room or 1.0)  # it was within the solver's tolerance
    return None


@contextmanager
def quiet() -> Iterator[None]:
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
