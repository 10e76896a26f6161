"""`laconic new`: every kind's skeleton lints, is in the catalog, passes test and contract; and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from laconic.catalog import read
from laconic.catalog.new import TEMPLATES, create, object_name, with_line
from laconic.core.card import KINDS
from laconic.errors import BadInput
from laconic.testing import check

from .trees import source_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A source tree with a new method of every kind, all in one family."""
    root = source_tree(tmp_path_factory.mktemp("checkout"))
    for kind in KINDS:
        create(f"try_{kind.lower()}", kind, "zoo", root)
    return root


def load(path: Path, name: str):
    """A file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def landed(grown, monkeypatch):
    """Load a skeleton's test, with the skeleton standing in laconic.zoo as it would after `laconic new`."""
    import laconic.zoo

    def land(kind: str):
        id = f"try_{kind.lower()}"
        monkeypatch.setitem(sys.modules, f"laconic.zoo._{id}", None)
        method = load(grown / "laconic" / "zoo" / f"_{id}.py", f"laconic.zoo._{id}")
        name = object_name(id, kind)
        monkeypatch.setitem(vars(laconic.zoo), name, getattr(method, name))
        return load(grown / "tests" / "zoo" / f"test_{id}.py", f"test_{id}")

    return land


def test_all_are_in_the_catalog(grown):
    catalog = read(grown / "laconic")
    assert len(catalog) == len(KINDS)
    assert {kind for _, _, kind in catalog.objects()} == set(KINDS)
    assert all(found.card.claim is not None and "TODO" in found.card.title for found in catalog)
    assert all(found.equations and found.about for found in catalog)


def test_all_lint(grown):
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--config", ROOT / "pyproject.toml"]
    # In the real tree ruff finds that for itself.
    ruff += ["--config", 'lint.isort.known-first-party=["laconic"]']
    folders = [grown / "laconic" / "zoo", grown / "tests", grown / "experiments"]
    ran = subprocess.run([*ruff, *folders], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_skeleton_keeps_its_contract(grown, landed, kind):
    examples = landed(kind).EXAMPLES
    card = read(grown / "laconic").get(f"try_{kind.lower()}").card
    assert {example.title(): example.kind for example in examples} == card.objects
    assert all(set(example.traits) == set(card.traits.get(example.title(), ())) for example in examples)
    for example in examples:
        report = check(example)
        assert report.ok and report.passed and not report.expected, str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_the_skeleton_passes_its_own_test(landed, kind):
    module = landed(kind)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for one in tests:
        one()


@pytest.mark.parametrize("kind", KINDS)
def test_the_experiment_runs(grown, landed, kind):
    landed(kind)
    id = f"try_{kind.lower()}"
    module = load(grown / "experiments" / "zoo" / f"{id}.py", f"experiment_{id}")
    for arm in ("baseline", "method"):
        assert isinstance(module.run(arm, 0, quick=True), float)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ("2Dmse", "Layer", "norm"),
            "'2Dmse' cannot be an id: it must be a lower-case Python identifier; dmse would do",
        ),
        (("pb-llm", "Layer", "norm"), "pb_llm would do"),
        (("class", "Layer", "norm"), "'class' cannot be an id"),
        (("halves", "Lyer", "norm"), "'Lyer' is not a kind: did you mean layer?"),
        (("halves", "Layer", "normal"), "'normal' is not a family: did you mean norm?"),
    ],
)
def test_what_is_refused(tmp_path, given, says):
    root = source_tree(tmp_path)
    before = sorted(root.rglob("*"))
    with pytest.raises(BadInput) as error:
        create(*given, root)
    assert says in str(error.value)
    assert sorted(root.rglob("*")) == before


def test_what_is_taken_is_refused(tmp_path):
    root = source_tree(tmp_path)
    written = create("halves", "layer", "norm", root)
    assert [path.relative_to(root).as_posix() for path in written] == [
        "laconic/norm/_halves.py", "tests/norm/test_halves.py", "experiments/norm/halves.py",
        "laconic/norm/__init__.pyi",
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"the id 'halves' is taken: laconic/norm/_halves\.py is"):
        create("halves", "Layer", "optim", root)
    with pytest.raises(BadInput, match=r"laconic\.norm has a Halves already, from _halves\.py"):
        create("hal_ves".replace("_", "") + "_", "Layer", "norm", root)
    (root / "tests" / "optim").mkdir()
    (root / "tests" / "optim" / "test_doubles.py").write_text("mine\n")
    with pytest.raises(BadInput, match=r"tests/optim/test_doubles\.py is there already"):
        create("doubles", "Layer", "optim", root)
    assert not (root / "laconic" / "optim" / "_doubles.py").exists()


def test_outside_of_a_source_tree(tmp_path):
    with pytest.raises(BadInput, match="lies in no source tree of laconic"):
        create("halves", "Layer", "norm", tmp_path)


def test_from_a_folder_within(tmp_path):
    root = source_tree(tmp_path)
    create("halves", "Layer", "norm", root / "laconic" / "norm")
    assert (root / "experiments" / "norm" / "halves.py").is_file()


def test_the_line_in_the_stub():
    stub = "# words\nfrom ._a import A as A\nfrom ._c import C as C\nfrom ._c import c as c\n"
    assert with_line(stub, "_b", "B").splitlines()[2] == "from ._b import B as B"
    assert with_line(stub, "_d", "D").splitlines()[-1] == "from ._d import D as D"
    assert with_line("", "_d", "D") == "from ._d import D as D\n"


def test_every_kind_has_a_template():
    assert {path.name for path in TEMPLATES.iterdir()} == {kind.lower() for kind in KINDS}
