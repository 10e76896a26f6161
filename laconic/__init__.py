"""laconic: a network you already have, saying the same in fewer bits, and a report of what was measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "compress": "laconic.pipeline.compress",
    "plan": "laconic.pipeline.compress",
    "compare": "laconic.pipeline.compare",
    "inspect": "laconic.pipeline.inspect",
    "load": "laconic.pipeline.load",
    "fetch": "laconic.tasks",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from laconic.pipeline.compare import compare as compare
    from laconic.pipeline.compress import compress as compress
    from laconic.pipeline.compress import plan as plan
    from laconic.pipeline.inspect import inspect as inspect
    from laconic.pipeline.load import load as load
    from laconic.tasks import fetch as fetch


def __getattr__(name: str) -> Any:
    """Public functions are imported when first touched, so that `import laconic` adds little to `import torch`."""
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'laconic' has no attribute {name!r}")


def _register_with_transformers() -> None:
    from laconic._hooks import register_when_imported

    register_when_imported()


_register_with_transformers()
