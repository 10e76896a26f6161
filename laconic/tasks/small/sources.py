"""Where the packages that small tasks read lie; nothing is downloaded here."""

from __future__ import annotations

import os
from pathlib import Path

from laconic.errors import BadInput

from ..fetch import PACKAGES, cache_folder

__all__ = ["locate"]

def locate(package: str, task: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a fetched package.

    Args:
        package: a key of `laconic.tasks.fetch.PACKAGES`.
        task: the small task that asks.
        cache: as in `fetch`.

    Raises:
        BadInput: it is not fetched; the message says the command.
    """
    entry = PACKAGES[package]
    root = cache_folder(cache) / f"{package}-{entry.version}"
    if not root.is_dir():
        raise BadInput(
            f"the small task {task} reads {entry.purpose}, which is not in {root.parent}; "
            f"run `laconic fetch {package}` ({entry.megabytes:g} MB; licence: {entry.licence})"
        )
    return root / entry.content
