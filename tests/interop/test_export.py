"""`laconic export` on the command line: what it prints, and what it says of bad inputs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
from laconic.core.record import FOLD_AFFINE
from laconic.numerics import Scheme
from tests.interop.models import drawn, logits, off, rounded_to
from tests.pipeline.artifacts import rounded
from tests.pipeline.runs import run_cli, token_file

pytest.importorskip("transformers")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
INT4 = "v1/int4/group32/float16/minmax/znone/nearest"
IDS = [3, 17, 5, 90, 9]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return rounded_to(drawn(**SMALL), tmp_path_factory.mktemp("export") / "artifact", INT4)


def test_a_line_of_json_and_a_line_of_text(artifact, tmp_path, capsys):
    code, printed, said = run_cli(capsys, "export", artifact, "--to", "gguf", "--out", tmp_path / "a.gguf", "--json")
    found = json.loads(printed)
    assert code == 0 and printed.count("\n") == 1, said
    assert list(found) == ["model", "to", "out", "bytes", "types", "exact", "notes"]
    assert found["types"] == {"Q4_0": 9} and found["exact"] and found["bytes"] == (tmp_path / "a.gguf").stat().st_size
    code, printed, said = run_cli(capsys, "export", artifact, "--to", "gguf", "--out", tmp_path / "b.gguf")
    assert code == 0 and "matrices: 9 Q4_0; all values kept" in printed and "no tokenizer.json was found" in said


def test_one_form_becomes_another(artifact, tmp_path, capsys):
    """From an artifact over GGUF and compressed-tensors to GPTQ, with the same numbers at the end."""
    steps = [("gguf", "m.gguf"), ("compressed-tensors", "ct"), ("gptq", "gptq")]
    before = artifact
    for to, name in steps:
        code, _, said = run_cli(capsys, "export", before, "--to", to, "--out", tmp_path / name)
        assert code == 0, said
        before = tmp_path / name
    assert off(logits(laconic.load(before), IDS), logits(laconic.load(artifact), IDS)) < 1e-5
    config = json.loads((before / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 4 and config["group_size"] == 32 and config["sym"] and not config["desc_act"]
    assert load_file(before / "model.safetensors")["model.layers.0.mlp.up_proj.qweight"].shape == (8, 96)


def test_a_gguf_file_is_compared_with_its_artifact(artifact, tmp_path, capsys):
    run_cli(capsys, "export", artifact, "--to", "gguf", "--out", tmp_path / "m.gguf")
    data = token_file(tmp_path / "tokens.npz", rows=12)
    code, printed, said = run_cli(capsys, "compare", artifact, tmp_path / "m.gguf", "--data", data, "--json")
    assert code == 0, said
    assert abs(json.loads(printed)["drop"]) < 1e-3


def test_what_is_written_over(artifact, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("export", artifact, "--to", "compressed-tensors", "--out", out)
    assert run_cli(capsys, *arguments)[0] == 0
    code, _, said = run_cli(capsys, *arguments)
    assert code == 2 and "exists; name another place or pass --overwrite" in said
    assert run_cli(capsys, *arguments, "--overwrite")[0] == 0
    assert not (tmp_path / "out.partial").exists()


def test_five_bad_inputs(artifact, tmp_path, capsys):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    module = rounded(torch.nn.Sequential(torch.nn.Linear(32, 8)), tmp_path / "module", Scheme.parse(INT4))
    for arguments, says in [
        ((artifact, "--to", "ggml", "--out", tmp_path / "x"), "there is no form 'ggml': one of gguf"),
        ((artifact, "--to", "gguf", "--out", tmp_path / "no" / "x.gguf"), "is not there: make the folder first"),
        (
            (artifact, "--to", "gptq", "--out", tmp_path / "papers", "--overwrite"),
            "it is no model and is not overwritten",
        ),
        ((artifact, "--to", "onnx", "--out", tmp_path / "x.onnx", "--exact"), "--exact and --floats belong to gguf"),
        ((artifact, "--to", "gguf", "--out", tmp_path / "x.gguf", "--floats", "Q3"), "floats='Q3': one of F32"),
        ((artifact, "--to", "bnb-nf4", "--out", tmp_path / "x"), "the form bnb-nf4 holds none of the model's layers"),
        (
            (tmp_path / "broken.gguf", "--to", "gptq", "--out", tmp_path / "x"),
            "ends at byte 8, in the middle of a value",
        ),
        ((module, "--to", "gguf", "--out", tmp_path / "x.gguf"), "--into"),
        ((tmp_path / "nowhere", "--to", "gguf", "--out", tmp_path / "x.gguf"), "is neither a folder"),
    ]:
        code, printed, said = run_cli(capsys, "export", *arguments)
        assert code == 2 and says in said and said.count("\n") == 1 and not printed, (arguments, said)
    assert (tmp_path / "papers" / "thesis.txt").exists() and not (tmp_path / "x.gguf").exists()


def test_rewritten_norms_have_no_place_in_a_class_of_others(artifact, tmp_path, capsys):
    folder = shutil.copytree(artifact, tmp_path / "folded")
    manifest, config = (json.loads((folder / name).read_text()) for name in ("laconic.json", "config.json"))
    fold = {"action": FOLD_AFFINE, "path": "model.layers.0.input_layernorm", "layers": [], "becomes": "nothing"}
    manifest["records"].append(fold)
    config["quantization_config"]["records"].append(fold)
    (folder / "laconic.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, _, said = run_cli(capsys, "export", folder, "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert code == 2 and "input_layernorm was rewritten (fold_affine)" in said and "export to onnx or torch" in said
