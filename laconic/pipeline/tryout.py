"""Trying plans: each is rounded to nearest and measured on the select split, which is far cheaper than solving it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from laconic.core.allocate import allocate_within
from laconic.core.units import Unit
from laconic.errors import Impossible
from laconic.nn import matrix_view, restore_view
from laconic.numerics import Scheme, fake_quantize

from .decide import choose
from .plan import Ground

Choice = dict[str, Scheme | None]
Measured = Callable[[Choice], float]  # the drop on the select split of a plan that is in the model

TRIED = (1.0, 0.85, 0.7, 0.55)  # shares of the byte ceiling at which plans are tried on the select split
LADDER = (3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)  # ratios tried where only the drop is bounded, while it holds
RETREAT = (3.0, 2.5, 2.0, 1.5)  # and where it does not hold at the first of them
GROWTH = 1.15  # how much larger the next plan is after a solved one missed


def try_plans(
    ground: Ground,
    costs: Mapping[str, list[float]],
    ceiling: int | None,
    drop: float | None,
    several: bool,
    measure: Measured,
    progress: Callable[[int, int], None],
) -> Choice:
    """Measure plans and choose the one to solve: the best under the ceiling, else the smallest that holds the drop.

    Args:
        ground: the model in memory; its values are the same afterwards.
        costs: of every option.
        ceiling: bytes of the file, or None.
        drop: that is allowed, or None for none.
        several: whether to measure more plans than the choice needs, for the plot.
        measure: the drop of the plan whose values the model holds.
        progress: is called with (done, total).
    """
    original = {u.name: ground.model.get_parameter(u.name).detach().clone() for u in ground.packable}
    least, done = ground.least(), 0

    def attempt(ceiling: int) -> tuple[Choice, bool]:
        nonlocal done
        progress(done, len(LADDER))
        done += 1
        decision = fit(ground, costs, ceiling)
        _round(ground, decision, original)
        return decision, measure(decision) <= (drop or 0.0)

    try:
        if ceiling is not None:
            shares = TRIED[: len(TRIED) if several else 1]
            return [attempt(c)[0] for share in shares if (c := int(ceiling * share)) >= least][0]
        up, down = ([int(ground.source.size_before / r) for r in ratios] for ratios in (LADDER, RETREAT))
        return smallest(attempt, [c for c in up if c >= least], [c for c in down if c >= least] or [least])
    finally:
        for name, value in original.items():
            ground.model.get_parameter(name).data.copy_(value)


def fit(ground: Ground, costs: Mapping[str, list[float]], ceiling: int) -> Choice:
    """The cheapest decision whose exact file fits under the ceiling."""
    fixed = ground.layout({}).total_bytes - sum(u.nbytes for u in ground.packable)
    # Units state an upper bound of their share of the header: what that is too much by is room as well.
    least: Choice = {u.name: u.options[-1] for u in ground.packable}
    room = ceiling + _stored(ground, least) - ground.layout(least).total_bytes
    try:
        for _ in range(8):
            decision = choose(ground.units, dict(costs), room)
            excess = ground.layout(decision).total_bytes - ceiling
            if excess <= 0:
                return decision
            room = min(room - excess - 64, _stored(ground, decision) - 1)  # less than this plan takes, or it comes again
        return choose(ground.units, dict(costs), ceiling - fixed)  # bounds add up to no less than the file
    except Impossible:
        return least


def _stored(ground: Ground, decision: Choice) -> int:
    """Bytes of the parameters that can be packed, an upper bound."""
    return sum(u.nbytes if (s := decision.get(u.name)) is None else u.stored(s) for u in ground.packable)


def fit_within(
    ground: Ground,
    costs: Mapping[str, list[float]],
    ceiling: int | None,
    times: Callable[[Unit, Scheme | None], float],
    room: float,
) -> Choice:
    """The cheapest decision whose exact file fits under a ceiling, and whose layers cost at most `room` milliseconds more
    than as they are (less than none: they must gain that much).

    Raises:
        Impossible: there is none.
    """
    units = ground.packable
    options = [(None, *u.options) for u in units]
    cost = [[0.0, *costs[u.name]] for u in units]
    limits = [("time", [[times(u, s) for s in choices] for u, choices in zip(units, options, strict=True)], room)]
    if ceiling is not None:
        # Units state an upper bound of their share of the header, so the file is never larger than this sum.
        fixed = ground.layout({}).total_bytes - sum(u.nbytes for u in units)
        size = [[float(u.stored(s)) for s in choices] for u, choices in zip(units, options, strict=True)]
        limits.append(("size", size, float(ceiling - fixed)))
    picked = allocate_within(cost, limits)
    return {u.name: choices[i] for u, choices, i in zip(units, options, picked, strict=True)}


def grown(ground: Ground, costs: Mapping[str, list[float]], decision: Choice, ceiling: int | None) -> Choice | None:
    """The next larger plan after one that missed, or None where the ceiling leaves no room."""
    now = ground.layout(decision).total_bytes
    room = min(int(now * GROWTH), ceiling if ceiling is not None else ground.source.size_before)
    larger = fit(ground, costs, room)
    return larger if ground.layout(larger).total_bytes > now and larger != decision else None


def by_shape(ground: Ground, ceiling: int) -> Choice:
    """A decision from shapes alone: every halving of a weight's step counts four times, every weight alike."""
    costs = {u.name: [u.numel * 4.0**-s.bits for s in u.options] for u in ground.packable}
    return fit(ground, costs, max(ceiling, ground.least()))


def smallest(attempt: Callable[[int], tuple[Any, bool]], up: Sequence[int], down: Sequence[int]) -> Any:
    """The last plan that holds while ceilings fall along `up`; else the first that holds as they rise along `down`."""
    best = None
    for ceiling in up:
        found, holds = attempt(ceiling)
        if not holds:
            break
        best = found
    if best is not None:
        return best
    for ceiling in down:
        found, holds = attempt(ceiling)
        if holds:
            break
    return found


def _round(ground: Ground, decision: Mapping[str, Scheme | None], original: Mapping[str, torch.Tensor]) -> None:
    for unit in ground.packable:
        ground.model.get_parameter(unit.name).data.copy_(rounded(unit, decision.get(unit.name), original[unit.name]))


def rounded(unit: Unit, scheme: Scheme | None, value: torch.Tensor) -> torch.Tensor:
    """A parameter's value rounded to nearest by a scheme; as it is for None."""
    if scheme is None:
        return value
    return restore_view(fake_quantize(matrix_view(value, unit.view), scheme, unit.name), unit.spec(scheme))
