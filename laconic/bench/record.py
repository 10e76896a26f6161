"""The record of a run: on what, with what, how, and every round's time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from laconic.errors import BadInput

from . import machine
from .measure import LEAST, LEVEL, ROUNDS

__all__ = ["build", "write"]

VERSION = 1
PACKAGES = ("torchao", "onnxruntime", "onnx", "openvino", "nncf", "llama-cpp-python", "gguf", "bitsandbytes")


def build(
    found: Sequence[Mapping[str, Any]], *, rounds: int, seed: int, command: str, load: tuple[float | None, float | None]
) -> dict[str, Any]:
    """The record of works that were measured, ready for JSON.

    Args:
        found: the part about each work.
        rounds, seed: of the run.
        command: how to repeat it.
        load: processes that wanted the processor in the minute before the run began, and before it ended.
    """
    from laconic.kernels import native
    from laconic.pipeline.measure import machine as describe
    from laconic.pipeline.measure import versions

    kernels = {name: value for name, value in native.status().items() if name != "path"}
    return {
        "version": VERSION,
        "command": command,
        "rounds": rounds,
        "enough_rounds": rounds >= ROUNDS,
        "seconds_at_least": LEAST,
        "level": LEVEL,
        "seed": seed,
        "machine": {**describe(), "cache_bytes": machine.cache_bytes(), "load": list(load), "how": machine.how()},
        "versions": {**versions(), **_versions()},
        "kernels": kernels,
        "works": list(found),
    }


def _versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(record: Mapping[str, Any], path: Path) -> Path:
    """Write a record and its plot beside it, each whole or not at all; returns the plot's path.

    Raises:
        BadInput: the folder cannot be written to.
    """
    from .plot import draw

    plot = path.with_suffix(".svg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((path, json.dumps(record, indent=1) + "\n"), (plot, draw(record))):
            partial = file.with_name(file.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    return plot
