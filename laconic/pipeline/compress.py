"""`compress`: plan, measure, decide, solve, write, verify, report; and `plan`: what it would do.

The road, and where each step lives: the source of the model (`source`), its structure and units (`laconic.core`), the plan
(`plan`), sensitivity and allocation (`decide`), trying plans (`tryout`), solving (`solve`, `walk`), the artifact
(`artifact`), loading it back (`load`), and the paired comparison on the verify split (`laconic.tasks`). `run` takes them in
their order.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from laconic.errors import BadInput
from laconic.tasks import Task, check_counts

from .budget import UNBOUNDED, Budget, parse_budget, parse_bytes
from .distribute import Following, parse_distribute, team_of
from .interrupt import interruptible
from .observe import positions
from .orders import check_allocation, uniform
from .plan import Ground, check_possible, plan_record
from .reading import CALIBRATION_TOKENS, Options, Progress, Reading
from .recipe import Recipe, load_recipe
from .run import Result, Run
from .strategies import Searching
from .strategies import strategy as find_strategy
from .tryout import Choice, by_shape
from .workspace import Workspace

__all__ = ["Result", "compress", "plan", "positions"]


def compress(
    model: Any,
    data: Any = None,
    budget: str | Budget | None = None,
    *,
    out: str | os.PathLike[str],
    task: str | Task | None = None,
    columns: Mapping[str, str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    strategy: str | None = None,
    max_ram: str | int | None = None,
    seed: int = 0,
    resume: bool = False,
    batch: int | None = None,
    seq: int | None = None,
    threads: int | None = None,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    device: str = "cpu",
    overwrite: bool = False,
    min_coverage: float = 0.0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    distribute: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Compress a model within a budget, write the artifact to `out`, and say what was measured.

    Args:
        model: a folder, a fetched name, `module:function`, or an `nn.Module`; None where `task` brings its own.
        data: a file, a folder of images, the name of a task, or something that scores a model. Without data only
            data-free methods are used and no quality is claimed.
        budget: as `"size=4x, drop=1"`; "size=4x" by default, and none where a recipe has every scheme written out.
        out: folder of the artifact; work goes to `out` + ".partial" until it is complete.
        task: instead of `data`, a task by name or a `Task`.
        columns: which column of the data is what.
        recipe: passes and options; the one that an artifact carries gives that artifact again.
        strategy: instead of a recipe, a method by name (`laconic.pipeline.strategies`); "auto" by default, which tries
            other recipes where the drop of the budget is missed, and "search", which always does.
        max_ram: bound on peak resident memory, as "8GB".
        seed: of every random choice.
        resume: go on where an earlier run was stopped.
        batch, seq: examples in a batch and tokens in an example, for calibration and latency.
        threads: torch threads.
        exclude, keep: patterns of parameters that no pass may touch, and that stay float.
        device: where calibration, solving and measuring run: "cpu", or "cuda" with a GPU.
        overwrite: replace `out` if it exists.
        min_coverage: fail if a smaller share of the elements was packed.
        trust_remote_code, allow_pickle: as in `resolve`.
        example: inputs for tracing, for an `nn.Module`.
        distribute: how many processes share the layers, as 4, or "ray:4" for tasks of a Ray cluster; the bytes are those of
            one process. In a script, call it under `if __name__ == "__main__":`, as `multiprocessing` asks. Processes that
            `torchrun` started all make the same call, with their number, and get the same result.
        progress: is called with (stage, done, total).

    Raises:
        BadInput: something given cannot be worked with, or a strategy needs data that are not there; nothing was written.
        Impossible: the budget is out of reach of the model's shapes; nothing was written.
    """
    given = {name: value for name, value in locals().items() if name not in ("distribute", "progress")}
    place = parse_distribute(distribute)
    _check_device(device)
    check_counts(batch=batch, seq=seq, threads=threads)
    if place is not None and device != "cpu":
        raise BadInput("processes share work on the CPU so far: leave distribute or the device out")
    if threads:
        torch.set_num_threads(threads)
    chosen, search = _recipe(recipe, strategy, data is not None or task is not None)
    options = Options(
        chosen, search, _ram(max_ram), seed, resume, batch, seq, exclude, keep, device, overwrite, min_coverage,
        trust_remote_code, allow_pickle, " ".join(map(shlex.quote, sys.argv)),
    )  # fmt: skip
    run = Run(options, _bounds(budget, chosen), progress or (lambda stage, done, total: None))
    with interruptible(), team_of(place, given) as run.team:
        first = run.team.rank == 0
        workspace = Workspace(out, resume=resume, overwrite=overwrite) if first else Following(out, run.team.rank)
        if data is not None and task is not None:
            raise BadInput("both data and a task were given: a task brings its own data, so give one of them")
        _check_apart(workspace.out, model, data)
        run.prepare(model, data if data is not None else task, columns, example)
        return run.execute(workspace)


def plan(
    model: Any,
    data: Any = None,
    budget: str | Budget | None = None,
    *,
    task: str | Task | None = None,
    columns: Mapping[str, str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    strategy: str | None = None,
    max_ram: str | int | None = None,
    batch: int | None = None,
    seq: int | None = None,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    **ignored: Any,
) -> dict[str, Any]:
    """What `compress` would do, from shapes alone: sizes, memory, time, kernel and reason per unit. Writes nothing.

    Raises:
        BadInput: what `compress` would refuse from shapes alone.
        Impossible: the budget is out of reach; the message has the least figure.
    """
    check_counts(batch=batch, seq=seq)
    data = data if data is not None else task
    has_data = data is not None
    options = Options(
        _recipe(recipe, strategy, has_data)[0], max_ram=_ram(max_ram), exclude=exclude, keep=keep, batch=batch, seq=seq
    )  # fmt: skip
    options.trust_remote_code, options.allow_pickle = trust_remote_code, allow_pickle
    run = Reading(options, _bounds(budget, options.recipe), lambda stage, done, total: None)
    run.check_budget(has_data)
    source = run.find_source(model, data, example)
    run.example_from_data(source, data, columns)
    ground = run.ground_on_meta(source)
    run.ceiling = check_possible(ground, run.budget)
    run.plan_cache(ground, has_data)
    ground.streamed = run.must_stream(ground)
    decision = run.fixed(ground) or _by_shape(run, ground, has_data)
    if run.memory is not None and run.memory.measures(has_data, run.budget.drop):
        run.note("the cache shown is the one that shapes alone would give: compress measures what each cache loses")
    found = plan_record(ground, run.budget, run.ceiling, decision, CALIBRATION_TOKENS if has_data else 0)
    found["notes"] += run.notes
    if run.memory is not None:
        found["memory"] = run.memory.to_json(found["size_after"], run.memory.even())
    return found


def _by_shape(run: Reading, ground: Ground, has_data: bool) -> Choice:
    """The decision that a plan shows: the recipe's own where shapes are enough for it, else by shapes, with a note.

    Raises:
        BadInput: the recipe gives out bits in a way that lacks what it needs.
    """
    step = run.recipe.quantize
    if step is None:
        return {}
    check_allocation(ground, step.allocate, run.budget, has_data)
    ceiling = run.ceiling if run.ceiling is not None else ground.source.size_before // 4
    if step.allocate == "uniform":
        return uniform(ground, ceiling)
    if step.allocate != "program":
        run.note(
            f"allocate: {step.allocate} decides by what it measures on the data: the bits shown are those that shapes "
            "alone would give"
        )
    return by_shape(ground, ceiling)


def _recipe(recipe: Any, strategy: str | None, has_data: bool) -> tuple[Recipe, Searching]:
    """The passes, and whether others are tried."""
    if recipe is not None:
        if strategy is not None:
            raise BadInput(
                "both a recipe and a strategy were given: a strategy is a recipe by name, so give one of them"
            )
        return load_recipe(recipe), "never"
    named = find_strategy(strategy or "auto", has_data)
    return named.recipe, named.search


def _bounds(budget: str | Budget | None, recipe: Recipe) -> Budget:
    """What bounds a run: without a budget nothing does where the recipe has every scheme written out."""
    written_out = recipe.quantize is not None and recipe.quantize.units is not None
    return UNBOUNDED if budget is None and written_out else parse_budget(budget)


def _ram(value: str | int | None) -> int | None:
    return parse_bytes(value, "--max-ram") if isinstance(value, str) else value


def _check_apart(out: Path, model: Any, data: Any) -> None:
    """What is read is not what is replaced in the end."""
    for what in (model, data):
        if isinstance(what, (str, os.PathLike)) and Path(what).exists() and out.exists():
            given, target = Path(what).resolve(), out.resolve()
            if target == given or target in given.parents:
                raise BadInput(f"{out} holds {what}, which is read: name another folder for the output")


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise BadInput(f"device {device!r} is not known: cpu or cuda")
    if not torch.cuda.is_available():
        raise BadInput(
            f"device {device!r} was asked for, and torch sees no GPU here: leave --device out to use the CPU"
        )
