"""What the catalog prints, on a narrow and on a wide terminal: nothing lost, no line too long."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from laconic.catalog import read
from laconic.catalog.find import Hit
from laconic.catalog.records import read_record, verdict_of
from laconic.catalog.tables import hits_table, method_card, methods_table
from laconic.errors import BadInput

from .trees import method, tree

WIDTHS = pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
CLAIM = """    use="Where halves are wanted.",
    avoid="Where they are not.",
    composes=("training_free_rnn_transformer", "gone"),
    vectors=("halve",),
    code="doe/halves, MIT",
    traits={"Halve": ("folds",)},
    claim={
        "text": "Halves are better.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("whole", "halved"),
        "seeds": 5,
        "minutes": 3,
        "task": "digits",
    },
"""
FILES = {
    "norm/_halve.py": method(
        more=CLAIM, body="class Halve:\n    def __init__(self, num_features, *, eps=1e-6, momentum=0.1):\n        pass"
    ),
    "search/_training_free_rnn_transformer.py": method(
        "training_free_rnn_transformer", "search", title="Training-free",
        summary="Ranks networks without training them.",
        objects={"Rank": "Search", "RankProbe": "Probe"},
    ),
}  # fmt: skip


@pytest.fixture
def catalog(tmp_path):
    return read(tree(tmp_path, FILES))


def lines(renderable, width: int) -> list[str]:
    console = Console(width=width, color_system=None, record=True, file=StringIO())
    console.print(renderable)
    found = console.export_text().splitlines()
    assert max(map(len, found)) <= width
    return [line.rstrip() for line in found]


@WIDTHS
def test_the_list(catalog, width):
    found = lines(methods_table(list(catalog), {"halve": "confirmed", "training_free_rnn_transformer": "none"}), width)
    text = " ".join(" ".join(found).split())
    for part in ("norm", "halve", "Halves what comes in.", "search", "training_free_rnn_transformer", "Search, Probe"):
        assert part in text
    assert "confirmed" in text and "none" not in text
    assert found[-1] == "2 methods"


def test_a_wide_list_has_columns_and_a_narrow_one_blocks(catalog):
    verdicts = dict.fromkeys(catalog.methods, "not run")
    wide = lines(methods_table(list(catalog), verdicts), 200)
    assert wide[0].split() == ["family", "id", "kinds", "year", "claim", "what", "it", "does"]
    assert wide[1].split() == ["norm", "halve", "Layer", "2020", "not", "run", "Halves", "what", "comes", "in."]
    narrow = lines(methods_table(list(catalog), verdicts), 60)
    assert narrow[:3] == ["norm", "  halve  Layer, 2020 · claim not run", "    Halves what comes in."]


def test_an_empty_list():
    assert lines(methods_table([], {}), 60) == ["0 methods"]


@WIDTHS
def test_a_method(catalog, width):
    found = lines(method_card(catalog.get("halve"), catalog, ["Halve", "halve"], None), width)
    text = " ".join(" ".join(found).split())
    for part in (
        "On Halves", "Doe, Roe, 2020, arXiv 0000.00000", "Halves what comes in.", "Where halves are wanted.",
        "Where they are not.", "gone (not landed)", "folds", "doe/halves, MIT", "laconic reproduce halve",
        "y = (x - mean) / sqrt(var + eps)", "x (N, C)", "w = z", "Besides laconic.norm.halve",
    ):  # fmt: skip
        assert part in text, part
    signature = "laconic.norm.Halve(num_features,*,eps=1e-06,momentum=0.1)"
    assert signature in "".join(text.split())
    claim = "halved against whole, accuracy, higher by at least 0.005, 5 seeds, 3 minutes at most."
    assert claim in text


def test_equations_break_at_wide_gaps(catalog):
    found = lines(method_card(catalog.get("halve"), catalog, [], None), 44)
    assert "    y = (x - mean) / sqrt(var + eps)" in found and "        x (N, C)" in found


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"verdict": "confirmed", "sentence": "confirmed: better by 0.02 (5 seeds)"},
            "confirmed: better by 0.02 (5 seeds)",
        ),
        ({"verdict": "refuted"}, "refuted"),
        ({}, "not run: laconic reproduce halve"),
        (None, "not run: laconic reproduce halve"),
    ],
)
def test_the_record(catalog, record, says):
    found = lines(method_card(catalog.get("halve"), catalog, [], record), 120)
    (line,) = [line for line in found if line.startswith("Record")]
    assert line.split(maxsplit=1)[1] == says


def test_no_claim_no_record(catalog):
    found = lines(method_card(catalog.get("training_free_rnn_transformer"), catalog, [], {"verdict": "confirmed"}), 80)
    assert not [line for line in found if line.startswith(("Claim", "Record", "Vectors", "Use it"))]


@WIDTHS
def test_hits(catalog, width):
    text = " ".join(lines(hits_table([Hit(method, 0.1) for method in catalog], "by words"), width))
    assert "halve" in text and "Where halves are wanted." in " ".join(text.split()) and text.endswith("by words")


def test_reading_a_record(catalog):
    folder = catalog.package.parent / "experiments" / "records"
    assert read_record(catalog.package, "halve") is None
    folder.mkdir(parents=True)
    (folder / "halve.json").write_text(json.dumps({"verdict": "inconclusive"}))
    record = read_record(catalog.package, "halve")
    assert verdict_of({}, record) == "inconclusive"
    assert verdict_of({}, None) == "not run" and verdict_of(None, record) == "none"
    (folder / "halve.json").write_text("{\n,")
    with pytest.raises(BadInput, match=r"halve\.json:2: this record is not JSON: run `laconic reproduce halve`"):
        read_record(catalog.package, "halve")
