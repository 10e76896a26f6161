"""Docstrings as Markdown. They are nearly that already: what differs is examples, and angle brackets in prose."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from textwrap import dedent

__all__ = ["cell", "examples", "first_line", "link", "prose", "session", "table", "without_examples"]

PROMPT = ">>> "
HEADING = re.compile(r"^\s*Examples?:+\s*$")


def prose(docstring: str) -> str:
    """A docstring as Markdown: each example is a fenced block, each `<` outside of code is text.

    Google's sections (Args, Raises) and indented blocks, which are code in Markdown as well, stay as they are.
    """
    lines: list[str] = []
    for is_session, block in _blocks(docstring):
        if not is_session:
            lines += [_text(line) for line in block]
            continue
        while lines and not lines[-1].strip():
            lines.pop()
        indent = _indent(block[0])
        if lines and HEADING.match(lines[-1]) and _indent(lines[-1]) < indent:
            # As a section of its own it would be indented, and its fence would be taken for code.
            indent = _indent(lines.pop())
            lines.append(f"{' ' * indent}**Example**")
        fenced = session(dedent("\n".join(block)))
        lines += ["", *(f"{' ' * indent}{line}".rstrip() for line in fenced.split("\n")), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def examples(docstring: str) -> list[str]:
    """The runs of `>>>` lines and their output, without indentation."""
    return [dedent("\n".join(block)) for is_session, block in _blocks(docstring) if is_session]


def without_examples(docstring: str) -> str:
    """The docstring as Markdown, without its examples and the headings over them."""
    kept: list[str] = []
    for is_session, block in _blocks(docstring):
        if not is_session:
            kept += block
            continue
        while kept and (not kept[-1].strip() or HEADING.match(kept[-1])):
            kept.pop()
        kept.append("")
    return prose("\n".join(kept))


def session(example: str) -> str:
    """An example of the Python prompt as a fenced block."""
    return f"```pycon\n{example.rstrip()}\n```"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what is in a cell is Markdown, see `cell`."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Plain text as it must stand in the cell of a table."""
    return _text(" ".join(text.split())).replace("|", "\\|")


def link(text: str, target: str, page: str) -> str:
    """A link from one page of the site to another, both as paths of their sources."""
    path, hash_, anchor = target.partition("#")
    return f"[{text}]({posixpath.relpath(path, posixpath.dirname(page) or '.')}{hash_}{anchor})"


def first_line(docstring: str | None) -> str:
    """The first sentence or two of a docstring: its first paragraph on one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def _blocks(docstring: str) -> list[tuple[bool, list[str]]]:
    """Runs of lines, each with whether it is an example: from a prompt to the next empty line."""
    blocks: list[tuple[bool, list[str]]] = []
    inside = False
    for line in docstring.expandtabs().split("\n"):
        starts = line.lstrip().startswith(PROMPT)
        inside = starts or (inside and bool(line.strip()))
        if blocks and blocks[-1][0] == inside:
            blocks[-1][1].append(line)
        else:
            blocks.append((inside, [line]))
    return blocks


def _text(line: str) -> str:
    """A line of prose whose `<` cannot begin a tag; indented lines may be code, in which nothing must change."""
    if line.startswith("    "):
        return line
    parts = line.split("`")  # even ones lie outside of code
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
