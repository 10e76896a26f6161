"""laconic: a network you already have, saying the same in fewer bits, and a report of what was measured."""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0.dev0"

# Public names stand in `__init__.pyi` and are imported when first touched, so that `import laconic` costs little.
__getattr__, __dir__, _public = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_public]


def _register_with_transformers() -> None:
    from laconic._hooks import register_when_imported

    register_when_imported()


_register_with_transformers()
