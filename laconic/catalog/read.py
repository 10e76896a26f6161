"""The catalog: every landed method, read from the families' folders.

The rule is short. In a family's folder each `_<name>.py` says what it is: a method ends with `CARD = Card(...)` and is
called `_<id>.py`; a part that methods share ends with `CARD = None`. The family's stub `__init__.pyi` makes names
public, and every object of a card must be there.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from laconic.catalog.source import Method, Misfit, read_method, read_stub
from laconic.core.card import FAMILIES, KINDS
from laconic.errors import BadInput

__all__ = ["Catalog", "one_of", "problems", "read"]

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Catalog:
    """All landed methods.

    Attributes:
        methods: id to method, by family and then by id.
        package: the folder of the package.
    """

    methods: Mapping[str, Method]
    package: Path

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods.values())

    def __len__(self) -> int:
        return len(self.methods)

    def __contains__(self, id: object) -> bool:
        return id in self.methods

    def get(self, id: str) -> Method:
        """The method of this id.

        Raises:
            BadInput: there is none; the nearest ids are named.
        """
        if id in self.methods:
            return self.methods[id]
        # `powernorm` for the object PowerNorm: who knows the name of an object is led to its method.
        owners = [m.id for m in self if any(id.lower() == public.lower() for public in m.card.objects)]
        near = owners or difflib.get_close_matches(id.lower(), self.methods, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`laconic methods` lists those that have landed"
        raise BadInput(f"no method has the id {id!r}: {hint}")

    def select(self, pattern: str | None = None, family: str | None = None, kind: str | None = None) -> list[Method]:
        """The methods whose id or title matches, of one family, offering one kind.

        Args:
            pattern: a glob (`*norm`), or a part of the id, the title or an object's name; case does not count.
            family: a family.
            kind: a kind, in any case.

        Raises:
            BadInput: an unknown family or kind.
        """
        if family is not None:
            family = one_of("family", family, FAMILIES)
        if kind is not None:
            kind = one_of("kind", kind, KINDS)
        return [
            method
            for method in self
            if (family is None or method.card.family == family)
            and (kind is None or kind in method.card.kinds)
            and (pattern is None or _matches(method, pattern.lower()))
        ]

    def objects(self) -> Iterator[tuple[Method, str, str]]:
        """(method, public name, kind) of every object."""
        for method in self:
            for name, kind in method.card.objects.items():
                yield method, name, kind


def read(package: Path | str = PACKAGE) -> Catalog:
    """The catalog of a package's source tree.

    Args:
        package: the folder that holds the families; laconic's own by default.

    Raises:
        BadInput: a file that breaks the rules, as `file:line: what`, and how many others do.
    """
    methods, found = _read(Path(package))
    if found:
        more = f" (and {len(found) - 1} more: `laconic methods --check` names all)" if len(found) > 1 else ""
        raise BadInput(f"{found[0]}{more}")
    return Catalog(methods, Path(package))


def problems(package: Path | str = PACKAGE) -> list[str]:
    """All that is wrong with the cards and stubs of a source tree, as `file:line: what`."""
    return [str(error) for error in _read(Path(package))[1]]


def _read(package: Path) -> tuple[dict[str, Method], list[Misfit]]:
    methods: dict[str, Method] = {}
    found: list[Misfit] = []
    for family in FAMILIES:
        folder = package / family
        files = sorted(folder.glob("*.py"))
        public: dict[str, tuple[str, int]] | None = None
        stub = folder / "__init__.pyi"
        try:
            public = read_stub(stub, _name(stub, package)) if stub.is_file() else {}
        except Misfit as error:
            found.append(error)
        for path in files:
            if path.name == "__init__.py":
                continue
            try:
                method = _method(path, package, public, methods)
            except Misfit as error:
                found.append(error)
                continue
            if method is not None:
                methods[method.id] = method
        modules = {path.stem for path in files}
        for name, (module, line) in (public or {}).items():
            if module not in modules:
                found.append(Misfit(_name(stub, package), line, f"{name} comes from {module}.py, which is not there"))
    return methods, found


def _method(
    path: Path, package: Path, public: Mapping[str, tuple[str, int]] | None, methods: Mapping[str, Method]
) -> Method | None:
    name = _name(path, package)
    if not path.name.startswith("_"):
        raise Misfit(name, 1, f"a family's files begin with an underscore: call it _{path.name}")
    method = read_method(path, name)
    if method is None:
        return None
    if method.id in methods:
        other = methods[method.id]
        raise Misfit(name, method.line, f"the id {method.id!r} is taken by {_name(other.path, package)}:{other.line}")
    for offered in method.card.objects:
        # Where the stub itself is broken, that is the one thing to say.
        if public is not None and public.get(offered, ("", 0))[0] != path.stem:
            stub = _name(path.with_name("__init__.pyi"), package)
            line = f"from .{path.stem} import {offered} as {offered}"
            raise Misfit(name, method.lines[offered], f"{offered} is not in the stub {stub}: add `{line}`")
    return method


def _name(path: Path, package: Path) -> str:
    """A file as messages call it: from the package on, and the same on every machine."""
    return path.relative_to(package.parent).as_posix()


def one_of(what: str, given: str, known: tuple[str, ...]) -> str:
    """The known name that was meant, whatever its case.

    Raises:
        BadInput: none was; the nearest is named.
    """
    for name in known:
        if given.lower() == name.lower():
            return name
    near = difflib.get_close_matches(given.lower(), [name.lower() for name in known], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BadInput(f"{given!r} is not a {what}: {hint}there are {', '.join(known)}")


def _matches(method: Method, pattern: str) -> bool:
    names = [method.id, method.card.title.lower(), *(name.lower() for name in method.card.objects)]
    if any(sign in pattern for sign in "*?["):
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)
    return any(pattern in name for name in names)
