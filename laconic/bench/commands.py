"""The command `bench`: a thin shell around `laconic.bench.run`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from laconic.errors import BadInput

__all__ = ["bench", "register"]

WIDTH = 120  # of a table that goes to a file or a pipe
LEAST_ROUNDS = 15  # as laconic.bench.measure.ROUNDS, which is not imported only to say so


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="works or groups of works, as gemv; all by default")] = None,
    list_: Annotated[bool, typer.Option("--list", help="run nothing: every work, and who would take part")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="alternating rounds; figures need 15")] = LEAST_ROUNDS,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of torch and of every peer")] = None,
    peers: Annotated[str | None, typer.Option(help="only these, as torch,onnxruntime; ours always take part")] = None,
    out: Annotated[str | None, typer.Option(help="a JSON file for the record; the roofline goes beside it")] = None,
    seed: Annotated[int, typer.Option(help="of the order in the rounds and of the bootstrap")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="print exactly one line of JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Kernels and whole models, ours against installed peers, in alternating rounds: times, ratios, a roofline."""
    wanted = None if peers is None else [name.strip() for name in peers.split(",") if name.strip()]
    if list_:
        _list(names or [], wanted, json_)
        return
    if out is not None and Path(out).suffix != ".json":
        raise BadInput(f"--out {out}: the record is JSON, so name it {Path(out).with_suffix('.json')}")
    from laconic.bench.record import write
    from laconic.bench.run import run

    command = shlex.join(["laconic", *sys.argv[1:]])
    with _progress(quiet or json_) as progress:
        given: dict[str, Any] = {"rounds": rounds, "seed": seed, "threads": threads, "peers": wanted}
        record = run(names or [], **given, command=command, progress=progress)
    plot = write(record, Path(out)) if out is not None else None
    if json_:
        print(json.dumps(record))
    else:
        from laconic.bench.tables import run_table

        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)  # eighty columns do not hold the figures
        console.print(run_table(record))
        if plot is not None:
            console.print(f"Record {out}\nPlot   {plot}", style="dim", markup=False)
    if any(
        one["peer"] == "laconic" and one["reason"].startswith("failed") for w in record["works"] for one in w["missing"]
    ):
        raise typer.Exit(1)


def _list(names: list[str], peers: list[str] | None, json_: bool) -> None:
    from laconic.bench.contest import contestants
    from laconic.bench.work import find

    works = find(names)
    if not json_:
        from laconic.bench.tables import list_table

        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        console.print(list_table(works, peers))
        return
    rows = []
    for work in works:
        problem = work.problem()
        who = [
            {"name": one.name, "peer": one.peer, "missing": one.why_not(problem)} for one in contestants(problem, peers)
        ]
        aims = [aim.text for aim in work.aims]
        rows.append({"name": work.name, "text": work.text, "aims": aims, "contestants": who})
    print(json.dumps(rows))


@contextmanager
def _progress(silent: bool) -> Iterator[Any]:
    """One bar on standard error for what is under way, where that is a terminal."""
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn only when something is told, never by a thread of its own, which would run beside what is timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as display:
        bar = display.add_task("")

        def show(stage: str, done: int, total: int) -> None:
            display.update(bar, description=stage, completed=done, total=total)
            display.refresh()

        yield show


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(bench)
