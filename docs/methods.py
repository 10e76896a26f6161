"""The pages of the methods, made from what they say of themselves: card, docstring, example, record, plot.

Nothing is imported and nothing is listed by hand: a method that lands has its page with the next build.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.coverage import Sources
from docs.markdown import cell, examples, first_line, link, prose, session, table, without_examples
from laconic.catalog import Catalog, Method
from laconic.catalog.records import verdict_of
from laconic.catalog.source import read_stub
from laconic.claims.reproduce import records
from laconic.core.card import FAMILIES, KINDS
from laconic.report import text

__all__ = [
    "Landed",
    "claim_table",
    "family_page",
    "family_table",
    "kind_list",
    "method_page",
    "method_tables",
    "page_of",
    "shown_examples",
]

# The colours of mkdocs-material's boxes.
TONES = {"confirmed": "success", "refuted": "failure", "inconclusive": "warning"}


@dataclass(frozen=True)
class Landed:
    """What has landed, and what came of its claims.

    Attributes:
        catalog: all methods.
        sources: the source tree.
        records: id -> record of the claim, and what has changed since; of methods that claim something.
    """

    catalog: Catalog
    sources: Sources
    records: Mapping[str, tuple[dict[str, Any] | None, list[str]]]

    @classmethod
    def read(cls, catalog: Catalog, sources: Sources) -> Landed:
        """Read the records of all claims."""
        found = records(package=catalog.package)
        return cls(catalog, sources, {method.id: (record, changed) for method, record, changed in found})

    def family(self, name: str) -> list[Method]:
        """The methods of a family."""
        return self.catalog.select(family=name)

    def verdict(self, method: Method) -> str:
        """One word on its claim."""
        return verdict_of(method.card.claim, self.records.get(method.id, (None, []))[0])

    def plot(self, method: Method) -> Path | None:
        """The plot of its claim, where there is one."""
        path = self.catalog.package.parent / "experiments" / "records" / f"{method.id}.svg"
        return path if path.is_file() else None


def page_of(method: Method) -> str:
    """Where the page of a method lies among the sources of the site."""
    return f"methods/{method.card.family}/{method.id}.md"


# --- tables -----------------------------------------------------------------------------------------------------------


def method_tables(landed: Landed, page: str) -> str:
    """All methods, a table for each family that has any."""
    parts = []
    for family in FAMILIES:
        methods = landed.family(family)
        if methods:
            title = link(family, f"methods/{family}/index.md", page)
            parts += [f"## {title}", _about(landed.sources, family), _rows(landed, methods, page)]
    return "\n\n".join(parts)


def kind_list(landed: Landed, page: str) -> str:
    """Every kind: its form, who is of it, what all of them must pass."""
    parts = []
    for kind in KINDS:
        checks = landed.sources.module(f"laconic.testing.checks.{kind.lower()}{'_' * (kind == 'Pass')}")
        if checks is None:
            continue
        methods = landed.catalog.select(kind=kind)
        promises = [
            f"- {prose(first_line(ast.get_docstring(node)))}"
            for name, node in checks.defined.items()
            if name.startswith(f"check_{kind.lower()}_") and isinstance(node, ast.FunctionDef)
        ]
        form = first_line(ast.get_docstring(checks.tree)).removeprefix("The contract of ")
        parts += [
            f"## {kind}",
            prose(form[0].upper() + form[1:]),
            _rows(landed, methods, page) if methods else "None has landed yet.",
            f'??? note "What every {kind} must pass"\n',
            "\n".join(f"    {line}" for line in promises),
        ]
    return "\n\n".join(parts)


def claim_table(landed: Landed, page: str) -> str:
    """Every claim and what came of it."""
    rows = []
    for method in landed.catalog:
        if method.card.claim is None:
            continue
        record, changed = landed.records[method.id]
        claim = method.card.claim
        effect = text.MISSING
        if record:
            interval = " to ".join(text.amount(end) for end in record["interval"])
            effect = f"{text.amount(record['effect'])} ({interval})"
        name = link(f"`{method.id}`", f"{page_of(method)}#claim", page)
        verdict = f"**{landed.verdict(method)}**" + (" \\*" if changed else "")
        rows.append([f"{name}<br>{verdict}", cell(claim["text"]), effect, text.amount(claim["margin"])])
    if not rows:
        return "No landed method makes a claim yet."
    heads = ["Method", "Claim", "Better by (95 %)", "Margin"]
    words = [landed.verdict(method) for method in landed.catalog if method.card.claim is not None]
    total = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    note = "\n\n\\* The claim, its experiment or the method has changed since." if _any_changed(landed) else ""
    return f"{table(heads, rows)}\n\n{len(rows)} claims: {total}.{note}"


def family_table(landed: Landed, page: str) -> str:
    """The families, what each is about, and how many of its methods have landed."""
    rows = []
    for family in FAMILIES:
        methods = landed.family(family)
        name = link(f"`laconic.{family}`", f"methods/{family}/index.md", page) if methods else f"`laconic.{family}`"
        rows.append([name, cell(_about(landed.sources, family)), str(len(methods) or text.MISSING)])
    return table(["Family", "What it is about", "Methods"], rows)


def _rows(landed: Landed, methods: Sequence[Method], page: str) -> str:
    rows = []
    for method in methods:
        verdict = landed.verdict(method)
        offered = ", ".join(f"`{name}`" for name in method.card.objects) or "functions"
        name = link(f"`{method.id}`", page_of(method), page)
        rows.append([name, offered, cell(method.card.summary), "" if verdict == "none" else verdict])
    return table(["Method", "Offers", "What it does", "Claim"], rows)


def _about(sources: Sources, family: str) -> str:
    module = sources.module(f"laconic.{family}")
    return first_line(ast.get_docstring(module.tree)) if module else ""


def _any_changed(landed: Landed) -> bool:
    return any(changed for _, changed in landed.records.values())


# --- pages ------------------------------------------------------------------------------------------------------------


def family_page(landed: Landed, family: str) -> str:
    """The page of a family: its methods, and what it offers beside them."""
    page = f"methods/{family}/index.md"
    module = landed.sources.module(f"laconic.{family}")
    said = ast.get_docstring(module.tree) if module else None
    parts = [f"# {family}", prose(said or ""), "## Methods", _rows(landed, landed.family(family), page)]
    owned = {method.path.stem for method in landed.family(family)}
    stub = read_stub(landed.catalog.package / family / "__init__.pyi")
    shared = [name for name, (module_name, _) in stub.items() if module_name not in owned]
    if shared:
        parts += ["## Shared by its methods", *(_reference(family, name) for name in shared)]
    return "\n\n".join(parts)


def method_page(landed: Landed, method: Method) -> str:
    """The page of a method.

    Args:
        landed: all that has landed.
        method: one of it.
    """
    card = method.card
    page = page_of(method)
    shown = shown_examples(method)
    parts = [
        f"---\ntitle: {card.id}\n---",
        f"# `{card.id}`",
        f"{cell(card.summary)}\n{{ .lead }}",
        _facts(landed, method, page),
        "## How it works",
        without_examples(method.docstring),
    ]
    if shown:
        parts += ["## Example", *(session(one) for one in shown)]
    if card.claim is not None:
        parts += ["## Claim", *_claim(landed, method)]
    stub = read_stub(method.path.with_name("__init__.pyi"))
    public = [name for name, (module, _) in stub.items() if module == method.path.stem]
    in_order = [*card.objects, *(name for name in public if name not in card.objects)]
    parts += ["## Reference", *(_reference(card.family, name) for name in in_order)]
    return "\n\n".join(parts)


def shown_examples(method: Method) -> list[str]:
    """The examples that its page shows: those of its file, else those of its classes and functions."""
    return examples(method.docstring) or [one for said in _docstrings(method) for one in examples(said)]


def _facts(landed: Landed, method: Method, page: str) -> str:
    card = method.card
    offers = []
    for name, kind in card.objects.items():
        traits = ", ".join(card.traits.get(name, ()))
        shown = link(kind, f"methods/kinds.md#{kind.lower()}", page)
        offers.append(f"`laconic.{card.family}.{name}`, a {shown}" + (f" ({traits})" if traits else ""))
    neighbours = [
        link(f"`{id}`", page_of(landed.catalog.get(id)), page) if id in landed.catalog else f"`{id}` (not landed)"
        for id in card.composes
    ]
    files = [f"`{path}`" for path in _files(landed, method)]
    rows = [
        ("Source", f"*{cell(card.title)}*, {cell(card.authors)}, {card.year}, {cell(card.source)}"),
        ("Offers", "<br>".join(offers)),
        ("Use it", cell(card.use)),
        ("Rather not", cell(card.avoid)),
        ("Goes with", ", ".join(neighbours)),
        ("Vectors", ", ".join(f"`{name}`" for name in card.vectors)),
        ("Their code", cell(card.code)),
        ("Files", "<br>".join(files)),
    ]
    # A table without heads: what stands in the first column is the head of its row.
    return table(["", ""], [(f"**{name}**", said) for name, said in rows if said])


def _files(landed: Landed, method: Method) -> Iterator[str]:
    root = landed.catalog.package.parent
    card = method.card
    for path in (
        method.path,
        root / "tests" / card.family / f"test_{card.id}.py",
        root / "experiments" / card.family / f"{card.id}.py",
    ):
        if path.is_file():
            yield path.relative_to(root).as_posix()


def _docstrings(method: Method) -> Iterator[str]:
    """Of the public classes and functions of its file, methods included."""
    for node in ast.walk(ast.parse(method.path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield ast.get_docstring(node) or ""


def _claim(landed: Landed, method: Method) -> Iterator[str]:
    claim = method.card.claim
    assert claim is not None  # the caller looked
    baseline, arm = claim["arms"]
    yield f"> {cell(claim['text'])}"
    yield (
        f"Tested on `{claim['task']}`: *{cell(arm)}* against *{cell(baseline)}* by {cell(claim['metric'])}, where "
        f"{claim['direction']} is better. The margin, fixed before the run, is {text.amount(claim['margin'])}."
    )
    record, changed = landed.records[method.id]
    if record is None:
        yield f'!!! note "Not run"\n\n    `laconic reproduce {method.id}` runs it.'
        return
    word, _, rest = str(record["sentence"]).partition(":")
    yield f'!!! {TONES.get(word, "note")} "{word.capitalize()}"\n\n    {cell(rest)}'
    if changed:
        yield (
            f'!!! note "This record is older than what it is about"\n\n    Changed since: {", ".join(changed)}. '
            f"`laconic reproduce {method.id}` makes a new one."
        )
    if landed.plot(method):
        yield f"![{cell(str(record['sentence']))}]({method.id}.svg)"
    yield '??? note "Every seed"\n\n' + "\n".join(f"    {line}" for line in _seeds(record).split("\n"))
    yield _circumstances(record)


def _seeds(record: Mapping[str, Any]) -> str:
    claim = record["claim"]
    values = {(run["arm"], run["seed"]): run["value"] for run in record["runs"]}
    sign = 1 if claim["direction"] == "higher" else -1
    rows = []
    for seed in sorted({run["seed"] for run in record["runs"]}):
        pair = [values[arm, seed] for arm in claim["arms"]]
        rows.append([str(seed), *(text.amount(value, 4) for value in (*pair, sign * (pair[1] - pair[0])))])
    return table(["Seed", *(cell(arm) for arm in claim["arms"]), "Better by"], rows)


def _circumstances(record: Mapping[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    commit = record["commit"]
    where = f" at commit `{commit[:10]}`{' with changes' if record['modified'] else ''}" if commit else ""
    return (
        f"Measured by `{record['command']}`{where} on {cell(machine['cpu'])}, {machine['cores']} cores, "
        f"torch {versions['torch']}, in {text.seconds(record['seconds'])}."
    )


def _reference(family: str, name: str) -> str:
    return f"::: laconic.{family}.{name}"
