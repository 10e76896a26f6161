"""Choosing a plan under a latency ceiling: layers are timed by kind, a plan is tried whole, and the search corrects itself.

What a layer costs by itself does not add up to what a model costs: blocks run fused, caches are shared. So each plan that
the integer program gives is built with empty weights and timed as a whole, and the difference to what was promised is held
against the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laconic.core.record import FOLD, Record
from laconic.core.units import Unit
from laconic.errors import Impossible
from laconic.kernels.inputs import INT8_TOKENS, int8_tensor
from laconic.numerics import Scheme

from .plan import Ground
from .timing import LayerTimes, fuse_records
from .tryout import Choice, fit_within

TRIES = 3  # whole plans timed for each way of taking inputs
MARGIN = 0.97  # of the ceiling that a plan aims at: a clock never says the same twice


@dataclass
class Timed:
    """A plan that was timed whole.

    Attributes:
        decision: the scheme of every unit.
        inputs: how packed linear layers take their inputs.
        milliseconds: of the whole packed model.
    """

    decision: Choice
    inputs: str
    milliseconds: float


def set_inputs(units: Sequence[Unit], decision: Mapping[str, Scheme | None], inputs: str) -> None:
    """Let the linear layers that a decision packs take their inputs in one way."""
    for unit in units:
        unit.inputs = inputs if unit.op == "linear" and decision.get(unit.name) is not None else ""


def packed_records(ground: Ground, decision: Mapping[str, Scheme | None], fuse: bool) -> list[Record]:
    """What a decision does to a model, without values."""
    folds = [Record(FOLD, layer, {"norm": norm}) for layer, norm in ground.folded]
    packs = [u.record(s) for u in ground.packable if (s := decision.get(u.name)) is not None]
    fused = fuse_records(ground.source.skeleton(), [*folds, *packs])[0] if fuse else []
    return [*folds, *packs, *fused]


def find_timed(
    ground: Ground,
    costs: Mapping[str, list[float]],
    times: LayerTimes,
    bytes_ceiling: int | None,
    before: float,
    ceiling: float,
    ways: Sequence[str],
    try_whole: Callable[[Choice], float],
) -> tuple[Timed, list[Timed]]:
    """The plan of least cost that keeps both ceilings, and all that were timed.

    Args:
        ground: the model; `inputs` of its units are set to those of the plan.
        costs: of every option.
        times: of layers.
        bytes_ceiling: of the file, or None.
        before: milliseconds of the float model.
        ceiling: milliseconds that the packed one may take.
        ways: how inputs may be taken (words of `laconic.kernels.inputs`), the better first.
        try_whole: milliseconds of a plan as a whole.

    Raises:
        Impossible: none keeps them; the message has the least that was measured.
    """
    tried: list[Timed] = []
    for inputs in ways:
        promised = MARGIN * ceiling
        for _ in range(TRIES):
            extra = lambda unit, scheme, inputs=inputs: times.extra(  # noqa: E731
                unit, scheme, inputs if unit.op == "linear" else ""
            )
            try:
                decision = fit_within(ground, costs, bytes_ceiling, extra, promised - before)
            except Impossible:
                break
            set_inputs(ground.units, decision, inputs)
            found = Timed(decision, inputs, try_whole(decision))
            tried.append(found)
            if found.milliseconds <= ceiling:
                return found, tried
            expected = before + sum(extra(u, decision.get(u.name)) for u in ground.packable)
            promised = MARGIN * ceiling - max(0.0, found.milliseconds - expected)
    # Sums of layers may promise too little where blocks run fused: the fastest option of every layer is tried last.
    for inputs in ways:
        fastest: Choice = {}
        for unit in ground.packable:
            options = [None, *unit.options]
            fastest[unit.name] = min(
                options, key=lambda s, u=unit, i=inputs: times.extra(u, s, i if u.op == "linear" else "")
            )
        size = ground.layout(fastest).total_bytes
        if bytes_ceiling is not None and size > bytes_ceiling:
            fastest = fit_within(ground, costs, bytes_ceiling, lambda u, s: 0.0, 0.0)
        set_inputs(ground.units, fastest, inputs)
        found = Timed(fastest, inputs, try_whole(fastest))
        tried.append(found)
        if found.milliseconds <= ceiling:
            return found, tried
    best = min(tried, key=lambda t: t.milliseconds)
    raise Impossible(
        f"a latency of {ceiling:.3g} ms cannot be reached for {ground.source.name} at this batch size: the fastest plan "
        f"that was measured takes {best.milliseconds:.3g} ms, {before / best.milliseconds:.2f} times as fast as the float "
        f"model's {before:.3g} ms"
    )


def ways_of(inputs: str) -> list[str]:
    """How inputs may be taken under a recipe's word: as they are first, since that costs no quality.

    A static scale is found after a plan is: until then any stands for it, since times do not depend on it.
    """
    return {"float": [""], "int8": [INT8_TOKENS], "int8_static": [int8_tensor(1.0)]}.get(inputs, ["", INT8_TOKENS])
