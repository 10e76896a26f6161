"""The command line: what each command prints, and the codes it ends with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.main import get_command

from laconic import __version__
from laconic.cli import app
from laconic.report.jsonline import KEYS
from tests.pipeline.runs import ROOT, environ, run_cli, save, token_file

COMMANDS = (
    "compress", "plan", "examine", "inspect", "calibrate-confidence", "blame", "repair", "compare", "normalize", "run",
    "export", "fetch", "doctor",
)  # fmt: skip
CATALOG = ("methods", "show", "find", "new", "reproduce", "bench")


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
    assert code == 0 and "report.html" in printed.replace("\n", "")  # a long path is folded


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


@pytest.mark.parametrize("name", COMMANDS + CATALOG)
def test_every_command_has_help(name, capsys):
    code, printed, _ = run_cli(capsys, name, "--help")
    assert code == 0 and f"laconic {name}" in printed


def test_all_commands_are_known():
    assert set(get_command(app).commands) == set(COMMANDS + CATALOG)


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
    on_cpu = run_cli(capsys, "compare", llama, llama, "--data", data, "--device", "cpu", "--json")
    assert on_cpu[0] == 0 and json.loads(on_cpu[1])["drop"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("LLAMA", "LLAMA"), "pass --data or --task"),
        (("LLAMA", "nowhere", "--data", "DATA"), "nowhere is neither a folder"),
        (("LLAMA", "LLAMA", "--data", "nowhere.txt"), "nowhere.txt is no data: there is no such file"),
        (("LLAMA", "LLAMA", "--task", "chess"), "chess is no data"),
        (("LLAMA", "LLAMA", "--data", "DATA", "--task", "tiny-lm"), "both data and a task were named"),
        (("LLAMA", "LLAMA", "--data", "DATA", "--device", "abacus"), "'abacus' is not a device: name one as cpu"),
        (("LLAMA", "LLAMA", "--data", "DATA", "--device", "meta"), "the device meta holds no values"),
        (("OUT", "OUT", "--data", "DATA"), "both models are artifacts"),
        (("LLAMA", "tests.test_cli:fails", "--data", "DATA"), "in child: ValueError: not today"),
        (("LLAMA", "HOLLOW", "--data", "DATA"), "laconic.json lacks its version"),
    ],
)
def test_compare_bad_input(llama, data, tmp_path, capsys, arguments, says):
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "laconic.json").write_text("{}")
    if "OUT" in arguments:
        run_cli(capsys, "compress", llama, "--out", tmp_path / "out", "--json")
    known = {"LLAMA": llama, "DATA": data, "OUT": tmp_path / "out", "HOLLOW": hollow}
    code, printed, said = run_cli(capsys, "compare", *(known.get(a, a) for a in arguments), "--json")
    assert (code, printed) == (2, "")
    assert said.startswith("laconic: ") and says in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_compare_on_a_gpu_that_is_not_there(llama, data, capsys):
    code, _, said = run_cli(capsys, "compare", llama, llama, "--data", data, "--device", "cuda", "--json")
    assert code == 2 and said.startswith("laconic: the device cuda is not usable here: ")


def test_inspect(llama, capsys):
    code, printed, _ = run_cli(capsys, "inspect", llama, "--json")
    found = json.loads(printed)
    assert code == 0 and sum(u["bytes"] for u in found["units"]) <= found["size_before"]
    unit = next(u for u in found["units"] if u["name"] == "model.layers.0.mlp.up_proj.weight")
    assert unit["macs"] > 0 and unit["ms"] > 0 and unit["outlier_ratio"] > 1
    code, printed, _ = run_cli(capsys, "inspect", llama, "--all")
    assert code == 0 and "layers" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no model was named: give a folder"),
        (("nowhere",), "nowhere is neither a folder, nor one of the names"),
        (("--task", "chess"), "chess is not one of the tasks minilm-bbc, cifar-cnn"),
        (("LLAMA", "--task", "tiny-lm"), "both a model and a task were named"),
        (("tests.test_cli:fails",), "Fails: its forward fails on the example inputs: ValueError: not today"),
        (("tests.test_cli:COMMANDS",), "tests.test_cli:COMMANDS"),
    ],
)
def test_inspect_bad_input(llama, capsys, arguments, says):
    code, printed, said = run_cli(capsys, "inspect", *(llama if a == "LLAMA" else a for a in arguments), "--json")
    assert (code, printed) == (2, "")
    assert said.startswith("laconic: ") and says in said and said.count("\n") == 1


class Fails(nn.Module):
    """Its forward always fails, in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.child.register_forward_pre_hook(_not_today)

    def forward(self, input_ids):
        return self.child(input_ids.float())


def _not_today(module, inputs):
    raise ValueError("not today")


def fails():
    return Fails(), torch.zeros(2, 4)


def broken():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, :2] = torch.tensor([float("nan"), float("inf")])
    return model, torch.zeros(2, 4)


def test_inspect_shows_broken_weights_and_stays_json(capsys):
    def not_in_json(name):
        raise AssertionError(f"{name} is no JSON")

    code, printed, _ = run_cli(capsys, "inspect", "tests.test_cli:broken", "--json")
    found = json.loads(printed, parse_constant=not_in_json)
    assert code == 0 and "weight holds 1 NaN and 1 infinite values" in found["notes"][0]
    assert {u["name"]: u["outlier_ratio"] is None for u in found["units"]} == {"weight": True, "bias": False}


def test_doctor(capsys):
    code, printed, _ = run_cli(capsys, "doctor")
    assert code == 0 and "torch" in printed
    code, printed, _ = run_cli(capsys, "doctor", "--json")
    assert code == 0 and all(c["state"] != "failed" for c in json.loads(printed)["checks"])


@pytest.mark.parametrize("cache", ["", "a/file", "a/file/below", "not/there", "link"])
def test_doctor_with_a_cache_that_cannot_be_one(cache, tmp_path, capsys, monkeypatch):
    """Whatever LACONIC_CACHE says, the doctor tells and never raises."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / cache) if cache else "")
    code, printed, said = run_cli(capsys, "doctor", "--json")
    found = json.loads(printed)
    assert (code, said) == (0, "") and printed.count("\n") == 1
    assert set(found["cache"]) in ({"folder", "writable", "bytes", "fetched"}, {"error"})


def test_doctor_usage(capsys):
    assert run_cli(capsys, "doctor", "now")[0] == 2
    assert run_cli(capsys, "doctor", "--fix")[0] == 2


def test_columns_that_do_not_parse(llama, data, tmp_path, capsys):
    code, _, said = run_cli(
        capsys, "compress", llama, "--data", data, "--columns", "text", "--out", tmp_path / "o", "--quiet"
    )
    assert code == 2 and "write it like text=body" in said
