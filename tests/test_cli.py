"""The command line: what each command prints, and the codes it ends with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.main import get_command

from laconic import __version__
from laconic.cli import app
from laconic.report.jsonline import KEYS
from tests.pipeline.runs import ROOT, environ, run_cli, save, token_file

COMMANDS = ("compress", "plan", "inspect", "compare", "fetch", "doctor")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("cli") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("data") / "tokens.npz")


def test_json_is_exactly_one_line_with_exactly_the_keys(llama, data, tmp_path, capsys):
    arguments = (
        "compress",
        llama,
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--budget",
        "size=4x",
        "--json",
    )
    code, printed, said = run_cli(capsys, *arguments)
    assert code == 0 and printed.count("\n") == 1 and printed.endswith("}\n"), said
    line = json.loads(printed)
    assert list(line) == list(KEYS) and len(KEYS) == 19
    assert line["out"] == str(tmp_path / "out") and line["size_after"] <= line["size_before"] / 4
    assert None not in (line["metric"], line["drop"], line["latency_before_ms"], line["peak_rss_bytes"])
    assert line["certified"] is None  # no drop was asked for


def test_without_data_figures_of_quality_are_null(llama, tmp_path, capsys):
    _, printed, _ = run_cli(capsys, "compress", llama, "--out", tmp_path / "out", "--json")
    line = json.loads(printed)
    null = {name for name, value in line.items() if value is None}
    assert null == {
        "metric", "value_before", "value_after", "drop", "drop_low", "drop_high", "certified",
        "latency_before_ms", "latency_after_ms",
    }  # fmt: skip


def test_a_table_for_people(llama, tmp_path, capsys):
    code, printed, _ = run_cli(capsys, "compress", llama, "--out", tmp_path / "out", "--quiet")
    assert code == 0 and "report.html" in printed


@pytest.mark.parametrize("arguments", [("plan",), ("compress", "--dry-run", "--out", "OUT")])
def test_a_plan_writes_nothing(llama, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in llama.iterdir())
    code, printed, _ = run_cli(capsys, *arguments, llama, "--budget", "size=5x", "--json")
    found = json.loads(printed)
    assert code == 0 and printed.count("\n") == 1
    assert found["least"] <= found["size_after"] <= found["ceiling"]
    assert all(unit["scheme"] or unit["reason"] for unit in found["units"])
    assert found["peak_rss_estimate"] > 0 and found["seconds_estimate"] > 0
    code, printed, _ = run_cli(capsys, *arguments, llama, "--budget", "size=5x")
    assert code == 0 and "embed_tokens" in printed
    assert list(tmp_path.iterdir()) == [] and sorted(p.name for p in llama.iterdir()) == before


def test_the_plan_of_a_recipe_is_the_recipe(llama, tmp_path, capsys):
    run_cli(capsys, "compress", llama, "--out", tmp_path / "out", "--json", "--budget", "size=4x")
    ledger = json.loads((tmp_path / "out" / "laconic.json").read_text())["ledger"]
    recipe = tmp_path / "out" / "recipe.yaml"
    found = json.loads(run_cli(capsys, "plan", llama, "--recipe", recipe, "--json")[1])
    assert {u["name"]: u["scheme"] for u in found["units"]} == {r["name"]: r["scheme"] for r in ledger}
    assert found["size_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    code, printed, _ = run_cli(capsys, name, "--help")
    assert code == 0 and f"laconic {name}" in printed


def test_all_commands_are_known():
    assert set(get_command(app).commands) == set(COMMANDS)


def test_module_and_script_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "laconic", "--version"],
        cwd=ROOT,
        env=environ(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"laconic {__version__}\n")


def test_starting_is_quick_because_torch_is_not_imported():
    script = "import sys, laconic.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ()).returncode == 0


def test_usage_errors_end_with_2(capsys):
    for arguments in ((), ("compress",), ("compress", "--nonsense"), ("nonsense",)):
        assert run_cli(capsys, *arguments)[0] == 2


def test_compare(llama, data, tmp_path, capsys):
    run_cli(capsys, "compress", llama, "--out", tmp_path / "out", "--json")
    code, printed, _ = run_cli(capsys, "compare", llama, tmp_path / "out", "--data", data, "--json")
    line = json.loads(printed)
    assert code == 0 and line["ratio"] > 3 and line["drop_low"] <= line["drop"] <= line["drop_high"]
    code, printed, _ = run_cli(capsys, "compare", llama, llama, "--data", data, "--quiet")
    assert code == 0 and printed
    code, _, said = run_cli(capsys, "compare", llama, llama)
    assert code == 2 and "pass --data or --task" in said


def test_inspect(llama, capsys):
    code, printed, _ = run_cli(capsys, "inspect", llama, "--json")
    found = json.loads(printed)
    assert code == 0 and sum(u["bytes"] for u in found["units"]) <= found["size_before"]
    unit = next(u for u in found["units"] if u["name"] == "model.layers.0.mlp.up_proj.weight")
    assert unit["macs"] > 0 and unit["ms"] > 0 and unit["outlier_ratio"] > 1
    code, printed, _ = run_cli(capsys, "inspect", llama, "--all")
    assert code == 0 and "layers" in printed
    code, _, said = run_cli(capsys, "inspect")
    assert code == 2 and said.startswith("laconic: ")


def test_doctor(capsys):
    code, printed, _ = run_cli(capsys, "doctor")
    assert code == 0 and "torch" in printed
    code, printed, _ = run_cli(capsys, "doctor", "--json")
    assert code == 0 and all(c["state"] != "failed" for c in json.loads(printed)["checks"])


def test_columns_that_do_not_parse(llama, data, tmp_path, capsys):
    code, _, said = run_cli(
        capsys, "compress", llama, "--data", data, "--columns", "text", "--out", tmp_path / "o", "--quiet"
    )
    assert code == 2 and "write it like text=body" in said
