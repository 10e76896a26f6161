"""An extension of griffe, which reads the sources for mkdocstrings: every docstring goes through `docs.markdown`."""

from __future__ import annotations

from typing import Any

import griffe

from docs.markdown import prose

__all__ = ["Docstrings"]


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings before their sections are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = prose(obj.docstring.value)
