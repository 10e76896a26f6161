"""What the source of a method says, read by `ast` alone: its card, its docstring, the signatures of its objects.

Nothing is imported, so that listing 177 methods costs no torch, and a method that does not import is still listed.
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from laconic.core.card import BadCard, Card
from laconic.errors import BadInput

__all__ = ["Method", "Misfit", "read_method", "read_stub"]

# In a method's file `CARD = Card(...)`; in a file that methods of a family share `CARD = None`.
CARD = "CARD"


class Misfit(BadInput):
    """A file that breaks the rules of the catalog; the message begins with `file:line`."""

    def __init__(self, path: str, line: int, message: str):
        super().__init__(f"{path}:{line}: {message}")


@dataclass(frozen=True)
class Method:
    """A landed method.

    Attributes:
        card: its card.
        path: its file.
        line: where the card stands.
        docstring: of its file, with indentation removed.
        signatures: public name of the file to its signature as written, as "(normalized_shape, eps=1e-6)"; "" where it
            is inherited, or what is defined is neither class nor function.
        lines: public name to where it is defined.
    """

    card: Card
    path: Path
    line: int
    docstring: str
    signatures: dict[str, str]
    lines: dict[str, int]

    @property
    def id(self) -> str:
        """The card's id."""
        return self.card.id

    @property
    def about(self) -> str:
        """The docstring's first paragraph, on one line."""
        return " ".join(self.docstring.split("\n\n")[0].split())

    @property
    def equations(self) -> tuple[str, ...]:
        """The docstring's indented blocks, without their indentation: the mathematics, as the anatomy has it."""
        return tuple(block for block in _indented_blocks(self.docstring) if not block.startswith(">>>"))


def read_method(path: Path, name: str | None = None) -> Method | None:
    """The method in a file, or None where it says `CARD = None`: a part that methods of the family share.

    Args:
        path: `<family>/_<id>.py`.
        name: how messages call the file; the path by default.

    Raises:
        Misfit: the file does not parse, has no card, or a card that is not right.
    """
    name = name or str(path)
    tree = _parse(path, name)
    found = [node for node in tree.body if _assigns(node, CARD)]
    if not found:
        raise Misfit(
            name,
            1,
            "no card: end the file with CARD = Card(...), or with CARD = None if methods share it and it is none",
        )
    if len(found) > 1:
        raise Misfit(name, found[1].lineno, f"a second card: the first stands in line {found[0].lineno}")
    value = found[0].value  # type: ignore[attr-defined]
    if isinstance(value, ast.Constant) and value.value is None:
        return None
    card = _card(value, name)
    _check_place(card, value, path, name)
    defined = {named: node for node in tree.body for named in _defines(node)}
    for public in card.objects:
        if public not in defined:
            line = _line(value, "objects")
            raise Misfit(name, line, f"the card offers {public}, which the file does not define")
    return Method(
        card=card,
        path=path,
        line=found[0].lineno,
        docstring=ast.get_docstring(tree) or "",
        signatures={public: _signature(node, defined) for public, node in defined.items() if _is_public(public)},
        lines={public: node.lineno for public, node in defined.items() if _is_public(public)},
    )


def read_stub(path: Path, name: str | None = None) -> dict[str, tuple[str, int]]:
    """Public name to (module, line), from the `from ._module import Name as Name` lines of a family's stub.

    Raises:
        Misfit: it does not parse, holds something else, or names one thing twice.
    """
    name = name or str(path)
    public: dict[str, tuple[str, int]] = {}
    for node in _parse(path, name).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or not node.module:
            raise Misfit(name, node.lineno, "a stub holds lines like `from ._rmsnorm import RMSNorm as RMSNorm` alone")
        for alias in node.names:
            if alias.name == "*" or alias.asname not in (None, alias.name):
                raise Misfit(name, node.lineno, f"{alias.name} must be imported under its own name")
            if alias.name in public:
                raise Misfit(name, node.lineno, f"{alias.name} is public already, from {public[alias.name][0]}")
            public[alias.name] = (node.module, node.lineno)
    return public


def _parse(path: Path, name: str) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=name)
    except SyntaxError as error:
        raise Misfit(name, error.lineno or 1, f"this is not Python: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise Misfit(name, 1, f"this is not UTF-8 at byte {error.start}") from None


def _card(value: ast.expr | None, name: str) -> Card:
    if not isinstance(value, ast.Call) or ast.unparse(value.func).split(".")[-1] != Card.__name__:
        line = value.lineno if value is not None else 1
        raise Misfit(name, line, f"CARD must be a call Card(...) or None, found {_short(value)}")
    if value.args:
        raise Misfit(name, value.args[0].lineno, "Card takes keyword arguments only: write id=..., title=...")
    known = [f.name for f in fields(Card)]
    given: dict[str, Any] = {}
    for keyword in value.keywords:
        if keyword.arg is None:
            raise Misfit(
                name, keyword.value.lineno, "a card takes no ** arguments: it must be readable without running"
            )
        if keyword.arg not in known:
            raise Misfit(name, keyword.value.lineno, f"a card has no {keyword.arg}; it has {', '.join(known)}")
        if keyword.arg in given:
            raise Misfit(name, keyword.value.lineno, f"{keyword.arg} stands twice")
        try:
            given[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            line = keyword.value.lineno
            message = f"{keyword.arg} must be a literal, found {_short(keyword.value)}"
            raise Misfit(name, line, message) from None
    missing = [
        f.name for f in fields(Card) if f.default is MISSING and f.default_factory is MISSING and f.name not in given
    ]
    if missing:
        raise Misfit(name, value.lineno, f"the card lacks {', '.join(missing)}")
    try:
        return Card(**given)
    except BadCard as error:
        raise Misfit(name, _line(value, error.field), str(error)) from None


def _check_place(card: Card, call: ast.expr, path: Path, name: str) -> None:
    if path.name != f"_{card.id}.py":
        raise Misfit(name, _line(call, "id"), f"the card's id is {card.id!r}, so the file must be called _{card.id}.py")
    if path.parent.name != card.family:
        message = f"the card's family is {card.family!r}, but the file lies in {path.parent.name}"
        raise Misfit(name, _line(call, "family"), message)


def _line(call: ast.expr, argument: str) -> int:
    """Where an argument of a call stands."""
    for keyword in getattr(call, "keywords", ()):
        if keyword.arg == argument:
            return keyword.value.lineno
    return call.lineno


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name != CARD


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign) and name in _defines(node)


def _defines(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file defines; imports define nothing of the file's own."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _signature(node: ast.stmt, defined: dict[str, ast.stmt]) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({_arguments(node.args)})"
    if not isinstance(node, ast.ClassDef):
        return ""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return f"({_arguments(member.args, skip=1)})"
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list) or "NamedTuple" in map(ast.unparse, node.bases):
        return f"({', '.join(_field(member) for member in node.body if _is_field(member))})"
    bases = [ast.unparse(base) for base in node.bases]
    for base in bases:
        if base in defined and base != node.name:
            return _signature(defined[base], defined)
    return "()" if set(bases) <= {"nn.Module", "Protocol"} else ""


def _arguments(arguments: ast.arguments, skip: int = 0) -> str:
    """Names and defaults: annotations are for the reference, here they would hide the shape of a call."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_argument(a, d) for a, d in zip(positional, defaults, strict=True)][skip:]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def _is_field(member: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    return isinstance(member, ast.AnnAssign) and not ast.unparse(member.annotation).startswith("ClassVar")


def _field(member: ast.AnnAssign) -> str:
    name = ast.unparse(member.target)
    return name if member.value is None else f"{name}={ast.unparse(member.value)}"


def _short(node: ast.expr | None) -> str:
    text = "nothing" if node is None else " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _indented_blocks(docstring: str) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in docstring.splitlines():
        if line.startswith("    "):
            blocks[-1].append(line[4:].rstrip())
        elif line.strip() or not blocks[-1]:
            blocks.append([])
        else:  # an empty line may lie inside a block
            blocks[-1].append("")
    return [text for block in blocks if (text := "\n".join(block).strip("\n"))]
