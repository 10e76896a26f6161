"""Small source trees for the catalog to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from laconic.core.card import FAMILIES

CARD = """
CARD = Card(
    id="{id}",
    title="{title}",
    authors="Doe, Roe",
    year=2020,
    source="arXiv 0000.00000",
    family="{family}",
    summary="{summary}",
    objects={objects},
{more})
"""
DOCSTRING = '''"""`{id}`: {about}

Some words on it:

    y = (x - mean) / sqrt(var + eps)        x (N, C)

    z = y

Others in between.

    w = z
"""
'''


def method(
    id: str = "halve",
    family: str = "norm",
    *,
    title: str = "On Halves",
    summary: str = "Halves what comes in.",
    about: str = "halves.",
    objects: Mapping[str, str] | None = None,
    body: str | None = None,
    more: str = "",
) -> str:
    """The text of a method's file."""
    objects = {id.title().replace("_", ""): "Layer"} if objects is None else objects
    body = "\n\n".join(f"class {name}:\n    pass" for name in objects) if body is None else body
    card = CARD.format(id=id, title=title, family=family, summary=summary, objects=dict(objects), more=more)
    start = DOCSTRING.format(id=id, about=about)
    return f"{start}\nfrom laconic.core.card import Card\n\n\n{body}\n\n{card}"


def tree(root: Path, files: Mapping[str, str], stubs: Mapping[str, str] | None = None) -> Path:
    """A package with these files in its families; stubs are made from the objects unless given. Returns its folder."""
    package = root / "laconic"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    made: dict[str, str] = {}
    for name, text in files.items():
        family, _, file = name.partition("/")
        lines = [line.split()[1].rstrip(":").split("(")[0] for line in text.splitlines() if line.startswith("class ")]
        made[family] = made.get(family, "") + "".join(f"from .{Path(file).stem} import {n} as {n}\n" for n in lines)
    for family, text in (made | dict(stubs or {})).items():
        (package / family / "__init__.pyi").write_text(text, encoding="utf-8")
    return package


def source_tree(root: Path) -> Path:
    """A checkout with laconic's families and stubs, and no method in them. Returns its root."""
    for family in FAMILIES:
        folder = root / "laconic" / family
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f'"""{family}"""\n', encoding="utf-8")
        (folder / "__init__.pyi").write_text("# public names\n", encoding="utf-8")
    (root / "laconic" / "core").mkdir()
    (root / "laconic" / "core" / "card.py").write_text('"""Cards."""\n', encoding="utf-8")
    (root / "tests").mkdir()
    return root
