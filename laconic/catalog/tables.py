"""What `laconic methods`, `show` and `find` print: whole at 60 columns, and not thin at 200."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from laconic.catalog.read import Catalog
from laconic.catalog.records import verdict_of
from laconic.catalog.source import Method

if TYPE_CHECKING:  # searching needs numpy, and listing does not
    from laconic.catalog.find import Hit

__all__ = ["hits_table", "method_card", "methods_table"]

# Below this, columns beside the id and the summary would leave the summary a word a line.
WIDE = 110
# Longer lines than this are hard to follow with the eye.
MEASURE = 110
TONES = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow"}


class ByWidth:
    """A renderable that looks one way on a wide terminal and another on a narrow one."""

    def __init__(self, wide: RenderableType, narrow: RenderableType):
        self.wide, self.narrow = wide, narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.wide if options.max_width >= WIDE else self.narrow


class Equation:
    """A block of mathematics, whose lines are broken where they have a wide gap, if they do not fit."""

    def __init__(self, block: str):
        self.lines = block.splitlines()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            pieces = [line] if cell_len(line) <= options.max_width else re.split(r"(?<=\S) {3,}(?=\S)", line)
            yield Text(pieces[0], style="cyan")
            for piece in pieces[1:]:
                yield Padding(Text(piece, style="cyan"), (0, 0, 0, 4))


def methods_table(methods: Sequence[Method], verdicts: Mapping[str, str]) -> RenderableType:
    """All of them by family; `verdicts` has one word on the claim of each id."""
    count = Text(f"{len(methods)} method{'' if len(methods) == 1 else 's'}", style="dim")
    return Group(ByWidth(_wide(methods, verdicts), _narrow(methods, verdicts)), count)


def _wide(methods: Sequence[Method], verdicts: Mapping[str, str]) -> Table:
    table = _table()
    for name in ("family", "id", "kinds", "year", "claim"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does", max_width=MEASURE)
    for family, group in _by_family(methods):
        for row, method in enumerate(group):
            table.add_row(
                Text(family if row == 0 else "", style="cyan"),
                Text(method.id, style="bold"),
                Text(_kinds(method), style="dim"),
                Text(str(method.card.year), style="dim"),
                _tone(verdicts[method.id]),
                Text(method.card.summary),
            )
    return table


def _narrow(methods: Sequence[Method], verdicts: Mapping[str, str]) -> RenderableType:
    parts: list[RenderableType] = []
    for family, group in _by_family(methods):
        parts.append(Text(family, style="cyan"))
        for method in group:
            facts = [_kinds(method), str(method.card.year)]
            line = Text.assemble((method.id, "bold"), "  ", (", ".join(fact for fact in facts if fact), "dim"))
            if method.card.claim is not None:
                line.append(" · claim ", style="dim").append_text(_tone(verdicts[method.id]))
            parts += [Padding(line, (0, 0, 0, 2)), Padding(Text(method.card.summary), (0, 0, 0, 4))]
    return Group(*parts)


def method_card(
    method: Method, catalog: Catalog, public: Iterable[str], record: dict[str, Any] | None
) -> RenderableType:
    """All that is known of one method; `public` are the names that the stub has from its file."""
    card = method.card
    parts: list[RenderableType] = [
        Text.assemble((card.id, "bold"), "  ", (f"{card.family}: {_kinds(method)}", "dim")),
        Text(card.title, style="italic"),
        Text(f"{card.authors}, {card.year}, {card.source}", style="dim"),
        Text(""),
        Text(card.summary),
    ]
    for block in method.equations:
        parts += [Text(""), Padding(Equation(block), (0, 0, 0, 4))]
    parts.append(Text(""))
    besides = [name for name in public if name not in card.objects]
    rows: list[tuple[str, Text]] = [
        ("Use it", Text(card.use)),
        ("Rather not", Text(card.avoid)),
        ("With", _neighbours(card.composes, catalog)),
        *_objects(method),
        ("Besides", Text("\n").join(_call(method, name) for name in besides)),
        ("Claim", _claim(card.claim)),
        ("Record", _record(card.claim, record, card.id)),
        ("Vectors", Text(", ".join(card.vectors))),
        ("Their code", Text(card.code)),
        ("Source", Text(f"{method.path.relative_to(catalog.package.parent).as_posix()}:1")),
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(max_width=MEASURE, overflow="fold")
    for label, text in rows:
        if text.plain:
            table.add_row(label, text)
    return Group(*parts, table)


def hits_table(hits: Sequence[Hit], how: str) -> RenderableType:
    """What a search found, best first, and how it was searched."""
    parts: list[RenderableType] = []
    for hit in hits:
        method = hit.method
        parts.append(Text.assemble((method.id, "bold"), "  ", (f"{method.card.family}: {_kinds(method)}", "dim")))
        parts.append(Padding(Text(method.card.summary), (0, 0, 0, 4)))
        if method.card.use:
            parts.append(Padding(Text(method.card.use, style="dim"), (0, 0, 0, 4)))
    return Group(*parts, Text(how, style="dim"))


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def _by_family(methods: Sequence[Method]) -> Iterable[tuple[str, list[Method]]]:
    for family, group in groupby(methods, key=lambda method: method.card.family):
        yield family, list(group)


def _kinds(method: Method) -> str:
    return ", ".join(method.card.kinds) or "functions"


def _tone(verdict: str) -> Text:
    return Text("" if verdict == "none" else verdict, style=TONES.get(verdict, "dim"))


def _objects(method: Method) -> list[tuple[str, Text]]:
    """A row for every object: how it is called, and what it promises."""
    rows = []
    for name, kind in method.card.objects.items():
        text = _call(method, name)
        traits = method.card.traits.get(name, ())
        if traits:
            text.append(f"  {', '.join(traits)}", style="dim")
        rows.append((kind, text))
    return rows


def _call(method: Method, name: str) -> Text:
    """How a public name is called."""
    return Text.assemble((f"laconic.{method.card.family}.{name}", "bold"), method.signatures.get(name, ""))


def _neighbours(ids: Sequence[str], catalog: Catalog) -> Text:
    text = Text()
    for id in ids:
        text.append(", " if text.plain else "").append(id)
        if id not in catalog:
            text.append(" (not landed)", style="dim")
    return text


def _claim(claim: Mapping[str, Any] | None) -> Text:
    if claim is None:
        return Text()
    baseline, method = claim["arms"]
    return Text(
        f"{claim['text']} Tested on {claim['task']}: {method} against {baseline}, {claim['metric']}, "
        f"{claim['direction']} by at least {claim['margin']:g}, {claim['seeds']} seeds, "
        f"{claim['minutes']:g} minutes at most."
    )


def _record(claim: object, record: dict[str, Any] | None, id: str) -> Text:
    if claim is None:
        return Text()
    if not record:
        return Text(f"not run: laconic reproduce {id}")
    word = verdict_of(claim, record)
    # The sentence begins with the verdict, and has the effect and its interval.
    rest = str(record.get("sentence", "")).removeprefix(word)
    return _tone(word).append(rest, style="default")
