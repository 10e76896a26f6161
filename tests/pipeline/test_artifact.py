"""What an artifact holds, what is refused by its message, and `read.py` with numpy alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from laconic.core.record import FOLD, PACK, Record, apply_records
from laconic.errors import BadInput
from laconic.nn import unpack_parameter
from laconic.numerics import Binary, Int, Levels, Scale, Scheme, Ternary
from laconic.pipeline.artifact import read_manifest, structural, write_artifact_files
from laconic.pipeline.source import resolve
from tests.pipeline.artifacts import round_records, rounded, write_artifact
from tests.zoo import ZOO

pytest.importorskip("transformers")

# Every width, granularity, scale type and kind of zero point at least once; groups that do not divide.
SCHEMES = [
    Scheme(Int(bits), Scale(share, group=32 if share == "group" else None, dtype=dtype), zero=zero)
    for bits, share, dtype, zero in (
        (8, "channel", "float32", "none"),
        (7, "group", "bfloat16", "int"),
        (6, "group", "float16", "real"),
        (5, "tensor", "float16", "int"),
        (4, "group", "float16", "none"),
        (3, "group", "float16", "int"),
        (2, "tensor", "float32", "real"),
        (2, "channel", "bfloat16", "int"),
    )
]
CODEBOOKS = [
    Scheme(Levels("nf4"), Scale("group", group=32, dtype="float16")),
    Scheme(Levels("fp4"), Scale("tensor", dtype="bfloat16")),
    Scheme(Ternary(), Scale("channel", dtype="float16", rule="absmean")),
    Scheme(Ternary(), Scale("group", group=32, dtype="float32", rule="mse")),
    Scheme(Binary(), Scale("group", group=10, dtype="float16", rule="absmean")),
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return rounded(ZOO["gpt2"].build(), tmp_path_factory.mktemp("gpt2") / "out")


@pytest.fixture
def copied(gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(gpt2, tmp_path / "out"))


def edit(file: Path, change) -> None:
    """Apply `change` to a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# --- what is written ----------------------------------------------------------------------------------------


def test_files(gpt2):
    assert {file.name for file in gpt2.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "laconic.json", "read.py",
        "recipe.yaml",
    }  # fmt: skip
    manifest = read_manifest(gpt2, verify=True)
    assert manifest.model["kind"] == "transformers"
    assert manifest.model["class"].endswith("modeling_gpt2.GPT2LMHeadModel")
    assert set(manifest.hashes) == {file.name for file in gpt2.iterdir()} - {"laconic.json"}
    weights = hashlib.sha256((gpt2 / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.hashes["model.safetensors"] == weights


def test_same_input_same_bytes(gpt2, tmp_path):
    again = rounded(ZOO["gpt2"].build(), tmp_path / "elsewhere")
    for file in gpt2.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_records_survive(gpt2):
    source = resolve(ZOO["gpt2"].build())
    written = round_records(source)
    read = read_manifest(gpt2).records
    assert [structural(a) for a in written] == [structural(b) for b in read]
    assert all(record.data["dtype"] == "float32" for record in read)


def test_config_describes_linear_layers_as_compressed_tensors_does(tmp_path):
    scheme = Scheme(Int(4), Scale("group", group=24, dtype="float16"))  # 24 divides 48 and 72
    folder = rounded(ZOO["llama"].build(), tmp_path / "out", scheme)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "laconic" and said["format"] == "pack-quantized"
    (group,) = said["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 24,
        "dynamic": False,
    }  # fmt: skip
    model = ZOO["llama"].build()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(group["targets"]) | set(said["ignore"]) == linear and not said["ignore"]


def test_linear_layers_without_that_form_are_ignored_there(tmp_path):
    real = Scheme(Int(4), Scale("group", group=24, dtype="float16"), zero="real")
    folder = rounded(ZOO["llama"].build(), tmp_path / "out", real)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["config_groups"] == {} and "lm_head" in said["ignore"]


def test_tensors_come_first(tmp_path):
    source = resolve(ZOO["llama"].build())
    with pytest.raises(BadInput, match=r"holds no model\.safetensors"):
        write_artifact_files(tmp_path, source=source, records=[])
    assert not (tmp_path / "laconic.json").exists()


def test_extras_in_subfolders_are_hashed_and_work_in_progress_is_not(tmp_path):
    folder = tmp_path / "out"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "records").mkdir()
    (folder / "records" / "unit.safetensors").write_bytes(b"x")
    (folder / "report.html").write_text("x")
    manifest = read_manifest(rounded(ZOO["called_twice"].build(), folder))
    assert set(manifest.hashes) == {"model.safetensors", "recipe.yaml", "read.py", "1_Pooling/config.json"}


# --- what is refused ----------------------------------------------------------------------------------------


def test_not_an_artifact(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"holds no laconic\.json.*not finished.*--resume"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "/etc/passwd", "a/b.weight", "..\\weights", "a..weight", ".weight", "weight.", "",
     "lm_head.__class__", "a.b\0c"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["path", "alias"])
def test_a_record_whose_path_climbs_out(copied, path, place):
    def change(manifest):
        if place == "path":
            manifest["records"][0]["path"] = path
        else:
            manifest["records"][0]["aliases"] = [path]

    edit(copied / "laconic.json", change)
    with pytest.raises(BadInput, match=r"laconic\.json names the path .* not to be trusted|does not parse"):
        read_manifest(copied)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/../../b", "C:\\x", "a//b", "."])
def test_a_file_name_that_climbs_out(copied, name):
    edit(copied / "laconic.json", lambda manifest: manifest["hashes"].update({name: "0" * 64}))
    with pytest.raises(BadInput, match=r"names the file .* climbs out of its folder"):
        read_manifest(copied, verify=True)


def test_norm_of_a_fold_that_climbs_out(copied):
    fold = {"action": FOLD, "path": "a.conv", "norm": "../b"}
    edit(copied / "laconic.json", lambda manifest: manifest["records"].append(fold))
    with pytest.raises(BadInput, match=r"'\.\./b', which climbs out"):
        read_manifest(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), r"version 99, this laconic reads version 1: update laconic"),
        (lambda m: m.pop("records"), "holds no list of records"),
        (lambda m: m.pop("hashes"), "lacks its model or hashes"),
        (lambda m: m["records"][0].update(action="run"), "action 'run' is not known"),
        (lambda m: m["records"][0]["spec"].update(scheme="v9/int4"), "expected 7 parts"),
        (lambda m: m["records"][0]["spec"].update(view="diagonal"), "'diagonal' is not known"),
        (lambda m: m["records"][0]["spec"].update(shape=[-1, 4]), r"shape \(-1, 4\)"),
        (lambda m: m["records"].pop(), r"config\.json and laconic\.json disagree"),
    ],
)
def test_an_edited_manifest(copied, change, message):
    edit(copied / "laconic.json", change)
    with pytest.raises(BadInput, match=message):
        read_manifest(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', "[" * 100_000])
def test_half_a_manifest(copied, text):
    (copied / "laconic.json").write_text(text)
    with pytest.raises(BadInput, match=r"laconic\.json"):
        read_manifest(copied)


def test_an_edited_config(copied):
    edit(copied / "config.json", lambda config: config["quantization_config"]["records"].pop())
    with pytest.raises(BadInput, match=r"config\.json and laconic\.json disagree"):
        read_manifest(copied)
    edit(copied / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(BadInput, match="no quantization_config of laconic"):
        read_manifest(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(copied, name):
    (copied / name).unlink()
    with pytest.raises(BadInput, match=rf"holds no {name}: the artifact is incomplete"):
        read_manifest(copied)


def test_verify_finds_one_changed_byte(copied):
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    read_manifest(copied)
    with pytest.raises(BadInput, match=r"model\.safetensors is not the file that laconic wrote"):
        read_manifest(copied, verify=True)
    (copied / "recipe.yaml").unlink()
    with pytest.raises(BadInput, match=r"recipe\.yaml is missing|model\.safetensors is not"):
        read_manifest(copied, verify=True)


# --- read.py ------------------------------------------------------------------------------------------------

# -I: no user site, no PYTHONPATH. Whoever imports torch or laconic all the same fails.
PROBE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "laconic", "safetensors", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import numpy as np
from read import Artifact
artifact = Artifact(sys.argv[1])
np.savez(sys.argv[2], **{name: artifact.weight(name) for name in artifact.names()})
"""


def alone(folder: Path, out: Path) -> dict[str, np.ndarray]:
    """All weights by the folder's own read.py, in a Python without torch and laconic."""
    probe = out.with_suffix(".py")
    probe.write_text(PROBE)
    done = subprocess.run([sys.executable, "-I", probe, folder, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
def test_read_py_equals_torch(tmp_path, scheme):
    """Conv1D (transposed), embeddings and a tie of GPT-2, in all schemes."""
    source = resolve(ZOO["gpt2"].build())
    records = round_records(source, scheme)
    found = alone(write_artifact(tmp_path / "out", source, records), tmp_path / "found.npz")
    check_equal(found, source, records)


@pytest.mark.parametrize("name", ["mixtral", "convnet", "raw_parameters", "lstm"])
def test_read_py_reads_experts_convolutions_and_raw_parameters(tmp_path, name):
    source = resolve(ZOO[name].build())
    records = round_records(source, SCHEMES[5])
    found = alone(write_artifact(tmp_path / "out", source, records), tmp_path / "found.npz")
    check_equal(found, source, records)


def check_equal(found: dict[str, np.ndarray], source, records: list[Record]) -> None:
    model = source.load()
    floats = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    apply_records(model, records)
    assert any(record.action == PACK for record in records)
    assert set(found) >= {name for record in records for name in (record.path, *record.data["aliases"])}
    for record in records:
        owner, _, name = record.path.rpartition(".")
        expected = unpack_parameter(model.get_submodule(owner), name).numpy()
        for spelling in (record.path, *record.data["aliases"]):
            assert found[spelling].dtype == np.float32
            assert np.array_equal(found.pop(spelling), expected), spelling
    for name, value in found.items():
        assert np.array_equal(value, floats[name].astype(np.float32)), name


def test_read_py_reads_bfloat16(tmp_path):
    """The float tensors of a model in half precision."""
    source = resolve(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).to(torch.bfloat16))
    found = alone(write_artifact(tmp_path / "out", source, []), tmp_path / "found.npz")
    assert np.array_equal(found["0.weight"], source.read("0.weight").float().numpy())


def test_read_py_at_the_command_line(gpt2):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-I", gpt2 / "read.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = run().stdout.splitlines()
    assert "lm_head.weight  (101, 48)  v1/int8/group32/float16/minmax/zint/nearest" in "\n".join(listed)
    assert any(line.startswith("transformer.h.0.ln_1.bias  (48,)  F32") for line in listed)
    shown = run("transformer.wte.weight").stdout
    assert shown.startswith("transformer.wte.weight  (101, 48)  mean ")
    refused = run("nothing")
    assert refused.returncode == 2 and "no weight 'nothing'" in refused.stderr


def test_read_py_is_short_and_numpy_only():
    import ast

    text = (Path(__file__).parents[2] / "laconic" / "pipeline" / "read_artifact.py").read_text()
    assert len(text.splitlines()) <= 250
    imported = {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"json", "struct", "sys", "numpy"}


def test_names_in_the_file(gpt2):
    """The names in the file are the module's, packed ones with suffixes; ties are stored once."""
    from laconic.pipeline.tensorfile import TensorReader

    with TensorReader(gpt2) as reader:
        names = set(reader.names())
    assert {"transformer.wte.weight_packed", "transformer.wte.weight_scale", "transformer.wte.weight_shape",
            "transformer.wte.weight_zero_point", "transformer.ln_f.weight"} <= names  # fmt: skip
    assert not any(name.startswith("lm_head") for name in names)
