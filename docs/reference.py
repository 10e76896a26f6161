"""The pages of the Python reference: one for every public module, its names explained by mkdocstrings."""

from __future__ import annotations

import ast

from docs.coverage import Definition, Module, Sources
from docs.markdown import cell, first_line, link, prose, table
from laconic.core.card import FAMILIES

__all__ = ["module_page", "module_table", "modules", "page_of", "root_table"]

# Nothing stands between the title of such a page and its names.
LEVEL = "\n    options:\n      heading_level: 2"
# Longer values say less than they take room.
SHORT = 60
# Methods have pages of their own, contracts stand on the page of the kinds, commands on theirs.
ELSEWHERE = ("laconic.cli", "laconic.testing.checks", *(f"laconic.{family}" for family in FAMILIES))


def modules(sources: Sources) -> list[Module]:
    """The public modules that get a page: all that say or hold something, and are not explained elsewhere."""
    below = tuple(f"{one}." for one in ELSEWHERE)
    return [
        one for one in sources.public if one.dotted not in ("laconic", *ELSEWHERE) and not one.dotted.startswith(below)
    ]


def page_of(dotted: str) -> str:
    """Where the page of a module lies among the sources of the site."""
    return f"reference/{dotted.removeprefix('laconic.')}.md"


def root_table(sources: Sources, page: str) -> str:
    """What stands in the root: each function and class in a line, linked to the module that explains it."""
    rows = []
    for name, source in sorted(dict(sources.stubs())["laconic"].items()):
        found = sources.find(*source)
        if found is None or found[1] is None:
            continue  # a package; those have pages of their own
        module, node = found
        about = first_line(ast.get_docstring(node)) if isinstance(node, Definition) else ""
        target = f"{page_of(module.dotted)}#{module.dotted}.{name}"
        rows.append([link(f"`laconic.{name}`", target, page), cell(about)])
    return table(["Name", "What it does"], rows)


def module_table(sources: Sources, page: str) -> str:
    """All modules with a page, and what each is for."""
    rows = []
    for module in modules(sources):
        about = first_line(ast.get_docstring(module.tree))
        rows.append([link(f"`{module.dotted}`", page_of(module.dotted), page), cell(about)])
    return table(["Module", "What it is for"], rows)


def module_page(sources: Sources, module: Module) -> str:
    """The page of a module: what it says, what it takes in from others, what it defines."""
    page = page_of(module.dotted)
    parts = [f"---\ntitle: {module.dotted.removeprefix('laconic.')}\n---", f"# `{module.dotted}`"]
    parts.append(prose(ast.get_docstring(module.tree) or ""))
    taken = [name for name in module.public if name not in module.defined]
    if taken:
        shown = [_taken(sources, module, name, page) for name in taken]
        parts.append(f"From here one takes {', '.join(shown)}.")
    named = [name for name in module.public if name in module.defined]
    constants = [name for name in named if not isinstance(module.defined[name], Definition)]
    parts += [f"::: {module.dotted}.{name}" + LEVEL for name in named if name not in constants]
    if constants:
        parts += ["## Constants", "\n".join(_constant(module, name) for name in constants)]
    return "\n\n".join(parts)


def _constant(module: Module, name: str) -> str:
    """A constant, its value where that is short, and the string under it where there is one."""
    node = module.defined[name]
    value = getattr(node, "value", None)
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        value = value.elts[[getattr(one, "id", "") for one in target.elts].index(name)]
    shown = f" = `{text}`" if value is not None and len(text := ast.unparse(value)) <= SHORT else ""
    said = module.described.get(name, "")
    return f"- `{name}`{shown}" + (f": {prose(first_line(said))}" if said else "")


def _taken(sources: Sources, module: Module, name: str, page: str) -> str:
    """A name that a package passes on, linked to the page of the module that defines it."""
    found = sources.find(module.dotted, name)
    if found is None or found[0] not in modules(sources):
        return f"`{name}`"
    anchor = f"#{found[0].dotted}.{name}" if name in found[0].public else ""
    return link(f"`{name}`", f"{page_of(found[0].dotted)}{anchor}", page)
