"""Blame finds what was spoiled, prices it, and repair gives it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import laconic
from laconic.errors import BadInput
from laconic.nn import packed_specs
from laconic.pipeline.blame import BACK, blame, repair
from laconic.pipeline.compress import compress
from tests.pipeline.runs import run_cli, save, token_file

SPOILED = "model.layers.1.mlp.down_proj.weight"
FINE, COARSE = "v1/int8/channel/float16/minmax/znone/nearest", "v1/int2/channel/float16/minmax/znone/nearest"


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Artifact, float model and data: everything at 8 bits, and one matrix at 2."""
    at = tmp_path_factory.mktemp("blame")
    model, data = save("llama", at / "float"), token_file(at / "tokens.npz")
    names = [n for n, p in AutoModelForCausalLM.from_pretrained(model).named_parameters() if "proj" in n]
    units = "\n".join(f"    {name}: {COARSE if name == SPOILED else FINE}" for name in names)
    recipe = at / "recipe.yaml"
    recipe.write_text(f"passes:\n- pass: quantize\n  method: rtn\n  units:\n{units}\n")
    compress(model, data, "size=1.5x", recipe=recipe, out=at / "out")
    return at / "out", model, data


def test_the_spoiled_matrix_is_found_and_priced(spoiled: Any) -> None:
    artifact, model, data = spoiled
    record = blame(artifact, data, model=model, most=2)
    worst = record["culprits"][0]
    assert worst["name"] == SPOILED and worst["bits"] == 2
    assert worst["share"] > 0.8 and worst["repair"]["share"] >= BACK * worst["share"]
    assert 2 < worst["repair"]["bits"] <= 8 and worst["repair"]["bytes"] > 0
    assert record["sentences"][0].startswith(f"{SPOILED} to {worst['repair']['bits']:g} bits: +")
    assert record["measured"] < 4 * record["packed"], "bisection, and not one by one"
    json.dumps(record)
    # The same figures again.
    assert blame(artifact, data, model=model, most=2)["culprits"] == record["culprits"]


def test_repair_gives_it_back(spoiled: Any, tmp_path: Path) -> None:
    artifact, model, data = spoiled
    before = blame(artifact, data, model=model, most=1)
    result = repair(artifact, data, model=model, most=1, out=tmp_path / "out")
    assert list(result.record["repaired"]) == [SPOILED]
    after = blame(result.out, data, model=model, most=1)
    assert after["distance"] < 0.4 * before["distance"]
    found, were = (packed_specs(laconic.load(folder)) for folder in (result.out, artifact))
    assert {name for name in were if str(were[name].scheme) != str(found[name].scheme)} == {SPOILED}
    assert after["size"] - before["size"] == pytest.approx(before["culprits"][0]["repair"]["bytes"], abs=64)


def test_repair_by_hand(spoiled: Any, tmp_path: Path) -> None:
    artifact, model, data = spoiled
    other = SPOILED.replace("down", "up")
    result = repair(artifact, data, model=model, changes={SPOILED: "4", other: None}, out=tmp_path / "out")
    assert result.record["repaired"] == {SPOILED: COARSE.replace("int2", "int4"), other: None}
    specs = packed_specs(laconic.load(result.out))
    assert specs[SPOILED].scheme.bits == 4 and other not in specs


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"changes": {"no.such.weight": "8"}}, "no.such.weight is no parameter"),
        ({"changes": {SPOILED: "9"}}, f"{SPOILED}: "),
        ({"changes": {SPOILED: "v1/int4"}}, f"{SPOILED}: "),
        ({"within": "10B"}, "no repair fits within that"),
        ({"most": 0}, "at least one culprit"),
    ],
)
def test_bad_repairs_are_refused(spoiled: Any, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    artifact, model, data = spoiled
    with pytest.raises(BadInput, match=said):
        repair(artifact, data, model=model, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_blamed_is_refused(spoiled: Any, tmp_path: Path) -> None:
    artifact, model, data = spoiled
    with pytest.raises(BadInput, match="is no artifact"):
        blame(model, data)
    with pytest.raises(BadInput, match="pass --data or --task"):
        blame(artifact)
    other = tmp_path / "other"
    config = AutoConfig.from_pretrained(model)
    config.intermediate_size *= 2
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(BadInput, match="is not that of"):
        blame(artifact, data, model=other)


def test_by_the_command_line(spoiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, model, data = map(str, spoiled)
    code, out, _ = run_cli(capsys, "blame", artifact, "--model", model, "--data", data, "--most", "1")
    assert code == 0 and SPOILED in out.replace("\n", "") and "of the distance at 2 bits" in out
    code, out, err = run_cli(
        capsys,
        "repair",
        artifact,
        "--model",
        model,
        "--data",
        data,
        "--change",
        f"{SPOILED}=8",
        "--out",
        str(tmp_path / "a"),
        "--json",
    )
    assert code == 0 and len(out.splitlines()) == 1 and json.loads(out)["ratio"] > 1
    code, _, err = run_cli(capsys, "repair", artifact, "--data", data, "--change", "what", "--out", str(tmp_path / "b"))
    assert code == 2 and "--change 'what' does not parse" in err
