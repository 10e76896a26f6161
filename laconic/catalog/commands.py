"""The commands of the catalog: `methods`, `show`, `find`, `new`; thin shells around functions of this package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from laconic.catalog.read import PACKAGE, problems, read
from laconic.catalog.records import read_record, verdict_of
from laconic.catalog.source import Method, read_stub

__all__ = ["register"]

Family = Annotated[str | None, typer.Option(help="only this family, as norm")]
Kind = Annotated[str | None, typer.Option(help="only what offers this kind, as Layer")]
Json = Annotated[bool, typer.Option("--json", help="print exactly one line of JSON")]


def methods(
    pattern: Annotated[str | None, typer.Argument(help="a part of an id, a title or an object, or a glob")] = None,
    family: Family = None,
    kind: Kind = None,
    check: Annotated[bool, typer.Option("--check", help="name all that is wrong with cards, and stop")] = False,
    json_: Json = False,
) -> None:
    """The methods that have landed: what each does, its kinds, and what became of its claim."""
    from laconic.catalog.tables import methods_table

    if check:
        found = problems(PACKAGE)
        for line in found:
            print(line, file=sys.stderr)
        raise typer.Exit(2 if found else 0)
    chosen = read(PACKAGE).select(pattern, family, kind)
    verdicts = {method.id: verdict_of(method.card.claim, read_record(PACKAGE, method.id)) for method in chosen}
    if json_:
        print(json.dumps([describe(method) | {"verdict": verdicts[method.id]} for method in chosen]))
    else:
        Console().print(methods_table(chosen, verdicts))


def show(
    id: Annotated[str, typer.Argument(help="of a method, as `laconic methods` lists it")], json_: Json = False
) -> None:
    """One method: its card, its equations, how its objects are called, what its claim came to."""
    from laconic.catalog.tables import method_card

    catalog = read(PACKAGE)
    method = catalog.get(id)
    record = read_record(PACKAGE, method.id)
    stub = read_stub(method.path.with_name("__init__.pyi"))
    public = [name for name, (module, _) in stub.items() if module == method.path.stem]
    if json_:
        found = {"equations": method.equations, "signatures": method.signatures, "public": public, "record": record}
        print(json.dumps(describe(method) | found))
    else:
        Console().print(method_card(method, catalog, public, record))


def find(
    text: Annotated[str, typer.Argument(help='what you need, as "train with batch size one"')],
    limit: Annotated[int, typer.Option(help="hits at most")] = 5,
    words: Annotated[bool, typer.Option("--words", help="by words alone, without the encoder")] = False,
    json_: Json = False,
) -> None:
    """The methods that fit what you need."""
    from laconic.catalog.find import find as run
    from laconic.catalog.tables import hits_table

    found = run(text, read(PACKAGE), limit=limit, words_only=words, say=lambda line: print(line, file=sys.stderr))
    if json_:
        hits = [describe(hit.method) | {"score": hit.score} for hit in found.hits]
        print(json.dumps({"how": found.how, "hits": hits}))
    else:
        Console().print(hits_table(found.hits, found.how))


def new(
    id: Annotated[str, typer.Argument(help="a lower-case Python identifier")],
    kind: Annotated[str, typer.Option(help="Layer, Weight, Constraint, ...")],
    family: Annotated[str, typer.Option(help="norm, weight, optim, ...")],
    root: Annotated[Path, typer.Option(help="the source tree")] = Path("."),
) -> None:
    """Begin a method: its file, its test, its experiment and its line in the stub, all of which pass at once."""
    from laconic.catalog.new import create

    written = create(id, kind, family, root)
    for path in written:
        print(path)
    print(f"Next: say what is marked TODO; pytest {os.path.relpath(written[1])}; laconic reproduce {id} --quick")


def describe(method: Method) -> dict[str, Any]:
    """A method as JSON: its card, and its file in the source tree."""
    card = {name: _plain(value) for name, value in vars(method.card).items()}
    return card | {"kinds": list(method.card.kinds), "file": method.path.relative_to(PACKAGE.parent).as_posix()}


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else list(value) if isinstance(value, tuple) else value


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (methods, show, find, new):
        app.command()(command)
