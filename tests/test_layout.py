"""The house rules, held by parsing the source: imports point one way, no pickle, a docstring in every module.

Nothing is imported here, so that a broken module shows up as itself and not as a failure to collect.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LACONIC = Path(__file__).parents[1] / "laconic"

FAMILIES = (
    "norm", "weight", "optim", "quant", "binary", "sparse", "dynamic", "distill", "search", "embed", "adapt",
    "graph", "generate", "zoo",
)  # fmt: skip

# A module may import what stands below it. Same number: only itself.
STOREY = (
    {"errors": 0, "_bars": 0, "numerics": 1, "kernels": 2, "nn": 3, "core": 4}
    | dict.fromkeys(FAMILIES, 5)
    # `report` renders plain records and knows nothing of how they are made, so the pipeline can write its report itself.
    | {"interop": 5.5, "tasks": 6, "report": 6.5, "pipeline": 7, "_hooks": 8, "catalog": 9, "testing": 9, "doctor": 9}
    | {"claims": 9.5, "bench": 9.5, "cli": 10}
    | {"__main__": 11, "__init__": 12}
)

BANNED = {"torchvision": "not a dependency", "timm": "not a dependency", "pickle": "no pickle is loaded"}
BANNED |= dict.fromkeys(("dill", "cloudpickle", "shelve", "marshal"), "no pickle is loaded")


def broken_rules(package: Path) -> list[str]:
    """Every breach in a package's tree, as `path:line: what`."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        where = path.relative_to(package)
        dotted = (package.name, *where.with_suffix("").parts)
        for line, what in _breaches(tree, dotted):
            found.append(f"{package.name}/{where.as_posix()}:{line}: {what}")
    return found


def _breaches(tree: ast.Module, dotted: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    here = dotted[1]
    if here not in STOREY:
        yield 1, f"{here} has no place in the house: add it to STOREY, and to the design"
        return
    if not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    for line, target in _imports(tree, dotted):
        top = target.split(".")[0]
        if top in BANNED:
            yield line, f"imports {top}: {BANNED[top]}"
        if top == dotted[0]:
            yield from _wrong_way(line, target, here)
        if here == "numerics" and _is_module_code(target):
            yield line, f"numerics imports {target}: it holds functions, modules live in laconic.nn"
    yield from _unsafe_calls(tree, here)


def _is_module_code(name: str) -> bool:
    return f"{name}.".startswith("torch.nn.") and not name.startswith("torch.nn.functional")


def _wrong_way(line: int, target: str, here: str) -> Iterator[tuple[int, str]]:
    parts = target.split(".")
    there = parts[1] if len(parts) > 1 else "__init__"
    if there == "__version__":  # a constant of the root, which every import runs anyway
        return
    if there not in STOREY:
        there = "__init__"  # a public name of the root: `from laconic import load`
    if there in FAMILIES and here in FAMILIES and there != here:
        yield line, f"the family {here} imports the family {there}: what both need sinks to core or lower"
    elif there != here and STOREY[there] >= STOREY[here]:
        yield line, f"{here} imports {target}, which stands above it"


def _imports(tree: ast.Module, dotted: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that is imported, lazily too, but not for type checkers alone."""
    for node in _at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:  # one dot is the file's own package, each further one the package above
                base = [*dotted[: len(dotted) - node.level], *base]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from _at_run_time(other)
            continue
        yield child
        yield from _at_run_time(child)


def _unsafe_calls(tree: ast.Module, here: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and here == "numerics":
            name = ast.unparse(node)
            if name != "torch.nn" and _is_module_code(name):  # the inner part of torch.nn.x is a node too
                yield node.lineno, f"numerics uses {name}: it holds functions, modules live in laconic.nn"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True runs what the file says"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{name} with allow_pickle runs what the file says"


def test_the_house_is_in_order():
    assert not broken_rules(LACONIC), "\n".join(["", *broken_rules(LACONIC)])


def test_something_was_looked_at():
    assert len(list(LACONIC.rglob("*.py"))) > 5
    assert (LACONIC / "numerics" / "__init__.py").is_file()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "laconic" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "laconic"


@pytest.mark.parametrize(
    ("file", "body", "says"),
    [
        ("numerics/a.py", "from laconic.core import Pass", "numerics imports laconic.core.Pass, which"),
        ("numerics/a.py", "from ..core.structure import Use", "numerics imports laconic.core.structure.Use"),
        ("numerics/__init__.py", "from ..kernels import ops", "numerics imports laconic.kernels.ops"),
        ("kernels/a.py", "def f():\n    import laconic.nn", "kernels imports laconic.nn, which stands"),
        ("nn/deep/a.py", "from ...pipeline import compress", "nn imports laconic.pipeline.compress"),
        ("core/a.py", "from laconic import load", "core imports laconic.load, which stands above it"),
        ("core/a.py", "import laconic", "core imports laconic, which stands above it"),
        ("quant/_a.py", "from laconic.norm import fold", "the family quant imports the family norm"),
        ("quant/_a.py", "from .. import norm", "the family quant imports the family norm"),
        ("report/a.py", "from laconic import cli", "report imports laconic.cli, which stands above it"),
        ("errors.py", "from laconic.numerics import Int", "errors imports laconic.numerics.Int"),
        ("attic/a.py", "", "attic has no place in the house"),
        ("numerics/a.py", "from torch import nn", "numerics imports torch.nn"),
        ("numerics/a.py", "import torch\nx = torch.nn.Linear(1, 1)", "numerics uses torch.nn.Linear"),
        ("tasks/a.py", "def f():\n    import torchvision", "imports torchvision: not a dependency"),
        ("nn/a.py", "import timm.layers", "imports timm: not a dependency"),
        ("tasks/a.py", "import pickle", "imports pickle: no pickle is loaded"),
        ("tasks/a.py", "import torch\ntorch.load('x')", "torch.load without weights_only=True"),
        ("tasks/a.py", "import torch\ntorch.load('x', weights_only=False)", "without weights_only=True"),
        ("tasks/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "np.load with allow_pickle"),
    ],
)
def test_a_breach_is_found(tmp_path, file, body, says):
    found = broken_rules(write(tmp_path, {file: f'"""A module."""\n{body}\n'}))
    assert len(found) == 1, found
    assert found[0].startswith(f"laconic/{file}:") and says in found[0]


def test_a_missing_docstring_is_found(tmp_path):
    found = broken_rules(write(tmp_path, {"nn/a.py": "x = 1\n"}))
    assert found == ["laconic/nn/a.py:1: the module has no docstring"]


@pytest.mark.parametrize(
    ("file", "body"),
    [
        ("kernels/a.py", "from laconic.numerics import Int\nfrom . import native"),
        ("numerics/a.py", "from laconic.errors import BadInput"),
        ("numerics/a.py", "import torch.nn.functional as F\nfrom .scheme import Int"),
        ("numerics/a.py", "import torch\ny = torch.nn.functional.relu"),
        ("core/a.py", "import typing\nif typing.TYPE_CHECKING:\n    from laconic.pipeline import source"),
        ("pipeline/a.py", "from laconic import __version__\nfrom laconic.quant import gptq"),
        ("quant/_a.py", "from ._b import f\nfrom laconic.core import Pass"),
        ("tasks/a.py", "import torch, numpy as np\ntorch.load('x', weights_only=True)\nnp.load('x')"),
        ("cli.py", "from laconic import doctor\nfrom laconic.report import html"),
        ("__init__.py", "from laconic.pipeline import compress"),
    ],
)
def test_what_is_allowed(tmp_path, file, body):
    assert broken_rules(write(tmp_path, {file: f'"""A module."""\n{body}\n'})) == []
