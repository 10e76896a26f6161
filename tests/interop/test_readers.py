"""What we write, opened by the programs whose forms these are; what they quantize, opened by us; the same inputs in both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import laconic
from laconic.nn import packed_specs
from laconic.pipeline.export import export
from tests.interop.models import drawn, logits, off, rounded_to, static_inputs

transformers = pytest.importorskip("transformers")

# GPTQModel's kernels want multiples of 32 on both sides.
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
IDS = [3, 17, 5, 90, 9, 9, 44]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize(
    ("to", "scheme"),
    [
        ("compressed-tensors", "v1/int4/group32/float32/minmax/znone/nearest"),
        ("compressed-tensors", "v1/int3/group16/float32/minmax/znone/nearest"),
        ("int-quantized", "v1/int8/channel/float32/minmax/znone/nearest"),
        ("int-quantized", "v1/int8/tensor/float32/minmax/znone/nearest"),
    ],
)
def test_compressed_tensors_reads_what_we_write(tmp_path, family, to, scheme):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which opens the folder, is not installed")
    artifact = rounded_to(drawn(family, **SMALL), tmp_path / "artifact", scheme, head=False)
    export(artifact, to, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert off(logits(theirs, IDS), logits(laconic.load(artifact), IDS)) < 1e-5


def test_compressed_tensors_unpacks_zero_points_that_we_write(tmp_path):
    """Layer by layer: transformers expects zero points of another shape than the packed ones, and refuses the model."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which opens the folder, is not installed")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = "v1/int4/group32/float32/minmax/zint/nearest"
    artifact = rounded_to(drawn(**SMALL), tmp_path / "artifact", scheme, head=False)
    export(artifact, "compressed-tensors", tmp_path / "out")
    group = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    stored, ours = load_file(tmp_path / "out" / "model.safetensors"), laconic.load(artifact)
    said = QuantizationScheme(**group)
    for path in group["targets"]:
        parts = {n: stored[f"{path}.{n}"] for n in PackedQuantizationCompressor.compression_param_names(said)}
        found = PackedQuantizationCompressor.decompress(parts, said)["weight"]
        assert torch.equal(found, ours.get_submodule(path).weight), path
    assert len(group["targets"]) == 7


@pytest.mark.parametrize("strategy", ["token", "tensor"])
def test_compressed_tensors_rounds_inputs_as_we_do(tmp_path, strategy):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which opens the folder, is not installed")
    artifact = static_inputs(drawn(**SMALL), tmp_path / "artifact")
    export(artifact, "int-quantized", tmp_path / "out")
    if strategy == "token":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        inputs = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
        inputs.update(strategy="token", dynamic=True)
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = laconic.load(tmp_path / "out")
    assert all(spec.inputs for spec in packed_specs(ours).values())
    # A value on the edge of two codes may fall to either side.
    assert off(logits(theirs, IDS), logits(ours, IDS)) < 2e-3


@pytest.mark.parametrize(
    "scheme",
    [
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        {"num_bits": 8, "strategy": "channel", "symmetric": True},
    ],
    ids=["int4", "int4-zero", "w8a8"],
)
def test_we_open_what_llm_compressor_quantizes(tmp_path, scheme):
    pytest.importorskip("llmcompressor", reason="llm-compressor, which quantizes the model, is not installed")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    drawn(**SMALL).save_pretrained(tmp_path / "float")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    group = {"targets": ["Linear"], "weights": {**scheme, "type": "int", "dynamic": False}}
    if scheme["num_bits"] == 8:
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = inputs
    recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    oneshot(model=theirs, processor=tokenizer(), recipe=recipe)
    expected = logits(theirs, IDS)
    theirs.save_pretrained(tmp_path / "out", save_compressed=True)
    ours = laconic.load(tmp_path / "out")
    assert len(packed_specs(ours)) == 7
    assert off(logits(ours, IDS), expected) < 2e-3


@pytest.fixture
def gptqmodel(monkeypatch, tmp_path):
    """GPTQModel, told to have two workers: with two cores or fewer it takes one, and then refuses to start."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    monkeypatch.chdir(tmp_path)  # it leaves its logs where it stands
    return pytest.importorskip("gptqmodel", reason="GPTQModel, whose form it is, is not installed")


@pytest.mark.parametrize(("to", "version"), [("gptq", "znone"), ("gptq-v2", "zint")])
def test_gptqmodel_reads_what_we_write(gptqmodel, tmp_path, to, version):
    scheme = f"v1/int4/group32/float16/minmax/{version}/nearest"
    artifact = rounded_to(drawn(**SMALL), tmp_path / "artifact", scheme, head=False)
    done = export(artifact, to, tmp_path / "out")
    theirs = opened(gptqmodel, tmp_path / "out")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("gptqmodel.") and done["types"][to] > 5
    assert off(logits(theirs, IDS), logits(laconic.load(tmp_path / "out"), IDS)) < 5e-3


@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
def test_we_open_what_gptqmodel_quantizes(gptqmodel, tmp_path, act_order):
    how = gptqmodel.QuantizeConfig(bits=4, group_size=32, desc_act=act_order)
    ours = laconic.load(quantized(gptqmodel, how, drawn(**SMALL), tmp_path))
    assert len(packed_specs(ours)) == 7
    assert off(logits(ours, IDS), logits(opened(gptqmodel, tmp_path / "out"), IDS)) < 5e-3


def test_we_open_what_gptqmodel_quantizes_as_awq(gptqmodel, tmp_path):
    method, form = gptqmodel.quantization.METHOD.AWQ, gptqmodel.quantization.FORMAT.GEMM
    how = gptqmodel.QuantizeConfig(bits=4, group_size=32, quant_method=method, format=form)
    # Its search for clipped ranges takes outputs 64 at a time.
    model = drawn(**{**SMALL, "intermediate_size": 128, "num_key_value_heads": 4})
    ours = laconic.load(quantized(gptqmodel, how, model, tmp_path))
    assert len(packed_specs(ours)) == 7
    assert off(logits(ours, IDS), logits(opened(gptqmodel, tmp_path / "out", "AWQ_TORCH"), IDS)) < 5e-3


def quantized(gptqmodel, how, model, folder: Path) -> Path:
    """What GPTQModel writes of the model."""
    model.save_pretrained(folder / "float")
    tokenizer().save_pretrained(folder / "float")
    theirs = gptqmodel.GPTQModel.load(str(folder / "float"), how, device="cpu")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 96, (32,), generator=generator).tolist() for _ in range(8)]
    theirs.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    theirs.save(str(folder / "out"))
    config = json.loads((folder / "out" / "config.json").read_text())
    (folder / "out" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))  # it saved in bfloat16
    return folder / "out"


def opened(gptqmodel, folder: Path, backend: str = "GPTQ_TORCH"):
    """By GPTQModel on its plain torch kernels, which take float16 at best."""
    tokenizer().save_pretrained(folder)
    held = gptqmodel.GPTQModel.load(
        str(folder), backend=getattr(gptqmodel.BACKEND, backend), device="cpu", dtype=torch.float16
    )
    return held.model


def tokenizer():
    """Of 96 words: both programs want one beside a model, and make no use of it here."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {str(i): i for i in range(3, 96)}
    held = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=held, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
