"""The page of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docs.markdown import cell, table

__all__ = ["command_list"]


def command_list() -> str:
    """Every command: what it does, how it is called, what it takes."""
    from typer.main import get_command

    from laconic.cli import app

    group: Any = get_command(app)
    return "\n\n".join(part for name, command in group.commands.items() for part in _command(name, command))


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## laconic {name}"
    yield cell(command.help or "")
    arguments = [one for one in command.params if _is_argument(one)]
    options = [one for one in command.params if not _is_argument(one)]
    needed = [one for one in options if one.required]
    words = [*map(_argument, arguments), *(f"{one.opts[0]} {_value(one)}" for one in needed)]
    if len(needed) < len(options):
        words.append("[OPTIONS]")
    yield f"```\n{' '.join([f'laconic {name}', *words])}\n```"
    rows = [(_called(one), cell(getattr(one, "help", None) or ""), _default(one)) for one in (*arguments, *options)]
    if rows:
        yield table(["", "", "Default"], rows)


def _is_argument(one: Any) -> bool:
    return one.param_type_name == "argument"


def _argument(one: Any) -> str:
    name = f"{_value(one)}..." if one.nargs != 1 else _value(one)
    return name if one.required else f"[{name}]"


def _called(one: Any) -> str:
    if _is_argument(one):
        return f"`{_value(one)}`"
    names = ", ".join(f"`{name}`" for name in one.opts)
    return names if one.is_flag else f"{names} {_value(one)}"


def _value(one: Any) -> str:
    """What stands for the value of an option: its own name in capitals, `json_` without what keeps it from Python's."""
    return str(one.name).rstrip("_").upper()


def _default(one: Any) -> str:
    if one.required:
        return "required"
    is_said = _is_argument(one) or one.is_flag or one.default in (None, "", (), [])
    return "" if is_said else f"`{one.default}`"
