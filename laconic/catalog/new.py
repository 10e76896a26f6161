"""`laconic new`: a method's three files and its lines in the stub, as a skeleton that works.

The skeleton of each kind is about the smallest thing of its kind. It passes its contract and its test at once, so that
the author goes from green to green; what is still to be said is marked TODO, and the repository's own tests refuse a
card that says so.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from string import Template

from laconic.catalog.read import one_of, read
from laconic.catalog.source import read_stub
from laconic.core.card import FAMILIES, KINDS, is_id
from laconic.errors import BadInput

__all__ = ["create", "object_name", "source_tree"]

TEMPLATES = Path(__file__).with_name("templates")
# Kinds whose object is a function; torch ends the name of one that works in place in an underscore.
FUNCTIONS = {"Init": "{}_"}


def create(id: str, kind: str, family: str, root: Path | str = ".") -> tuple[Path, ...]:
    """Write the skeleton of a method.

    Args:
        id: of the method: a lower-case Python identifier that is not taken.
        kind: of its object, in any case.
        family: that it belongs to.
        root: a folder of a source tree of laconic.

    Returns:
        What was written: the method, its test, its experiment, and the stub that got a line.

    Raises:
        BadInput: one of the above is not so, or a file is there already; nothing is written then.
    """
    if not is_id(id):
        near = id.lower().replace("-", "_").replace(" ", "_").lstrip("_0123456789")
        hint = f"; {near} would do" if is_id(near) else ""
        raise BadInput(f"{id!r} cannot be an id: it must be a lower-case Python identifier{hint}")
    kind, family = one_of("kind", kind, KINDS), one_of("family", family, FAMILIES)
    tree = source_tree(Path(root))
    taken = read(tree / "laconic").methods.get(id)
    if taken is not None:
        raise BadInput(f"the id {id!r} is taken: {taken.path.relative_to(tree).as_posix()} is {taken.card.title!r}")
    name = object_name(id, kind)
    stub = tree / "laconic" / family / "__init__.pyi"
    public = read_stub(stub, stub.relative_to(tree).as_posix()) if stub.is_file() else {}
    if name in public:
        raise BadInput(f"laconic.{family} has a {name} already, from {public[name][0]}.py: choose another id")
    texts = render(id, kind, family)
    files = {
        tree / "laconic" / family / f"_{id}.py": texts["method"],
        tree / "tests" / family / f"test_{id}.py": texts["test"],
        tree / "experiments" / family / f"{id}.py": texts["experiment"],
    }
    for path in files:
        if path.exists():
            raise BadInput(f"{path.relative_to(tree).as_posix()} is there already: remove it, or choose another id")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    lines = stub.read_text(encoding="utf-8") if stub.is_file() else ""
    stub.write_text(with_line(lines, f"_{id}", name), encoding="utf-8")
    return (*files, stub)


def object_name(id: str, kind: str) -> str:
    """What the object of a new method is called.

    >>> object_name("spectral_norm", "Weight"), object_name("zero", "Init")
    ('SpectralNorm', 'zero_')
    """
    if kind in FUNCTIONS:
        return FUNCTIONS[kind].format(id)
    return "".join(part.capitalize() for part in id.split("_"))


def render(id: str, kind: str, family: str) -> dict[str, str]:
    """The texts of the method, its test and its experiment."""
    words = {"id": id, "name": object_name(id, kind), "family": family, "kind": kind}
    folder = TEMPLATES / kind.lower()
    found = {}
    for what in ("method", "test", "experiment"):
        text = Template((folder / f"{what}.txt").read_text(encoding="utf-8")).substitute(words)
        found[what] = _imports_in_order(text)
    return found


def _imports_in_order(text: str) -> str:
    """Runs of `from laconic...` lines sorted: where the family's stands depends on its name."""
    lines = text.split("\n")
    for ours, run in [(ours, list(run)) for ours, run in groupby(enumerate(lines), key=lambda line: _is_ours(line[1]))]:
        if ours:
            begin = run[0][0]
            lines[begin : begin + len(run)] = sorted((line for _, line in run), key=lambda line: line.split()[1])
    return "\n".join(lines)


def _is_ours(line: str) -> bool:
    return line.startswith("from laconic.")


def source_tree(start: Path) -> Path:
    """The source tree that a folder lies in.

    Raises:
        BadInput: it lies in none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "laconic" / "core" / "card.py").is_file() and (folder / "tests").is_dir():
            return folder
    raise BadInput(f"{start} lies in no source tree of laconic: run this in a checkout, or name one by --root")


def with_line(stub: str, module: str, name: str) -> str:
    """The text of a stub with `from .module import name as name` where it belongs, by module and then as given."""
    lines = stub.splitlines()
    new = f"from .{module} import {name} as {name}"
    at = len(lines)
    for number, line in enumerate(lines):
        if line.startswith("from .") and line.split()[1].lower() > f".{module}":
            at = number
            break
    return "\n".join([*lines[:at], new, *lines[at:]]) + "\n"
