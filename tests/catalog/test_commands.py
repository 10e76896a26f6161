"""The catalog's commands: what they print and the codes they end with."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from laconic.catalog import commands
from laconic.errors import BadInput

from .trees import method, source_tree, tree


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command on a small tree; what is raised on purpose is raised."""
    package = tree(tmp_path, {"norm/_halve.py": method(), "optim/_doubles.py": method("doubles", "optim")})
    monkeypatch.setattr(commands, "PACKAGE", package)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / "cache"))
    app = typer.Typer()
    commands.register(app)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, BadInput):
            raise result.exception
        return result

    return invoke


def test_methods(run):
    printed = run("methods").stdout
    assert "halve" in printed and "doubles" in printed and "2 methods" in printed
    assert "doubles" not in run("methods", "hal*").stdout
    assert "halve" not in run("methods", "--family", "optim").stdout


def test_methods_as_json_is_one_line(run):
    printed = run("methods", "--kind", "layer", "--json").stdout
    assert printed.count("\n") == 1
    first = json.loads(printed)[0]
    assert first["id"] == "halve" and first["objects"] == {"Halve": "Layer"} and first["verdict"] == "none"
    assert first["file"] == "laconic/norm/_halve.py" and first["kinds"] == ["Layer"]


def test_show(run):
    assert "laconic.norm.Halve()" in run("show", "halve").stdout
    found = json.loads(run("show", "halve", "--json").stdout)
    assert found["signatures"] == {"Halve": "()"} and found["record"] is None
    assert found["equations"][1] == "w = z" and found["public"] == ["Halve"]


def test_find(run):
    printed = run("find", "halves", "--words").stdout
    assert printed.startswith("halve") and printed.endswith("by words\n")
    found = json.loads(run("find", "halves", "--words", "--limit", 1, "--json").stdout)
    assert found["how"] == "by words" and [hit["id"] for hit in found["hits"]] == ["halve"]


def test_check_names_all(run, monkeypatch, tmp_path):
    assert run("methods", "--check").exit_code == 0
    package = tree(tmp_path / "bad", {"norm/_a.py": '"""A."""\n', "norm/_b.py": '"""B."""\n'})
    monkeypatch.setattr(commands, "PACKAGE", package)
    result = run("methods", "--check")
    assert result.exit_code == 2
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        "laconic/norm/_a.py:1",
        "laconic/norm/_b.py:1",
    ]
    with pytest.raises(BadInput, match=r"laconic/norm/_a\.py:1: no card.*and 1 more"):
        run("methods")


def test_new(run, tmp_path):
    root = source_tree(tmp_path / "checkout")
    printed = run("new", "thirds", "--kind", "loss", "--family", "distill", "--root", root).stdout
    assert (
        "laconic/distill/_thirds.py" in printed.replace("\n", "") and (root / "tests/distill/test_thirds.py").is_file()
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "halv"), "did you mean halve"),
        (("methods", "--kind", "Lair"), "'Lair' is not a kind"),
        (("find", " "), "the text to find is empty"),
        (("new", "halve", "--kind", "Layer", "--family", "nrom"), "did you mean norm"),
    ],
)
def test_bad_input(run, arguments, says):
    with pytest.raises(BadInput, match=says):
        run(*arguments)
