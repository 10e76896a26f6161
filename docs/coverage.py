"""Every public name says what it is: the check that fails the build of the site where one does not.

Public are the names in the root's and the families' stubs (`.pyi`), and those of modules without an underscore in their
path: `__all__`, or all that do not begin with an underscore where there is none. A module, a class or a function needs a
docstring; so does a public method or property of a public class, unless it overrides one that has it. Constants cannot
have one. All of it is read by `ast`, so that what does not import is checked as well.

    python -m docs.coverage
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from laconic.errors import BadInput

__all__ = ["PACKAGE", "Breach", "Definition", "Module", "Sources", "breaches"]

PACKAGE = Path(__file__).resolve().parents[1] / "laconic"
# What classes take over from torch, which documents it.
TORCH = frozenset(
    {"forward", "extra_repr", "reset_parameters", "step", "state_dict", "load_state_dict", "get_lr", "right_inverse"}
)

# What can have a docstring.
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Breach:
    """A public name that says nothing: where it stands, and what it is called."""

    path: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name} is public and has no docstring: say in a line what it is"


class Module:
    """A parsed file.

    Args:
        path: of the file.
        dotted: its name, as laconic.norm._rmsnorm.
    """

    def __init__(self, path: Path, dotted: str):
        self.path, self.dotted = path, dotted
        self.tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))

    @cached_property
    def defined(self) -> dict[str, ast.stmt]:
        """Name to the statement that defines it, at the top of the file or under an `if` or `try` there."""
        found: dict[str, ast.stmt] = {}
        for node in _top(self.tree.body):
            for name in _names(node):
                found.setdefault(name, node)
        return found

    @cached_property
    def described(self) -> dict[str, str]:
        """Name of a constant to the string that stands under it, where one does."""
        pairs = zip(self.tree.body, self.tree.body[1:], strict=False)
        said = [(node, after.value) for node, after in pairs if isinstance(after, ast.Expr)]
        return {
            name: string.value
            for node, string in said
            if not isinstance(node, Definition) and isinstance(string, ast.Constant) and isinstance(string.value, str)
            for name in _names(node)
        }

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Name to (module, name there) of what comes from the package itself."""
        found: dict[str, tuple[str, str]] = {}
        package = self.dotted.split(".")[: None if self.path.stem == "__init__" else -1]
        for node in _top(self.tree.body):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                if source.split(".")[0] == package[0]:
                    found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        return found

    @cached_property
    def public(self) -> tuple[str, ...]:
        """`__all__`; where there is none, or it is computed, the classes and functions without an underscore."""
        node = self.defined.get("__all__")
        if isinstance(node, ast.Assign):
            try:
                return tuple(ast.literal_eval(node.value))
            except ValueError:
                pass  # computed, as `lazy_loader` does from a stub, which is read by itself
        return tuple(n for n, d in self.defined.items() if isinstance(d, Definition) and not n.startswith("_"))


class Sources:
    """The source tree of a package, each file parsed once.

    Args:
        package: its folder.
    """

    def __init__(self, package: Path = PACKAGE):
        self.package = package
        self._modules: dict[str, Module | None] = {}

    def module(self, dotted: str) -> Module | None:
        """The module of that name, or None where there is no such file."""
        if dotted not in self._modules:
            base = self.package.parent.joinpath(*dotted.split("."))
            path = next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)
            self._modules[dotted] = Module(path, dotted) if path else None
        return self._modules[dotted]

    @cached_property
    def public(self) -> list[Module]:
        """All public modules, by path: those without an underscore in it."""
        found = []
        for path in sorted(self.package.rglob("*.py")):
            parts = list(path.relative_to(self.package.parent).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            module = None if any(part.startswith("_") for part in parts) else self.module(".".join(parts))
            if module is not None:
                found.append(module)
        return found

    def stubs(self) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
        """(package, public name to the module and name that it comes from) of the root and the families."""
        for path in sorted(self.package.rglob("__init__.pyi")):
            dotted = ".".join(path.relative_to(self.package.parent).parent.parts)
            yield dotted, Module(path, dotted).imported

    def find(self, dotted: str, name: str) -> tuple[Module, ast.stmt | None] | None:
        """Where a name is defined, through however many imports; the statement is None where it is a module."""
        seen: set[tuple[str, str]] = set()
        while (dotted, name) not in seen:
            seen.add((dotted, name))
            module = self.module(dotted)
            if module is None:
                return None
            if name in module.defined:
                return module, module.defined[name]
            if name not in module.imported:
                inner = self.module(f"{dotted}.{name}")
                return (inner, None) if inner else None
            dotted, name = module.imported[name]
        return None


def breaches(package: Path = PACKAGE) -> list[Breach]:
    """The public names of a package that say nothing, by file and line.

    Raises:
        BadInput: a public name is defined nowhere.
    """
    sources = Sources(package)
    found: set[tuple[Path, int, str]] = set()
    for module in sources.public:
        if not ast.get_docstring(module.tree):
            found.add((module.path, 1, module.dotted))
        for name in module.public:
            found.update(_silent(sources, module.dotted, name, module.dotted))
    for dotted, names in sources.stubs():
        for source, name in names.values():
            found.update(_silent(sources, source, name, dotted))
    named: dict[tuple[Path, int], str] = {}
    for path, line, name in sorted(found):
        named.setdefault((path, line), name)  # what is public in two places is said once
    root = package.parent
    return sorted(Breach(path.relative_to(root).as_posix(), line, name) for (path, line), name in named.items())


def _silent(sources: Sources, dotted: str, name: str, shown: str) -> Iterator[tuple[Path, int, str]]:
    if name.startswith("__"):
        return  # __version__ and the like are Python's own
    found = sources.find(dotted, name)
    if found is None:
        raise BadInput(f"{shown}.{name} is public and defined nowhere: mend __all__ or the stub")
    module, node = found
    public = f"{shown}.{name}"
    if node is None:
        if not ast.get_docstring(module.tree):
            yield module.path, 1, public
    elif isinstance(node, Definition):
        if not ast.get_docstring(node):
            yield module.path, node.lineno, public
        if isinstance(node, ast.ClassDef):
            for member in _silent_members(node):
                if not _inherits(sources, module, node, member.name):
                    yield module.path, member.lineno, f"{public}.{member.name}"


def _silent_members(owner: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public methods and properties without a docstring."""
    for member in owner.body:
        if not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) or member.name.startswith("_"):
            continue
        # A setter or an overload belongs to what stands beside it.
        beside = any(ast.unparse(d).endswith((".setter", ".deleter", "overload")) for d in member.decorator_list)
        if not beside and not ast.get_docstring(member):
            yield member


def _inherits(sources: Sources, module: Module, owner: ast.ClassDef, name: str) -> bool:
    """Whether a base class documents this method."""
    for base in owner.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        found = sources.find(module.dotted, base.id) if isinstance(base, ast.Name) else None
        if found is None or not isinstance(found[1], ast.ClassDef):
            if name in TORCH:
                return True
            continue
        there, node = found[0], found[1]
        own = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef) and m.name == name]
        if any(ast.get_docstring(m) for m in own) or _inherits(sources, there, node, name):
            return True
    return False


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _top([*node.body, *node.orelse])
        else:
            yield node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, Definition):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    flat = [inner for target in targets for inner in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [target.id for target in flat if isinstance(target, ast.Name)]


def main() -> int:
    """Print every breach; the exit code says whether there are any."""
    found = breaches()
    for breach in found:
        print(breach, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
