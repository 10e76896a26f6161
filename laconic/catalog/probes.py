"""The probes of the catalog, by the id of their method, and their plots as files."""

from __future__ import annotations

import importlib
from pathlib import Path

from laconic.catalog.read import read
from laconic.errors import BadInput

__all__ = ["probe_class", "probes", "probes_sentence", "write_plot"]


def probes() -> dict[str, tuple[str, str, str]]:
    """id -> (family, object, summary) of every landed probe."""
    return {
        method.id: (method.card.family, name, method.card.summary)
        for method, name, kind in read().objects()
        if kind == "Probe"
    }


def probe_class(id: str) -> type:
    """The class of a probe by its method's id, or by its own name.

    Raises:
        BadInput: there is none; all are named.
    """
    known = probes()
    by_name = {name.lower(): id for id, (_, name, _) in known.items()}
    chosen = id if id in known else by_name.get(id.lower())
    if chosen is None:
        raise BadInput(f"there is no probe {id!r}: there are {', '.join(known)}")
    family, name, _ = known[chosen]
    return getattr(importlib.import_module(f"laconic.{family}"), name)


def probes_sentence() -> str:
    """A line for each probe."""
    return "\n".join(f"{id}: {summary}" for id, (_, _, summary) in probes().items())


def write_plot(svg: str | None, path: str) -> None:
    """Write a plot; without one, only see that it can be written.

    Raises:
        BadInput: neither SVG nor PNG, no such folder, or PNG without cairosvg.
    """
    file = Path(path)
    if file.suffix.lower() not in (".svg", ".png"):
        raise BadInput(f"{path} is neither an SVG nor a PNG file: end it with .svg or .png")
    if not file.parent.is_dir():
        raise BadInput(f"{path} cannot be written: there is no folder {file.parent}")
    if file.suffix.lower() == ".svg":
        if svg is not None:
            file.write_text(svg, encoding="utf-8")
        return
    try:
        cairosvg = importlib.import_module("cairosvg")
    except ImportError as error:
        raise BadInput(
            f"{path}: a PNG file needs the package cairosvg, which is not installed: give an SVG file"
        ) from error
    if svg is not None:
        cairosvg.svg2png(bytestring=svg.encode(), write_to=str(file), scale=2.0)
