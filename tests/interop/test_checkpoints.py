"""compressed-tensors, GPTQ, AWQ and bitsandbytes: bytes of layers, folders of others on our kernels, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
from laconic.errors import BadInput
from laconic.interop.awq import NIBBLE_OF
from laconic.interop.checkpoints import METHODS, checkpoint_format
from laconic.interop.compressed_tensors import compressed_tensors_tensors
from laconic.interop.gptq import gptq_tensors, packed_inputs
from laconic.interop.matrix import QuantizedMatrix
from laconic.kernels.inputs import INT8_TOKENS
from laconic.nn import declare, is_packed, packed_specs
from laconic.numerics import Int, Scale, Scheme, affine_params, quantize
from laconic.pipeline.export import export
from laconic.pipeline.source import resolve
from laconic.testing.vectors import folder
from tests.interop.models import drawn, logits, off, rounded_to, static_inputs
from tests.pipeline.artifacts import write_artifact
from tests.pipeline.runs import run_cli

transformers = pytest.importorskip("transformers")
WHERE = folder(Path(__file__).parents[2])
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
IDS = [3, 17, 5, 90, 9, 9, 44]


@pytest.fixture(scope="module")
def model():
    return drawn(**SMALL)


def packed(scheme: Scheme, rows: int, k: int, seed: int = 0) -> QuantizedMatrix:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    scale, zero = affine_params(x, scheme)
    return QuantizedMatrix(scheme, quantize(x, scale, zero, scheme), scale, zero)


def vectors(file: str, form: str) -> list:
    """(arguments, role -> array) of every recorded case of a form, whatever its widths and groups are."""
    arrays = np.load(WHERE / f"{file}.npz")
    cases = [c for c in json.loads((WHERE / f"{file}.json").read_text())["cases"] if c["args"].get("format") == form]
    return [
        pytest.param(c["args"], {role: torch.from_numpy(arrays[key]) for role, key in c["arrays"].items()}, id=c["name"])
        for c in cases
    ]


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.vectors
@pytest.mark.parametrize(("args", "arrays"), vectors("formats", "pack-quantized"))
def test_compressed_tensors_packs_like_the_reference(args, arrays):
    codes = (arrays["codes"].to(torch.int16) + args["stored_offset"]).to(torch.uint8)
    ones, bits = torch.ones(len(codes), 1), args["bits"]
    found = compressed_tensors_tensors(QuantizedMatrix(Scheme(Int(bits), Scale("channel")), codes, ones))
    assert torch.equal(found["weight_packed"], arrays["packed"])
    grouped = QuantizedMatrix(Scheme(Int(bits), Scale("group", 1), "int"), codes, ones.expand(codes.shape), codes)
    assert torch.equal(compressed_tensors_tensors(grouped)["weight_zero_point"], arrays["packed_dim0"])


@pytest.mark.vectors
@pytest.mark.parametrize(("args", "given"), vectors("nvfp4", "int"))
def test_compressed_tensors_rounds_as_we_do(args, given):
    scheme = Scheme(Int(args["bits"]), Scale("group", args["group_size"]), "none" if args["symmetric"] else "int")
    scale, zero_point = affine_params(given["weight"], scheme)
    matrix = QuantizedMatrix(scheme, quantize(given["weight"], scale, zero_point, scheme), scale, zero_point)
    found = compressed_tensors_tensors(matrix, "int-quantized")
    assert torch.equal(found["weight"].float(), given["quantised"].float().reshape(found["weight"].shape))
    assert torch.allclose(found["weight_scale"], given["scale"].reshape(scale.shape), rtol=1e-6, atol=1e-7)
    if not args["symmetric"]:
        assert torch.equal(found["weight_zero_point"].float(), given["zero_point"].float().reshape(scale.shape))


@pytest.mark.vectors
@pytest.mark.parametrize(("args", "arrays"), vectors("formats", "gptq"))
def test_gptq_packs_like_the_reference(args, arrays):
    assert torch.equal(packed_inputs(arrays["codes"].to(torch.uint8), args["bits"]), arrays["packed"])


def gptq_by_hand(tensors: dict, path: str, bits: int, version: str) -> torch.Tensor:
    """W of a GPTQ layer, read bit by bit."""
    words = tensors[f"{path}.qweight"].numpy().view(np.uint32)
    scales, index = tensors[f"{path}.scales"].float().numpy(), tensors[f"{path}.g_idx"].numpy()
    zeros = tensors[f"{path}.qzeros"].numpy().view(np.uint32)
    k, n = len(index), scales.shape[1]

    def code(column: np.ndarray, i: int) -> int:
        number = sum(int(w) << (32 * j) for j, w in enumerate(column))
        return number >> (bits * i) & (1 << bits) - 1

    plus = 1 if version == "gptq" else 0
    w = np.zeros((n, k), np.float32)
    for o in range(n):
        for i in range(k):
            g = index[i]
            w[o, i] = scales[g, o] * np.float32(code(words[:, o], i) - code(zeros[g], o) - plus)
    return torch.from_numpy(w)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "scheme", ["v1/int4/group16/float16/minmax/zint/nearest", "v1/int3/channel/float16/minmax/znone/nearest"]
)
def test_a_gptq_layer_says_what_it_should(scheme, version):
    matrix = packed(Scheme.parse(scheme), 32, 64)
    if matrix.zero is not None:
        matrix.zero[matrix.zero == 0] = 1
    found = {f"x.{ending}": value for ending, value in gptq_tensors(matrix, version).items()}
    assert torch.equal(gptq_by_hand(found, "x", int(matrix.scheme.bits), version), matrix.values())


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("v1/levelsnf4/group16/float32/minmax/znone/nearest", "is not 2, 3, 4 or 8 bits"),
        ("v1/int5/group16/float16/minmax/zint/nearest", "is not 2, 3, 4 or 8 bits"),
        ("v1/int4/group16/float32/minmax/zint/nearest", "do not fit in float16"),
    ],
)
def test_what_gptq_cannot_hold_is_said(scheme, says):
    assert says in gptq_tensors(packed(Scheme.parse(scheme), 32, 64))
    assert "fill words" in gptq_tensors(packed(Scheme(Int(4), Scale("channel", dtype="float16")), 12, 64))


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "scheme", "method"),
    [
        ("compressed-tensors", "v1/int4/group32/float16/minmax/znone/nearest", "compressed-tensors"),
        ("compressed-tensors", "v1/int3/group16/bfloat16/minmax/zint/nearest", "compressed-tensors"),
        ("compressed-tensors", "v1/int6/channel/float32/minmax/zint/nearest", "compressed-tensors"),
        ("compressed-tensors", "v1/int8/tensor/float32/minmax/znone/nearest", "compressed-tensors"),
        ("int-quantized", "v1/int8/channel/float32/minmax/znone/nearest", "compressed-tensors"),
        ("int-quantized", "v1/int4/group32/float16/minmax/zint/nearest", "compressed-tensors"),
        ("gptq", "v1/int4/group32/float16/minmax/znone/nearest", "gptq"),
        ("gptq-v2", "v1/int3/group32/float16/minmax/zint/nearest", "gptq"),
        ("gptq-v2", "v1/int2/channel/float16/minmax/zint/nearest", "gptq"),
        ("gptq-v2", "v1/int8/group16/float16/minmax/zint/nearest", "gptq"),
        ("bnb-nf4", "v1/levelsnf4/group32/float32/minmax/znone/nearest", "bitsandbytes"),
        ("bnb-fp4", "v1/levelsfp4_bnb/group32/float32/minmax/znone/nearest", "bitsandbytes"),
    ],
)
def test_there_and_back(model, tmp_path, to, scheme, method):
    artifact = rounded_to(model, tmp_path / "artifact", scheme, head=False)
    said = export(artifact, to, tmp_path / "out")
    assert said["types"] == {to: 7} and said["exact"] and not said["notes"]
    ours, theirs = laconic.load(artifact), laconic.load(tmp_path / "out")
    assert set(packed_specs(ours)) == set(packed_specs(theirs))
    for path in packed_specs(ours):
        name = path.removesuffix(".weight")
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight), path
    assert off(logits(theirs, IDS), logits(ours, IDS)) < 1e-6
    source = resolve(tmp_path / "out", quantized=True)
    assert method in source.notes[-1] and off(logits(source.load(), IDS), logits(ours, IDS)) < 1e-5


def test_a_layer_that_the_form_lacks_is_float_with_a_note(model, tmp_path):
    artifact = rounded_to(model, tmp_path / "artifact", "v1/int4/group64/float16/minmax/znone/nearest")
    said = export(artifact, "compressed-tensors", tmp_path / "out")
    # 96 columns are no multiple of 64; the embedding is no linear layer.
    assert len(said["notes"]) == 2 and said["types"] == {"compressed-tensors": 7, "float32": 2}
    assert "do not divide its 96 inputs" in " ".join(said["notes"])
    assert off(logits(laconic.load(tmp_path / "out"), IDS), logits(laconic.load(artifact), IDS)) < 1e-5
    with pytest.raises(BadInput, match="holds none of the model's layers"):
        export(artifact, "bnb-nf4", tmp_path / "other")


def test_inputs_that_are_rounded_stay_so(model, tmp_path):
    artifact = rounded_to(model, tmp_path / "artifact", "v1/int8/channel/float32/minmax/znone/nearest", head=False)
    export(artifact, "int-quantized", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group["input_activations"], group["targets"] = dynamic, ["Linear"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = laconic.load(tmp_path / "out")
    assert {spec.inputs for spec in packed_specs(found).values()} == {INT8_TOKENS}
    said = export(tmp_path / "out", "int-quantized", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert said["exact"] and again["config_groups"]["group_0"]["input_activations"] == dynamic
    group["input_activations"] = {**dynamic, "dynamic": False}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    source = resolve(tmp_path / "out", quantized=True)
    assert {record.spec.inputs for record in source.records()} == {""}
    assert any("inputs stay float" in note for note in source.notes)


def test_one_stored_scale_of_inputs_stays_so(model, tmp_path):
    folder = static_inputs(model, tmp_path / "artifact")
    said = export(folder, "int-quantized", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert said["exact"] and config["config_groups"]["group_0"]["input_activations"] == wanted
    assert not any("stay float in this form" in note for note in said["notes"])
    ours, theirs = laconic.load(folder), laconic.load(tmp_path / "out")
    assert {p: s.inputs for p, s in packed_specs(theirs).items()} == {
        p: s.inputs for p, s in packed_specs(ours).items()
    }
    assert torch.equal(logits(theirs, IDS), logits(ours, IDS))
    rewrite(tmp_path / "out", lambda t, c: t.pop("model.layers.0.mlp.up_proj.input_scale"))
    with pytest.raises(BadInput, match="no model.layers.0.mlp.up_proj.input_scale"):
        laconic.load(tmp_path / "out")


def test_a_loaded_checkpoint_is_saved_and_loaded_by_transformers(model, tmp_path):
    artifact = rounded_to(model, tmp_path / "artifact", "v1/int4/group32/float16/minmax/znone/nearest", head=False)
    export(artifact, "gptq", tmp_path / "out")
    found = laconic.load(tmp_path / "out")
    found.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, IDS), logits(found, IDS))


# --- others' folders -------------------------------------------------------------------------------------------------


def gptq_folder(model, folder: Path, scheme: str = "v1/int4/group32/float16/minmax/znone/nearest") -> Path:
    artifact = rounded_to(model, folder / "artifact", scheme, head=False)
    export(artifact, "gptq", folder / "out")
    return folder / "out"


def rewrite(folder: Path, change) -> None:
    """Change the tensors and the quantization config of a folder."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))


def shuffle_groups(tensors: dict, config: dict) -> None:
    """As if inputs had been sorted by activation: groups of 32 of the 64 or 96 inputs, in a drawn order."""
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("g_idx")]:
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]


def test_act_order_runs_packed(model, tmp_path):
    out = gptq_folder(model, tmp_path)
    rewrite(out, shuffle_groups)
    found, tensors = laconic.load(out), load_file(out / "model.safetensors")
    layer = found.model.layers[0].mlp.down_proj
    assert is_packed(layer) and layer._packed["weight"].order
    expected = gptq_by_hand(tensors, "model.layers.0.mlp.down_proj", 4, "gptq")
    assert torch.equal(layer.weight, expected)
    x = torch.randn(3, 96)
    assert torch.allclose(layer(x), x @ expected.T, atol=1e-4)
    said = export(out, "gptq", tmp_path / "again")
    assert said["exact"]
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["model.layers.0.mlp.down_proj.g_idx"],
                       tensors["model.layers.0.mlp.down_proj.g_idx"])  # fmt: skip
    back = export(out, "compressed-tensors", tmp_path / "ct")
    assert back["exact"] and torch.equal(laconic.load(tmp_path / "ct").model.layers[0].mlp.down_proj.weight, expected)
    found.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, IDS), logits(found, IDS))


def test_the_reader_in_an_artifact_knows_sorted_inputs(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(64, 32))
    matrix = packed(Scheme(Int(4), Scale("group", 16, "float16"), "int"), 32, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    matrix = replace(matrix, order=order)
    write_artifact(tmp_path / "out", resolve(net), [matrix.record("0.weight")])
    found = laconic.load(tmp_path / "out", into=net)
    assert torch.equal(found[0].weight, matrix.values())
    done = subprocess.run(
        [sys.executable, "-c", "from read import Artifact; print(Artifact('.').weight('0.weight').astype('<f4').tobytes().hex())"],
        cwd=tmp_path / "out", capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip() == matrix.values().numpy().tobytes().hex(), done.stderr
    with pytest.raises(ValueError, match="which only linear layers have"):
        declare(torch.nn.Embedding(32, 64), "weight", matrix.record("0.weight").spec)


def test_groups_of_uneven_sizes_are_floats_of_the_same_values(model, tmp_path):
    out = gptq_folder(model, tmp_path)

    def uneven(tensors, config):
        tensors["model.layers.0.mlp.down_proj.g_idx"][:5] = 2

    rewrite(out, uneven)
    source = resolve(out, quantized=True)
    found = source.load_packed()
    layer = found.model.layers[0].mlp.down_proj
    assert not is_packed(layer) and "are floats: model.layers.0.mlp.down_proj.weight" in source.notes[-1]
    assert torch.equal(
        layer.weight, gptq_by_hand(load_file(out / "model.safetensors"), "model.layers.0.mlp.down_proj", 4, "gptq")
    )


def test_awq(model, tmp_path):
    """A folder made by the equations: eight columns a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    artifact = rounded_to(model, tmp_path / "artifact", "v1/int4/group32/float16/minmax/zint/nearest", head=False)
    export(artifact, "gptq-v2", tmp_path / "out")
    ours = laconic.load(artifact)

    def words(columns: torch.Tensor) -> torch.Tensor:
        n = columns.reshape(len(columns), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].to(torch.int64)
        packed = sum(n[:, :, i] << (4 * i) for i in range(8))
        return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)

    def as_awq(tensors, config):
        for path in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            matrix = QuantizedMatrix.of(ours.get_submodule(path))
            tensors[f"{path}.qweight"], tensors[f"{path}.qzeros"] = words(matrix.codes.t()), words(matrix.zero.t())
            del tensors[f"{path}.g_idx"]
        config.clear()
        config.update(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)

    rewrite(tmp_path / "out", as_awq)
    found = laconic.load(tmp_path / "out")
    for path in packed_specs(ours):
        name = path.removesuffix(".weight")
        assert torch.equal(found.get_submodule(name).weight, ours.get_submodule(name).weight)
    assert torch.equal(logits(found, IDS), logits(ours, IDS)) and NIBBLE_OF.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_words_of_older_packers(model, tmp_path):
    """floor(32 / b) values a word, as compressed-tensors packed 3 bits before."""
    artifact = rounded_to(model, tmp_path / "artifact", "v1/int3/group32/float16/minmax/znone/nearest", head=False)
    export(artifact, "compressed-tensors", tmp_path / "out")
    ours = laconic.load(artifact)

    def older(tensors, config):
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            codes = QuantizedMatrix.of(ours.get_submodule(name.removesuffix(".weight_packed"))).codes.to(torch.int64)
            padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 10)).reshape(len(codes), -1, 10)
            tensors[name] = sum(padded[:, :, i] << (3 * i) for i in range(10)).to(torch.int32)

    rewrite(tmp_path / "out", older)
    assert torch.equal(logits(laconic.load(tmp_path / "out"), IDS), logits(ours, IDS))


def assert_same_weights(theirs, ours) -> None:
    """The same numbers by bitsandbytes' own code; its products on a CPU are of bfloat16, so logits are off by more."""
    import bitsandbytes

    for path in packed_specs(ours):
        layer, name = theirs.get_submodule(path.removesuffix(".weight")), path.removesuffix(".weight")
        values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        mine = ours.get_submodule(name).weight
        assert values.shape == mine.shape and torch.allclose(values.float(), mine, rtol=0, atol=1e-7)
    assert off(logits(theirs, IDS), logits(ours, IDS)) < 0.02


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_saves_runs_packed(tmp_path, kind, nested):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, whose files are read, is not installed")
    net = drawn(**{**SMALL, "intermediate_size": 128})
    net.save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "bnb")
    found = laconic.load(tmp_path / "bnb")
    assert len(packed_specs(found)) == 7
    assert_same_weights(theirs, found)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_opens_what_we_write(model, tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which the folder is opened with, is not installed")
    levels = {"nf4": "nf4", "fp4": "fp4_bnb"}[kind]
    artifact = rounded_to(
        model, tmp_path / "artifact", f"v1/levels{levels}/group32/float32/minmax/znone/nearest", head=False
    )
    export(artifact, f"bnb-{kind}", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert_same_weights(theirs, laconic.load(artifact))


def test_eight_bits_of_bitsandbytes(model, tmp_path):
    artifact = rounded_to(model, tmp_path / "artifact", "v1/int8/channel/float32/minmax/znone/nearest", head=False)
    export(artifact, "int-quantized", tmp_path / "out")

    def as_bnb(tensors, config):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name.replace(".weight_scale", ".SCB")] = tensors.pop(name).reshape(-1) * 127
        config.clear()
        config.update(quant_method="bitsandbytes", load_in_8bit=True)

    rewrite(tmp_path / "out", as_bnb)
    assert off(logits(laconic.load(tmp_path / "out"), IDS), logits(laconic.load(artifact), IDS)) < 1e-5


def test_blocks_that_run_across_rows_are_floats_of_the_same_values(model, tmp_path):
    artifact = rounded_to(model, tmp_path / "artifact", "v1/levelsnf4/group32/float32/minmax/znone/nearest", head=False)
    export(artifact, "bnb-nf4", tmp_path / "out")

    def longer(tensors, config):
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][::4].clone()
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
        raw = json.dumps({**state, "blocksize": 128}).encode()
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)

    rewrite(tmp_path / "out", longer)
    source = resolve(tmp_path / "out", quantized=True)
    assert not is_packed(source.load_packed().model.layers[0].mlp.down_proj)
    assert "1 quantized tensors have no packed form here" in source.notes[-1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quant_method": "hqq"},
            "is quantized by hqq, and laconic opens compressed-tensors, gptq, awq, bitsandbytes and GGUF",
        ),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "in the layout 'marlin' of one kernel"),
        ({"quant_method": "gptq", "bits": 5}, "with bits 5"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the layout 'gemv'"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "it reads pack-quantized and int-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "with sparse weights",
        ),
    ],
)
def test_what_is_not_read_is_refused_with_the_way_out(config, says):
    with pytest.raises(BadInput) as caught:
        checkpoint_format(config, "model")
    assert says in str(caught.value) and "give the" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t, c: t.pop("model.layers.0.mlp.up_proj.scales"),
            "up_proj lacks the tensor model.layers.0.mlp.up_proj.scales",
        ),
        (lambda t, c: t["model.layers.0.mlp.up_proj.g_idx"].fill_(9), "up_proj.g_idx does not number its 2 groups"),
        (lambda t, c: [t.pop(n) for n in list(t) if n.endswith("qweight")], "no tensor is quantized by it"),
        (
            lambda t, c: t.update({"model.layers.0.mlp.up_proj.qzeros": torch.zeros(2, 5, dtype=torch.int32)}),
            "up_proj.qzeros",
        ),
        (
            lambda t, c: t.update({"model.layers.0.mlp.up_proj.qweight": t["model.layers.0.mlp.up_proj.qweight"][:4]}),
            "shape",
        ),
        (lambda t, c: c.update(bits="four"), "with bits 'four'"),
    ],
    ids=["scales", "g_idx", "none", "qzeros", "cut", "bits"],
)
def test_broken_folders_get_a_sentence(model, tmp_path, change, says, capsys):
    out = gptq_folder(model, tmp_path)
    rewrite(out, change)
    code, _, said = run_cli(capsys, "run", out, "generate", "1 2")
    assert code == 2 and says in said and said.count("\n") == 1, said


def test_compressing_one_again_is_refused_and_says_what_opens_it(model, tmp_path, capsys):
    out = gptq_folder(model, tmp_path)
    code, _, said = run_cli(capsys, "compress", out, "--out", tmp_path / "again")
    assert (
        code == 2
        and "already quantized by another tool (gptq)" in said
        and "laconic.load and laconic run open it" in said
    )
    assert METHODS == ("compressed-tensors", "gptq", "awq", "bitsandbytes")
