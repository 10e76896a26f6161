"""The command `reproduce`: a thin shell around `laconic.claims.reproduce`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from laconic._bars import bars
from laconic.errors import BadInput, LaconicError

__all__ = ["register", "reproduce"]


def reproduce(
    id: Annotated[str | None, typer.Argument(help="of a method whose card makes a claim")] = None,
    family: Annotated[str | None, typer.Option(help="all claims of a family, as norm")] = None,
    seeds: Annotated[int | None, typer.Option(help="pairs of runs; as many as the card says by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="two tiny runs of each arm, without a verdict")] = False,
    minutes: Annotated[float | None, typer.Option(help="bound of wall time; the card's by default")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of torch")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where an earlier run was stopped")] = False,
    table: Annotated[bool, typer.Option("--table", help="run nothing: every claim and what came of it")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print exactly one line of JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Run the claim of a method over paired seeds: the verdict, its record and its plot."""
    if table:
        _table(id, family, json_)
        return
    if (id is None) == (family is None):
        raise BadInput("name one method, or --family with one family; --table lists all claims")
    from laconic.claims.reproduce import claimed
    from laconic.claims.reproduce import reproduce as run

    ids = [id] if id is not None else [method.id for method in claimed(family)]
    outcomes, failures = [], []
    with bars(quiet or json_) as progress:
        for one in ids:
            try:
                options: dict[str, Any] = {"seeds": seeds, "quick": quick, "minutes": minutes, "threads": threads}
                outcomes.append(run(one, resume=resume, progress=progress, **options))
            except KeyboardInterrupt:
                print(f"laconic: stopped; what {one} has done is kept: run again with --resume", file=sys.stderr)
                raise typer.Exit(130) from None
            except LaconicError as error:
                if family is None:
                    raise
                failures.append((one, str(error)))  # the other claims of the family do not suffer from it
    if json_:
        found = [outcome.record for outcome in outcomes]
        print(json.dumps(found[0] if family is None else found))
    else:
        from laconic.claims.tables import outcome_table

        for outcome in outcomes:
            Console().print(outcome_table(outcome))
        if family is not None and not ids:
            Console().print(Text(f"no method of {family} makes a claim"))
    for one, reason in failures:
        print(f"laconic: {one}: {reason}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _table(id: str | None, family: str | None, json_: bool) -> None:
    from laconic.claims.reproduce import records
    from laconic.claims.tables import verdict_table

    found = [row for row in records(family) if id is None or row[0].id == id]
    if id is not None and not found:
        raise BadInput(f"no claim of {id} is known; `laconic reproduce --table` lists all")
    if json_:
        rows = [{"id": m.id, "family": m.card.family, "record": record, "changed": new} for m, record, new in found]
        print(json.dumps(rows))
    else:
        Console().print(verdict_table(found))


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(reproduce)
