"""From a card to a record: what is run, what is kept, what is refused; the command line on top."""

from __future__ import annotations

import importlib
import io
import json
import re
from xml.etree import ElementTree

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from laconic.catalog.records import read_record, verdict_of
from laconic.claims import commands, reproduce
from laconic.claims.reproduce import records
from laconic.claims.run import OutOfTime
from laconic.claims.tables import outcome_table, verdict_table
from laconic.errors import BadInput, LaconicError

from .trees import CLAIM, make_tree

HURTS = "def run(arm, seed, quick=False):\n    return -1.0 + 0.01 * seed if arm == 'shift' else 0.02 * (seed % 2)\n"


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    package = make_tree(tmp_path_factory.mktemp("helped"))
    return package, reproduce("shift", package=package)


def test_the_record_says_everything(helped):
    package, outcome = helped
    record = json.loads(outcome.path.read_text())
    assert outcome.path == package.parent / "experiments" / "records" / "shift.json"
    assert record == outcome.record | {"claim": {**CLAIM, "arms": list(CLAIM["arms"])}}
    assert record["verdict"] == outcome.verdict.word == "confirmed"
    assert record["effect"] == pytest.approx(0.5 - 0.1 / 5)  # seeds 0 to 4: -1, 0, 1, -1, 0 tenths
    low, high = record["interval"]
    assert 0.1 < low < record["effect"] < high
    assert [(run["arm"], run["seed"]) for run in record["runs"]] == [
        (a, s) for s in range(5) for a in ("plain", "shift")
    ]
    assert record["command"] == "laconic reproduce shift"
    assert record["machine"]["cores"] and record["versions"]["torch"] and record["commit"] is None
    assert set(record["sources"]) == {"claim", "experiment", "method"}
    assert [path.name for path in sorted(outcome.path.parent.iterdir())] == ["shift.json", "shift.svg"]


def test_the_catalog_reads_the_record(helped):
    package, _ = helped
    assert verdict_of(CLAIM, read_record(package, "shift")) == "confirmed"


def test_the_plot_is_svg_with_every_seed(helped):
    _, outcome = helped
    plot = ElementTree.fromstring(outcome.plot.read_text())
    name = "{http://www.w3.org/2000/svg}"
    assert plot.tag == f"{name}svg" and "confirmed" in plot.get("aria-label", "")
    tips = [title.text for title in plot.iter(f"{name}title")]
    assert len(tips) == 3 * 5 and sum("seed 4:" in tip for tip in tips) == 3
    assert len(list(plot.iter(f"{name}circle"))) == 3 * 5 + 1
    for circle in plot.iter(f"{name}circle"):
        assert 0 < float(circle.get("cx")) < 720 and 70 < float(circle.get("cy")) < 280


def test_a_quick_run_does_not_touch_the_full_record(tmp_path):
    package = make_tree(tmp_path, HURTS)
    full = reproduce("shift", package=package)
    before = full.path.read_bytes(), full.plot.read_bytes()
    quick = reproduce("shift", quick=True, package=package)
    assert (full.path.read_bytes(), full.plot.read_bytes()) == before
    assert quick.path == full.path.parent / "quick" / "shift.json"
    assert quick.record["quick"] and quick.record["seeds"] == 2 and quick.verdict.word == "inconclusive"
    assert full.verdict.word == "refuted" and not full.record["quick"]
    assert "no verdict" in quick.plot.read_text()
    assert records(package=package)[0][1]["verdict"] == "refuted"


def test_lower_is_better_where_the_claim_says_so(tmp_path):
    package = make_tree(tmp_path, HURTS, claim={"direction": "lower"})
    assert reproduce("shift", package=package).verdict.word == "confirmed"


def test_more_seeds_and_another_bound_are_recorded(tmp_path):
    outcome = reproduce("shift", seeds=7, minutes=2.5, threads=1, package=make_tree(tmp_path))
    assert outcome.record["seeds"] == 7 and len(outcome.record["runs"]) == 14
    assert outcome.record["minutes"] == 2.5 and outcome.record["machine"]
    assert outcome.record["command"] == "laconic reproduce shift --seeds 7 --minutes 2.5 --threads 1"


STOPS = """
from pathlib import Path

def run(arm, seed, quick=False):
    with open(Path(__file__).with_suffix(".log"), "a") as log:
        log.write(f"{arm} {seed}\\n")
    if seed == 3 and Path(__file__).with_suffix(".stop").exists():
        raise RuntimeError("stopped")
    return seed + 2.0 * (arm == "shift")
"""


def test_what_is_done_is_kept_for_another_attempt(tmp_path):
    package = make_tree(tmp_path, STOPS)
    folder = tmp_path / "experiments"
    stop, log = folder / "norm" / "shift.stop", folder / "norm" / "shift.log"
    stop.touch()
    with pytest.raises(LaconicError, match="in the run of plain, seed 3: RuntimeError: stopped"):
        reproduce("shift", package=package)
    assert not (folder / "records" / "shift.json").exists()
    stop.unlink()
    ticks = []
    outcome = reproduce("shift", minutes=1, resume=True, progress=lambda *seen: ticks.append(seen), package=package)
    assert outcome.verdict.word == "confirmed" and len(outcome.record["runs"]) == 10
    assert log.read_text().splitlines().count("plain 0") == 1 and log.read_text().splitlines().count("plain 3") == 2
    assert ticks[0] == ("shift", 6, 10) and ticks[-1] == ("shift", 10, 10)
    assert not (folder / "records" / "shift.journal").exists()


def test_time_that_is_over_is_said_with_the_way_on(tmp_path):
    package = make_tree(tmp_path, "import time\n\ndef run(arm, seed, quick=False):\n    time.sleep(600)\n")
    with pytest.raises(OutOfTime, match="0 of 10 runs done.*--resume and more --minutes to go on"):
        reproduce("shift", minutes=0.02, package=package)
    assert not (tmp_path / "experiments" / "records" / "shift.json").exists()


def test_time_of_earlier_attempts_counts(tmp_path):
    package = make_tree(tmp_path, STOPS)
    (tmp_path / "experiments" / "norm" / "shift.stop").touch()
    with pytest.raises(LaconicError, match="stopped"):
        reproduce("shift", package=package)
    journal = tmp_path / "experiments" / "records" / "shift.journal"
    journal.write_text(re.sub(r'"seconds": [^,]+', '"seconds": 11.0', journal.read_text()))
    with pytest.raises(OutOfTime, match="earlier attempts have used the 1 minutes"):
        reproduce("shift", resume=True, package=package)


def test_nothing_is_kept_where_the_experiment_has_changed(tmp_path):
    package = make_tree(tmp_path, STOPS)
    experiment = tmp_path / "experiments" / "norm" / "shift.py"
    experiment.with_suffix(".stop").touch()
    with pytest.raises(LaconicError, match="stopped"):
        reproduce("shift", package=package)
    experiment.with_suffix(".stop").unlink()
    experiment.write_text(experiment.read_text() + "\n# another one\n")
    reproduce("shift", resume=True, package=package)
    assert experiment.with_suffix(".log").read_text().splitlines().count("plain 0") == 2


def test_a_record_of_another_experiment_is_marked(tmp_path):
    package = make_tree(tmp_path)
    assert records(package=package)[0][1:] == (None, [])
    reproduce("shift", package=package)
    assert records(package=package)[0][2] == []
    experiment = tmp_path / "experiments" / "norm" / "shift.py"
    experiment.write_text(experiment.read_text() + "\n# another one\n")
    assert records(package=package)[0][2] == ["experiment"]
    make_tree(tmp_path, None, claim={"margin": 0.2})
    assert records(package=package)[0][2] == ["claim", "experiment", "method"]
    assert "run it again" in shown(verdict_table(records(package=package)), 100)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"id": "shifd"}, "did you mean shift"),
        ({"seeds": 4}, "at least 5 seeds, not 4"),
        ({"seeds": 9, "quick": True}, "leave out either"),
        ({"minutes": 0}, "a positive number, not 0"),
    ],
)
def test_bad_options_are_refused(helped, options, says):
    package, _ = helped
    with pytest.raises(BadInput, match=says):
        reproduce(**{"id": "shift", "package": package, **options})


def test_a_method_without_claim_or_experiment(tmp_path):
    package = make_tree(tmp_path, None)
    with pytest.raises(BadInput, match=re.escape("experiments/norm/shift.py is missing")):
        reproduce("shift", package=package)
    path = package / "norm" / "_shift.py"
    path.write_text(re.sub(r"claim=\{.*\}", "claim=None", path.read_text()))
    with pytest.raises(BadInput, match="shift makes no claim"):
        reproduce("shift", package=package)


def shown(table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 100, 200])
def test_tables_fit_the_terminal(helped, width):
    package, outcome = helped
    for text in (shown(outcome_table(outcome), width), shown(verdict_table(records(package=package)), width)):
        assert max(map(len, text.splitlines())) <= width
        assert "confirmed" in text and "shift" in text
    assert "1 claim: 1 confirmed" in shown(verdict_table(records(package=package)), width)
    assert "not run" in shown(verdict_table([(records(package=package)[0][0], None, [])]), width)


@pytest.fixture
def command(monkeypatch):
    """The command on a dummy tree: gives call(package, *arguments) -> (exit code, standard output, error)."""

    def call(package, *arguments):
        # By path, since the package's function of the same name hides the module.
        monkeypatch.setattr(importlib.import_module("laconic.claims.reproduce"), "PACKAGE", package)
        app = typer.Typer()
        commands.register(app)
        app.command("other")(lambda: None)  # one command alone would not be asked for by its name
        done = CliRunner().invoke(app, ["reproduce", *map(str, arguments)], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return call


def test_json_is_one_line(command, tmp_path):
    package = make_tree(tmp_path)
    code, out, _ = command(package, "shift", "--json")
    assert code == 0 and out.count("\n") == 1 and json.loads(out)["verdict"] == "confirmed"
    code, out, _ = command(package, "--table", "--json")
    assert code == 0 and [(row["id"], row["record"]["verdict"]) for row in json.loads(out)] == [("shift", "confirmed")]
    code, out, _ = command(package, "--table")
    assert code == 0 and "1 claim: 1 confirmed" in out


def test_a_family_goes_on_after_a_failure(command, tmp_path):
    package = make_tree(tmp_path, "def run(arm, seed, quick=False):\n    raise ValueError('no luck')\n", id="ashift")
    make_tree(tmp_path, id="shift")
    stub = package / "norm" / "__init__.pyi"
    (package / "norm" / "_shift.py").write_text((package / "norm" / "_shift.py").read_text().replace("Shift", "Shift2"))
    stub.write_text("from ._ashift import Shift as Shift\nfrom ._shift import Shift2 as Shift2\n")
    code, out, said = command(package, "--family", "norm", "--quiet")
    assert code == 1 and "confirmed" in out and "laconic: ashift:" in said and "no luck" in said
    with pytest.raises(LaconicError, match="no luck"):
        command(package, "ashift", "-q")


def test_the_command_wants_one_thing(command, tmp_path):
    package = make_tree(tmp_path)
    with pytest.raises(BadInput, match="name one method"):
        command(package)
    with pytest.raises(BadInput, match="name one method"):
        command(package, "shift", "--family", "norm")
    with pytest.raises(BadInput, match="no claim of other is known"):
        command(package, "other", "--table")
