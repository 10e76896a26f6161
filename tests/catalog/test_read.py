"""Reading cards from source: what is read, and every way in which a file can be wrong, with its line."""

from __future__ import annotations

import pytest

from laconic.catalog import problems, read
from laconic.catalog.source import read_method, read_stub
from laconic.errors import BadInput

from .trees import method, tree

GOOD = {
    "norm/_halve.py": method(
        objects={"Halve": "Layer", "halve_loss": "Loss"},
        body="class Halve:\n    def __init__(self, features: int, *, eps: float = 1e-6, **more):\n        pass\n\n\n"
        "def halve_loss(x, /, y=None, *rest, reduction='mean'):\n    return x",
        more='    composes=("doubles", "gone"),\n',
    ),
    "norm/_common_parts.py": '"""Parts."""\n\nCARD = None\n',
    "optim/_doubles.py": method("doubles", "optim", title="Twice as Much", objects={"Doubles": "Optimizer"}),
}
STUBS = {"norm": "from ._halve import Halve as Halve\nfrom ._halve import halve_loss as halve_loss\n"}


def test_what_is_read(tmp_path):
    catalog = read(tree(tmp_path, GOOD, STUBS))
    assert [found.id for found in catalog] == ["halve", "doubles"]  # by family, as the design lists them
    halve = catalog.get("halve")
    assert halve.signatures == {
        "Halve": "(features, *, eps=1e-06, **more)",
        "halve_loss": "(x, y=None, *rest, reduction='mean')",
    }
    assert halve.equations == ("y = (x - mean) / sqrt(var + eps)        x (N, C)\n\nz = y", "w = z")
    assert halve.about == "`halve`: halves."
    source = (tmp_path / "laconic/norm/_halve.py").read_text().splitlines()
    assert source[halve.line - 1] == "CARD = Card(" and source[halve.lines["Halve"] - 1] == "class Halve:"
    assert [(m.id, name, kind) for m, name, kind in catalog.objects()] == [
        ("halve", "Halve", "Layer"), ("halve", "halve_loss", "Loss"), ("doubles", "Doubles", "Optimizer"),
    ]  # fmt: skip


def test_selection(tmp_path):
    catalog = read(tree(tmp_path, GOOD, STUBS))

    def ids(*given):
        return [found.id for found in catalog.select(*given)]

    assert ids() == ["halve", "doubles"]
    assert ids("HAL") == ["halve"] and ids("twice") == ["doubles"] and ids("*s") == ["doubles", "halve"][::-1]
    assert ids("d*") == ["doubles"] and ids("nothing") == []
    assert ids(None, "optim") == ["doubles"] and ids(None, "NORM") == ["halve"]
    assert ids(None, None, "loss") == ["halve"] and ids(None, "optim", "Loss") == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None, "norms", None), "'norms' is not a family: did you mean norm? there are norm, weight,"),
        ((None, None, "Lyer"), "'Lyer' is not a kind: did you mean layer? there are Layer, Weight,"),
    ],
)
def test_an_unknown_family_or_kind(tmp_path, given, says):
    with pytest.raises(BadInput) as error:
        read(tree(tmp_path, GOOD, STUBS)).select(*given)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("halv", "no method has the id 'halv': did you mean halve?"),
        ("HALVE", "did you mean halve?"),
        ("Doubles", "did you mean doubles?"),
        ("halve_loss", "did you mean halve?"),  # an object leads to its method
        ("zzz", "`laconic methods` lists those that have landed"),
    ],
)
def test_an_unknown_id_and_the_nearest(tmp_path, id, says):
    with pytest.raises(BadInput) as error:
        read(tree(tmp_path, GOOD, STUBS)).get(id)
    assert says in str(error.value)


def line_of(text: str, start: str) -> int:
    """The number of the one line that begins so."""
    (number,) = [i for i, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start)]
    return number


def changed(old: str, new: str, **options) -> str:
    text = method(**options)
    assert old in text
    return text.replace(old, new, 1)


BAD = {
    "no card": ('"""A method."""\n', 1, "no card: end the file with CARD = Card(...), or with CARD = None"),
    "not Python": (method() + "\n)\n", "last", "this is not Python: unmatched ')'"),
    "two cards": (method() + "\nCARD = None\n", "CARD = None", "a second card: the first stands in line"),
    "no call": (
        changed("CARD = Card(", "CARD = dict("),
        "CARD = dict(",
        "CARD must be a call Card(...) or None, found",
    ),
    "positional": (changed('id="halve"', '"halve"'), '"halve",', "Card takes keyword arguments only"),
    "computed": (
        changed("year=2020", "year=2000 + int('20')"),
        "year=",
        "year must be a literal, found 2000 + int('20')",
    ),
    "f-string": (changed('title="On', 'title=f"{1} On'), "title=", "title must be a literal, found f'{1} On Halves'"),
    "name": (changed("objects={'Halve': 'Layer'}", "objects=OBJECTS"), "objects=", "objects must be a literal"),
    "stars": (changed("    year=2020,", "    **{'year': 2020},"), "**{", "a card takes no ** arguments"),
    "unknown": (changed("year=", "yaer="), "yaer=", "a card has no yaer; it has id, title, authors, year,"),
    "twice": (changed("    year=2020,", "    year=2020,\n    year=2021,"), "year=2021", "year stands twice"),
    "missing": (changed("    year=2020,\n", ""), "CARD = Card(", "the card lacks year"),
    "wrong kind": (changed("'Layer'", "'Lair'"), "objects=", "objects: Halve is of kind 'Lair'"),
    "wrong family": (
        changed('family="norm"', 'family="optim"'),
        "family=",
        "the card's family is 'optim', but the file",
    ),
    "wrong id": (
        changed('id="halve"', 'id="half"'),
        "id=",
        "the card's id is 'half', so the file must be called _half.py",
    ),
    "not defined": (method(body="x = 1"), "objects=", "the card offers Halve, which the file does not define"),
    "imported": (
        method(body="from x import Halve"),
        "objects=",
        "the card offers Halve, which the file does not define",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_with_its_line(tmp_path, what):
    text, where, says = BAD[what]
    line = where if isinstance(where, int) else text.count("\n") if where == "last" else line_of(text, where)
    package = tree(tmp_path, {"norm/_halve.py": text}, {"norm": "from ._halve import Halve as Halve\n"})
    with pytest.raises(BadInput) as error:
        read(package)
    assert str(error.value).startswith(f"laconic/norm/_halve.py:{line}: {says}"), error.value


def test_a_duplicate_id(tmp_path):
    package = tree(tmp_path, {"norm/_halve.py": method(), "optim/_halve.py": method(family="optim")})
    (found,) = problems(package)
    line = line_of(method(), "CARD = Card(")
    assert found == f"laconic/optim/_halve.py:{line}: the id 'halve' is taken by laconic/norm/_halve.py:{line}"


def test_a_file_without_an_underscore(tmp_path):
    (found,) = problems(tree(tmp_path, {"norm/halve.py": method()}, {"norm": ""}))
    assert found == "laconic/norm/halve.py:1: a family's files begin with an underscore: call it _halve.py"


def test_a_file_that_is_not_text(tmp_path):
    package = tree(tmp_path, {"norm/_halve.py": method()})
    (package / "norm" / "_bytes.py").write_bytes(b"\xff\xfe")
    (found,) = problems(package)
    assert found == "laconic/norm/_bytes.py:1: this is not UTF-8 at byte 0"


@pytest.mark.parametrize(
    ("stub", "says"),
    [
        ("", "laconic/norm/_halve.py:17: Halve is not in the stub laconic/norm/__init__.pyi: add `from ._halve import"),
        ("from ._other import Halve as Halve\n", "laconic/norm/_halve.py:17: Halve is not in the stub"),
        (
            "from ._halve import Halve as Half\n",
            "laconic/norm/__init__.pyi:1: Halve must be imported under its own name",
        ),
        ("\nfrom ._halve import *\n", "laconic/norm/__init__.pyi:2: * must be imported under its own name"),
        ("import torch\n", "laconic/norm/__init__.pyi:1: a stub holds lines like"),
        ("from laconic.norm._halve import Halve\n", "laconic/norm/__init__.pyi:1: a stub holds lines like"),
        (
            "from ._halve import Halve\nfrom ._b import Halve\n",
            "laconic/norm/__init__.pyi:2: Halve is public already, from",
        ),
        (
            "from ._halve import Halve\nfrom ._b import C\n",
            "laconic/norm/__init__.pyi:2: C comes from _b.py, which is not",
        ),
        ("from ._halve import (\n", "laconic/norm/__init__.pyi:1: this is not Python"),
    ],
)
def test_a_bad_stub(tmp_path, stub, says):
    found = problems(tree(tmp_path, {"norm/_halve.py": method()}, {"norm": stub}))
    assert found[0].startswith(says)


def test_all_that_is_wrong_is_counted(tmp_path):
    package = tree(tmp_path, {"norm/_a.py": '"""A."""\n', "norm/_b.py": '"""B."""\n', "norm/_halve.py": method()})
    assert len(problems(package)) == 2
    with pytest.raises(BadInput, match=r"_a\.py:1: no card.*\(and 1 more: `laconic methods --check` names all\)"):
        read(package)


def test_a_part_is_no_method(tmp_path):
    package = tree(tmp_path, {"norm/_parts.py": '"""Parts."""\n\nCARD = None\n'})
    assert read_method(package / "norm" / "_parts.py") is None
    assert problems(package) == [] and len(read(package)) == 0


@pytest.mark.parametrize(
    ("body", "signature"),
    [
        ("class Halve:\n    pass", "()"),
        ("class Halve(nn.Module):\n    pass", "()"),
        ("class Halve(torch.optim.SGD):\n    pass", ""),
        ("class Base:\n    def __init__(self, a, b=2):\n        pass\n\n\nclass Halve(Base):\n    pass", "(a, b=2)"),
        ("@dataclass(frozen=True)\nclass Halve:\n    a: int\n    b: float = 0.5", "(a, b=0.5)"),
        ("@dataclass\nclass Halve:\n    a: int\n    id: ClassVar[str] = 'halve'", "(a)"),
        ("class Halve(NamedTuple):\n    a: int", "(a)"),
        ("def Halve(*args, key=1):\n    pass", "(*args, key=1)"),
        ("Halve = make()", ""),
    ],
)
def test_signatures(tmp_path, body, signature):
    package = tree(tmp_path, {"norm/_halve.py": method(body=body)}, {"norm": "from ._halve import Halve as Halve\n"})
    assert read(package).get("halve").signatures["Halve"] == signature


def test_a_stub_as_families_write_it(tmp_path):
    path = tmp_path / "__init__.pyi"
    path.write_text('"""Words."""\n# more\nfrom ._a import A as A\nfrom ._b import b\n')
    assert read_stub(path) == {"A": ("_a", 3), "b": ("_b", 4)}
