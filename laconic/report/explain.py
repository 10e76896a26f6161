"""What `laconic compress --explain` prints: why each parameter got the bits that it got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from .text import amount

__all__ = ["explain_lines"]


def explain_lines(record: Mapping[str, Any]) -> RenderableType:
    """A line for each parameter, and the price of a byte above them."""
    told = record.get("explained")
    reasons = {unit["name"]: unit.get("reason") for unit in record["units"]}
    if told is None:
        return Group(Text("The recipe states every choice, so nothing was weighed in this run."))
    price = "no parameter is left that more bytes would help" if told["price"] is None else (
        f"a megabyte more would take away {amount(100 * told['price'] / told['total'], 2)} % of the expected loss, at best"
    )  # fmt: skip
    lines = [Text(f"Expected loss by rounding, of the whole plan: {told['total']:.3g}; {price}.", style="bold")]
    for unit in record["units"]:
        name = unit["name"]
        if name in told["units"]:
            lines.append(Text(f"{name}: {_weighed(told['units'][name])}"))
        else:
            lines.append(Text(f"{name}: as it is: {reasons[name] or 'it was not in the plan'}", style="dim"))
    return Group(*lines)


def _weighed(one: Mapping[str, Any]) -> str:
    said = f"{_bits(one['chosen'])}, {one['bytes']:,} bytes, {amount(100 * one['share'], 2)} % of the loss"
    if one["up"] is not None:
        up = one["up"]
        said += f"; {_bits(up['scheme'])} would take away {amount(-100 * up['share'], 2)} % for {up['bytes']:,} bytes"
    if one["down"] is not None:
        down = one["down"]
        word = "add" if down["share"] >= 0 else "take away"
        said += f"; {_bits(down['scheme'])} would {word} {amount(abs(100 * down['share']), 2)} % and save {-down['bytes']:,} bytes"
    return said


def _bits(scheme: str | None) -> str:
    """`int4, group128` of a scheme's text."""
    if scheme is None:
        return "float"
    parts = scheme.split("/")
    return f"{parts[1]} by {parts[2]}"
