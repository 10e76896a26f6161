"""Registration with transformers, without importing it: at once where it is loaded, else when it comes.

`AutoModel.from_pretrained(folder)` finds laconic's quantizer in a table of `transformers.quantizers.auto`.
Importing that module takes seconds, so `import laconic` only leaves a finder on `sys.meta_path` that waits
for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_when_imported"]

_WATCHED = "transformers.quantizers.auto"
_REGISTERS = "laconic.pipeline.hf"


def register_when_imported() -> None:
    """Make transformers able to load laconic's artifacts, now or as soon as it is imported."""
    if _WATCHED in sys.modules:
        importlib.import_module(_REGISTERS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as Python would, and wraps its loader; leaves `sys.meta_path` when it has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)  # first, or the search below would come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader of the watched module, and then the registration."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # what asks the module for its source finds it
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(_REGISTERS)
