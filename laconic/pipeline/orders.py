"""Other ways to give out bits than the integer program: all alike, by blocks, along an order with evaluations.

    uniform    every parameter at the same number of bits, the largest that fits
    blocks     layer_bits: whole blocks of fewer bits, the least important (LIM) first, until the file fits
    bisect     hessian_interlayer: along an order of sensitivity, the largest prefix that holds the drop, at each width

They are here to be compared with, and for ceilings that no sum of costs describes; under a ceiling of bytes alone the
program over measured costs (`decide`) is optimal for those costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.allocate import bisect
from laconic.core.units import Unit
from laconic.errors import BadInput, Impossible
from laconic.numerics import Scheme
from laconic.quant import InterlayerSensitivity, LayerBits

from .budget import Budget
from .observe import arguments
from .plan import Ground
from .solve import inside
from .tryout import Choice, rounded

__all__ = ["bisected", "by_blocks", "check_allocation", "sensitivity_order", "uniform"]

# A trace of a layer is a mean over draws, and each costs a second backward pass through the model.
DRAWS, BESIDE = 4, 2


def at(unit: Unit, bits: int, finest: bool = True) -> Scheme:
    """What a unit is stored as at so many bits, in the finest groups or in the coarsest; at the next width below else."""
    best = next((s for s in unit.options if s.bits <= bits), unit.options[-1])
    return best if finest else [s for s in unit.options if s.bits == best.bits][-1]


def _widths(ground: Ground) -> list[int]:
    return sorted({s.bits for u in ground.packable for s in u.options}, reverse=True)


def check_allocation(ground: Ground, how: str, budget: Budget, has_data: bool) -> None:
    """Refuse a way to give out bits that lacks what it needs; from shapes alone, so that a plan refuses as a run does.

    Args:
        ground: the model, on meta or not.
        how: `allocate` of a recipe.
        budget: that is to be kept.
        has_data: whether there are data (of a run: for what `how` measures).

    Raises:
        BadInput: it cannot be done; the message names what it needs.
    """
    if how == "program":
        return
    if ground.streamed:
        raise BadInput(f"allocate: {how} needs the model in memory, and it does not fit under --max-ram: say program")
    if budget.latency:
        raise BadInput(f"allocate: {how} knows no milliseconds: say program, or leave latency out of the budget")
    if how == "blocks" and not has_data:
        raise BadInput("allocate: blocks ranks blocks by what passes through them, and there is no data: say program")
    if how == "blocks" and not ground.structure.blocks:
        raise BadInput(f"allocate: blocks needs a chain of blocks, which {ground.source.name} has not: say program")
    if how == "bisect" and (budget.drop is None or not has_data):
        raise BadInput("allocate: bisect measures whether a drop holds: give data, and a drop in the budget")


def uniform(ground: Ground, ceiling: int) -> Choice:
    """The most bits for every parameter alike whose exact file fits: in the finest groups of a width, then in the coarsest."""
    ways = [(bits, finest) for bits in _widths(ground) for finest in (True, False)]
    return _first(ground, ({u.name: at(u, *way) for u in ground.packable} for way in ways), ceiling)


def by_blocks(ground: Ground, task: Any, batches: Sequence[Any], ceiling: int) -> Choice:
    """Whole blocks in fewer bits until the exact file fits: each in its turn one step down before any goes two.

    Parameters outside of the blocks go after them in each turn. `check_allocation` says whether it can be done.
    """
    blocks = ground.structure.blocks
    calls = [arguments(ground.model, task, batch) for batch in batches]
    table = LayerBits(blocks)(ground.model, calls).table
    ranked = sorted(table, key=lambda row: row["lim"])
    groups = [[u for u in ground.packable if inside(u, row["block"])] for row in ranked]
    groups.append([u for u in ground.packable if not any(inside(u, block) for block in blocks)])
    return _first(ground, _downwards(ground, groups), ceiling)


def _downwards(ground: Ground, groups: Sequence[Sequence[Unit]]) -> Iterator[Choice]:
    widths = _widths(ground)
    now: Choice = {u.name: at(u, widths[0]) for u in ground.packable}
    yield dict(now)
    for bits in widths[1:]:
        for group in groups:
            now.update({u.name: at(u, bits) for u in group})
            yield dict(now)


def _first(ground: Ground, plans: Iterator[Choice], ceiling: int) -> Choice:
    least: Choice = {u.name: u.options[-1] for u in ground.packable}  # that it fits was checked from shapes
    return next((plan for plan in plans if ground.layout(plan).total_bytes <= ceiling), least)


def sensitivity_order(ground: Ground, task: Any, batches: Sequence[Any], seed: int) -> list[str]:
    """Names of packable parameters, the least sensitive first: by curvature and by how layers disturb one another.

    The loss is what changes of the outputs: the KL divergence to the float model's, or the squared error. Parameters
    that are no layer's weight come last.
    """
    calls = [{"batch": batch} for batch in batches]
    with torch.no_grad():
        outputs = {id(one["batch"]): task.forward(ground.model, one["batch"]).float() for one in calls}
    logits = task.metric.name in ("perplexity", "accuracy")

    def loss(model: nn.Module, one: Mapping[str, Any]) -> Tensor:
        wanted, found = outputs[id(one["batch"])], task.forward(ground.model, one["batch"]).float()
        if logits:
            return (
                F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
                .sum(-1)
                .mean()
            )
        return (found - wanted).square().mean()

    probe = InterlayerSensitivity(4, loss, samples=DRAWS, pairs=BESIDE, seed=seed)
    order = [name for name in probe(ground.model, calls).order() if name in {u.name for u in ground.packable}]
    return order + [u.name for u in ground.packable if u.name not in order]


def bisected(
    ground: Ground, order: Sequence[str], drop: float, measure: Callable[[Choice], float],
    progress: Callable[[int, int], None],
) -> Choice:  # fmt: skip
    """The fewest bits along an order that hold the drop, each plan rounded to nearest and measured.

    Args:
        ground: the model in memory; its values are the same afterwards.
        order: names of all packable units, the least sensitive first.
        drop: that is allowed.
        measure: the drop of the plan whose values the model holds.
        progress: is called with (done, total).

    Raises:
        Impossible: not even the most bits for all of them hold it.
    """
    units = {u.name: u for u in ground.packable}
    widths, done = _widths(ground), 0
    original = {name: ground.model.get_parameter(name).detach().clone() for name in units}
    bound = len(widths) * max(1, len(order)).bit_length() + 1

    def evaluate(choice: tuple[int, ...]) -> float:
        nonlocal done
        progress(min(done, bound), bound)
        done += 1
        decision = {name: at(units[name], widths[option]) for name, option in zip(order, choice, strict=True)}
        for name, scheme in decision.items():
            ground.model.get_parameter(name).data.copy_(rounded(units[name], scheme, original[name]))
        return -measure({u.name: decision[u.name] for u in ground.packable})

    try:
        found = bisect(range(len(order)), range(len(widths)), evaluate, -drop)
    except Impossible as error:
        raise Impossible(
            f"a drop of {drop:g} cannot be held by packing all of {ground.source.name}, not even at {widths[0]} bits: "
            "say allocate: program, which leaves float what costs too much"
        ) from error
    finally:
        for name, value in original.items():
            ground.model.get_parameter(name).data.copy_(value)
    chosen = dict(zip(order, found.choice, strict=True))
    return {u.name: at(u, widths[chosen[u.name]]) for u in ground.packable}
