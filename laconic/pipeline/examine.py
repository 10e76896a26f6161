"""`examine`: a look at calibration data before anything is calibrated on it.

What was drawn badly shows late, as a drop that no method explains. So each thing that usually goes wrong is looked for by
itself, and said with its figure: too few positions for the widest layer, examples that come twice or that the verdict is
taken on, lengths unlike those, a missing token of beginning, a chat template that no example is in, experts that no token
was sent to, and plans that change with the draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from laconic.core.units import Unit
from laconic.errors import BadInput
from laconic.nn.packed import _is_experts
from laconic.tasks import Task

from .budget import UNBOUNDED, Budget, parse_budget
from .decide import fisher, option_costs
from .look import Seen, look, tokenizer_of
from .measure import run_batch
from .observe import positions
from .plan import Ground
from .reading import CALIBRATION_TOKENS, Options, Progress, Reading
from .solve import as_solved
from .tryout import Choice, fit

__all__ = ["examine"]

DRAWS, DRAWN = 3, 1024  # draws of the calibrate split, and about how many positions each has where there are enough
AGREE = 0.9  # of the elements whose bits must not depend on the draw


def examine(
    model: Any,
    data: Any = None,
    *,
    task: str | Task | None = None,
    columns: Mapping[str, str] | None = None,
    budget: str | Budget | None = None,
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look at the data that a compression would calibrate on.

    Args:
        model, data, task, columns, budget, batch, seq, seed, trust_remote_code, allow_pickle, example: as in `compress`.
        progress: is called with (stage, done, total).

    Returns:
        A record: `checks` (rows of `check`, `state`, `sentence`), `warnings` (how many), `model`, `task`, `examples` and
        `positions` of the calibrate split.

    Raises:
        BadInput: no data, or the model cannot be loaded or fails on it.
    """
    if (data is None) == (task is None):
        raise BadInput("examine looks at data: pass --data or --task, one of them")
    options = Options(seed=seed, batch=batch, seq=seq, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    bounds = UNBOUNDED if budget is None else parse_budget(budget)
    run = Reading(options, bounds, progress or (lambda stage, done, total: None))
    run.prepare(model, data if data is not None else task, columns, example)
    if run.task is None or "calibrate" not in run.task.splits:
        raise BadInput("this data scores a model and has no examples to calibrate on: there is nothing to examine")
    ground, batches = run.ground, run.batches("calibrate", CALIBRATION_TOKENS, batch=8)
    seen = look(run.task, ground.packable, lambda: tokenizer_of(ground.source), seq)
    seen += [_experts(ground.model, run.task, batches), _draws(run, ground, run.task)]
    return {
        "model": ground.source.name, "task": run.task.id, "examples": run.task.sizes.get("calibrate"),
        "positions": sum(positions(one) for one in batches), "checks": [asdict(one) for one in seen],
        "warnings": sum(one.state == "warning" for one in seen), "notes": run.task.notes,
    }  # fmt: skip


def _experts(model: nn.Module, task: Task, batches: Sequence[Any]) -> Seen:
    """Experts that no token of the calibration data is sent to keep what rounding to nearest gives them."""
    found = {path: module for path, module in model.named_modules() if _is_experts(module)}
    if not found:
        return Seen("experts", "skipped", "the model has no fused experts")
    counts = {path: torch.zeros(int(module.num_experts), dtype=torch.long) for path, module in found.items()}
    with ExitStack() as stack, torch.no_grad():
        for path, module in found.items():

            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                counts[path] += torch.bincount(index.reshape(-1).cpu(), minlength=len(counts[path]))[
                    : len(counts[path])
                ]

            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for batch in batches:
            run_batch(task, model, batch)
    never = {path: int((count == 0).sum()) for path, count in counts.items()}
    total, missed = sum(len(count) for count in counts.values()), sum(never.values())
    said = f"{missed} of {total} experts get no token"
    if missed:
        worst = max(never, key=lambda path: never[path])
        return Seen(
            "experts", "warning", f"{said}, most in {worst} ({never[worst]}): give more examples, or more kinds of them"
        )
    return Seen("experts", "fine", said)


def _bits(unit: Unit, plan: Choice) -> float:
    """Bits that a plan gives an element of a parameter, whatever its groups; those of a float where it is left alone."""
    scheme = plan.get(unit.name)
    return scheme.bits if scheme is not None else 8 * unit.dtype.itemsize


def _draws(run: Reading, ground: Ground, task: Task) -> Seen:
    """Whether plans from several draws of the data give parameters the same bits."""
    batches = run.batches("calibrate", DRAWS * DRAWN, batch=2)
    parts = [batches[i::DRAWS] for i in range(DRAWS)]
    if any(not part for part in parts):
        return Seen("draw", "skipped", f"fewer than {DRAWS} batches of examples")
    ceiling = run.ceiling if run.ceiling is not None else ground.source.size_before // 4
    plans = []
    for part in parts:
        try:
            weights = fisher(ground.model, task, part, ground.units, run.options.seed)
        except (RuntimeError, NotImplementedError) as error:
            return Seen("draw", "skipped", f"the model has no gradient ({str(error).splitlines()[0]})")
        costs = option_costs(lambda unit: ground.model.get_parameter(unit.name), weights, ground.units)
        method = run.recipe.quantize.method if run.recipe.quantize is not None else "rtn"
        plans.append(fit(ground, as_solved(costs, ground.packable, method), ceiling))
    total = sum(u.numel for u in ground.packable)
    same = sum(u.numel for u in ground.packable if len({_bits(u, plan) for plan in plans}) == 1)
    share = same / max(1, total)
    drawn = sorted({sum(positions(one) for one in part) for part in parts})
    each = f"{drawn[0]:,}" if len(drawn) == 1 else f"{drawn[0]:,} to {drawn[-1]:,}"
    said = f"three draws of {each} positions give {100 * share:.0f} % of the elements the same bits"
    if share < AGREE:
        return Seen("draw", "warning", f"{said}: the plan depends on which examples were drawn; give more of them")
    return Seen("draw", "fine", said)
