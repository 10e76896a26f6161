"""Registration with transformers and peft, without importing them: at once where they are loaded, else when they come.

`AutoModel.from_pretrained(folder)` finds laconic's quantizer in a table of `transformers.quantizers.auto`, and peft is told
what merging into packed layers takes. Importing those modules takes seconds, so `import laconic` only leaves finders on
`sys.meta_path` that wait for them.
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

# Module that is waited for -> ours, whose import registers.
_REGISTERS = {
    "transformers.quantizers.auto": "laconic.pipeline.hf",
    "peft.tuners.tuners_utils": "laconic.pipeline.peft",
}


def register_when_imported() -> None:
    """Make transformers load laconic's artifacts and peft merge into them, now or as soon as they are imported."""
    waiting = {finder.watched for finder in sys.meta_path if isinstance(finder, _Finder)}
    for watched, ours in _REGISTERS.items():
        if watched in sys.modules:
            importlib.import_module(ours)
        elif watched not in waiting:
            sys.meta_path.insert(0, _Finder(watched))


class _Finder(MetaPathFinder):
    """Finds one module as Python would, and wraps its loader; leaves `sys.meta_path` when it has."""

    def __init__(self, watched: str):
        self.watched = watched

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.watched:
            return None
        sys.meta_path.remove(self)  # first, or the search below would come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _REGISTERS[fullname])
        return spec


class _Loader(Loader):
    """The loader of the watched module, and then the registration."""

    def __init__(self, loader: Loader, ours: str):
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # what asks the module for its source finds it
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(self._ours)
