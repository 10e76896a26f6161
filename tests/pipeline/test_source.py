"""Models from folders, modules, `module:function` and GGUF files; and what is refused, by its message."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from laconic.errors import BadInput, LaconicError
from laconic.pipeline.source import check_finite, resolve
from laconic.pipeline.source_base import all_tensors, stored_names
from laconic.pipeline.source_module import OtherGgufSource
from tests.zoo import ZOO, outputs

transformers = pytest.importorskip("transformers")

FOLDERS = [entry for entry in ZOO.values() if entry.auto]
MODULES = [entry for entry in ZOO.values() if not entry.auto]


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Loading bars and reports of transformers are not what is tested."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    caplog.set_level(logging.ERROR)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: the folder of a zoo model, saved once; tests that change it take a copy."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            ZOO[name].build().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """`copied(name)`: a folder of its own."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / name))


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of model.safetensors (`__` stands for `.`); None removes one."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    """Equal tensors under equal names, with equal dtypes and ties, buffers that are not stored included."""
    ours, theirs = all_tensors(model), all_tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert stored_names(model) == stored_names(reference)
    assert not model.training


# --- folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", FOLDERS, ids=lambda entry: entry.name)
def test_load_equals_from_pretrained(entry, saved):
    folder = saved(entry.name)
    reference = getattr(transformers, entry.auto).from_pretrained(folder)
    source = resolve(folder)
    model = source.load()
    assert_same(model, reference)
    example = entry.example(reference)
    wanted, got = outputs(reference, example), outputs(model, example)
    assert len(wanted) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert source.kind == "transformers" and source.name == folder.name and source.notes == []
    assert source.size_before == (folder / "model.safetensors").stat().st_size
    assert outputs(model, source.example())


@pytest.mark.parametrize("name", ["t5", "mixtral", "whisper", "wav2vec2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_shards(name, dtype, tmp_path):
    model = ZOO[name].build().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    source = resolve(tmp_path)
    assert_same(source.load(), type(model).from_pretrained(tmp_path))
    assert source.size_before == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["bert", "whisper", "mixtral", "t5", "swin"])
def test_filling_one_by_one_equals_loading(name, saved):
    source = resolve(saved(name))
    skeleton, whole = source.skeleton(), source.load()
    persistent = set(source.names())
    assert all(tensor.is_meta == (name in persistent) for name, tensor in skeleton.named_buffers())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for number, name in enumerate(source.names()):
        tensor = all_tensors(skeleton)[name]
        assert tensor.is_meta, f"{name} was filled before its turn"
        assert (tensor.dtype, tuple(tensor.shape)) == source.spec(name)
        source.fill(skeleton, [name])
        assert sum(not all_tensors(skeleton)[other].is_meta for other in source.names()) == number + 1
    assert_same(skeleton, whole)
    assert all(parameter.is_meta for parameter in source.skeleton().parameters())  # a new one each time


def test_experts_are_read_through_their_names_on_disk(saved):
    for name, merged in [
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj"),
        ("qwen2_moe", "model.layers.1.mlp.experts.gate_up_proj"),
    ]:
        folder = saved(name)
        on_disk = load_file(folder / "model.safetensors")
        source = resolve(folder)
        assert merged in source.names() and merged not in on_disk
        experts = [
            tensor for key, tensor in sorted(on_disk.items()) if ".layers.1." in key and ".experts.2." in key
        ]
        two = source.read(merged, 2, 3)[0]  # w1 and w3 (gate and up) of expert 2, one above the other
        halves = two.chunk(2)
        assert all(any(torch.equal(half, expert) for expert in experts) for half in halves)
        assert torch.equal(source.read(merged)[2], two)


def test_rows_of_stacked_experts_read_only_their_experts(saved, monkeypatch):
    source = resolve(saved("mixtral"))
    read, asked = source._store.read, []
    monkeypatch.setattr(source._store, "read", lambda name, *rows: asked.append(name) or read(name, *rows))
    source.read("model.layers.0.mlp.experts.gate_up_proj", 1, 3)
    assert len(asked) == 4 and all(".experts.1." in name or ".experts.2." in name for name in asked)


@pytest.mark.parametrize("name", ["mixtral", "bert"])
def test_rows_and_digests(name, saved):
    source = resolve(saved(name))
    module = resolve(source.load())
    for tensor in source.names():
        _, shape = source.spec(tensor)
        if shape:
            rows = shape[0]
            for start, stop in [(0, rows), (rows // 3, rows // 2 + 1), (rows, rows)]:
                assert torch.equal(source.read(tensor, start, stop), source.read(tensor)[start:stop])
        assert source.digest(tensor) == module.digest(tensor)
    assert len({source.digest(tensor) for tensor in source.names()}) == len(source.names())
    with pytest.raises(IndexError):
        source.read(source.names()[0], 0, 10**9)


def test_a_tied_tensor_has_one_entry_and_all_its_names(saved):
    source = resolve(saved("llama_tied"))
    assert "lm_head.weight" not in source.names()
    assert torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight"))
    model = source.skeleton()
    source.fill(model, ["lm_head.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta
    with pytest.raises(LaconicError, match="no parameter or buffer 'nobody'"):
        source.fill(model, ["nobody"])


def test_tied_under_the_other_name(copied):
    folder = copied("llama_tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, model__embed_tokens__weight=None, lm_head__weight=embedding)
    assert torch.equal(resolve(folder).read("model.embed_tokens.weight"), embedding)


def test_two_copies_of_a_tied_weight(copied):
    folder = copied("llama_tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, lm_head__weight=embedding.clone())
    assert_same(resolve(folder).load(), transformers.AutoModelForCausalLM.from_pretrained(folder))
    edit_weights(folder, lm_head__weight=embedding + 1)
    with pytest.raises(BadInput, match=r"ties model.embed_tokens.weight and lm_head.weight, .* different"):
        resolve(folder)


def test_legacy_names_prefix_and_stale_buffers(copied):
    folder = copied("bert")
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    old["bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve(folder)
    assert source.notes == []  # position_ids were stored once and are computed now
    assert_same(source.load(), transformers.AutoModelForMaskedLM.from_pretrained(folder))
    base = {name.removeprefix("bert."): tensor for name, tensor in old.items()}
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(resolve(folder).load(), transformers.AutoModelForMaskedLM.from_pretrained(folder))


def test_the_base_model_of_a_checkpoint_with_a_head(copied):
    folder = copied("llama")
    edit_config(folder, architectures=["LlamaModel"])
    source = resolve(folder)
    assert "1 tensors in the weight files have no place in LlamaModel" in source.notes[0]
    assert "lm_head.weight" in source.notes[0]
    assert_same(source.load(), transformers.LlamaModel.from_pretrained(folder))
    edit_config(folder, architectures=None)
    assert type(resolve(folder).skeleton()) is transformers.LlamaModel


def test_tensors_that_are_computed_and_not_stored(tmp_path):
    halves = {"layers": 1, "attention_heads": 4, "ffn_dim": 32}
    sizes = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in halves.items()}
    tokens = {"vocab_size": 101, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = transformers.MarianConfig(d_model=32, **sizes, **tokens)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    source = resolve(tmp_path)
    assert (
        "not in the weight files, and initialised as transformers does: model.encoder.embed_pos"
        in source.notes[0]
    )
    assert "model.encoder.embed_positions.weight" in source.names()
    assert torch.equal(
        source.read("model.encoder.embed_positions.weight", 3, 5),
        source.read("model.encoder.embed_positions.weight")[3:5],
    )
    assert_same(source.load(), transformers.MarianMTModel.from_pretrained(tmp_path))


def test_config_and_file_disagree_on_the_dtype(copied):
    folder = copied("bert")
    edit_config(folder, dtype="bfloat16")
    source = resolve(folder)
    assert (
        "config.json says bfloat16 and the weight files hold float32 (bert.embeddings.LayerNorm.bias)"
        in str(source.notes)
    )
    assert_same(source.load(), transformers.AutoModelForMaskedLM.from_pretrained(folder))
    name = "bert.embeddings.word_embeddings.weight"
    assert source.digest(name) == resolve(source.load()).digest(name)
    edit_config(folder, dtype=None)
    assert resolve(folder).spec(name)[0] is torch.float32


def test_extras(copied, tmp_path):
    folder = copied("llama")
    edit_config(folder, torch_dtype="float32", dtype=None, _name_or_path="/home/someone/llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "modules.json"):
        (folder / name).write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "tokenizer.pkl").write_text("never copied")
    (folder / "modeling.py").write_text("never copied")
    resolve(folder).save_extras(tmp_path / "out")
    files = {
        str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()
    }
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert files == wanted | {"modules.json", "1_Pooling/config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    assert "torch_dtype" not in config and "_name_or_path" not in config


# --- folders that are refused ----------------------------------------------------------------------------


def refused(folder: object, **options: bool) -> str:
    with pytest.raises(BadInput) as caught:
        resolve(folder, **options)
    message = str(caught.value)
    assert "\n" not in message, "one sentence"
    return message


def test_missing_pieces(copied, tmp_path):
    assert "neither a folder, nor one of the names minilm" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "merge it into its base model first" in refused(tmp_path / "empty")
    folder = copied("llama")
    assert "is a file: give the folder" in refused(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "holds no weights: neither model.safetensors nor" in message and "config.json" in message
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refused(folder)
    assert "not a int" in refused(3) and "not a list" in refused([1])


def test_half_a_checkpoint(copied):
    folder = copied("llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "half a checkpoint" in refused(folder)


def test_pickles(copied):
    folder = copied("bert")
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    message = refused(folder)
    assert "holds only pickled weights (pytorch_model.bin)" in message and "--allow-pickle" in message
    source = resolve(folder, allow_pickle=True)
    assert_same(source.load(), model)
    assert source.size_before == (folder / "pytorch_model.bin").stat().st_size
    torch.save({"a": [1, 2]}, folder / "pytorch_model.bin")
    assert "is not a state dict" in refused(folder, allow_pickle=True)
    torch.save(model, folder / "pytorch_model.bin")  # a whole object, which weights_only does not load
    assert "cannot be loaded with weights_only=True" in refused(folder, allow_pickle=True)


def test_sharded_pickles(copied):
    folder = copied("llama")
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    torch.save(dict(tensors[:5]), folder / "a.bin")
    torch.save(dict(tensors[5:]), folder / "b.bin")
    index = {"weight_map": {name: "a.bin" if i < 5 else "b.bin" for i, (name, _) in enumerate(tensors)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = resolve(folder, allow_pickle=True)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors)
    (folder / "b.bin").unlink()
    assert "names the shard 'b.bin', which is missing" in refused(folder, allow_pickle=True)


def test_architectures(copied):
    folder = copied("llama")
    edit_config(folder, architectures=["LlamaForPoetry"])
    assert "the architecture LlamaForPoetry is unknown to transformers" in refused(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "poetry.LlamaForPoetry"})
    message = refused(folder)
    assert "the architecture LlamaForPoetry needs code that comes with the checkpoint" in message
    assert "--trust-remote-code" in message
    edit_config(folder, model_type="poet", auto_map=None)
    assert "the model type 'poet' is unknown to transformers" in refused(folder)
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"], num_attention_heads=5)
    assert "config.json" in refused(folder)


def test_remote_code_runs_only_when_trusted(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    folder = copied("llama")
    edit_config(folder, architectures=["MyLlama"], auto_map={"AutoModelForCausalLM": "my_llama.MyLlama"})
    mark = tmp_path / "ran"
    code = f"from transformers import LlamaForCausalLM\nopen({str(mark)!r}, 'w').close()\n"
    (folder / "my_llama.py").write_text(code + "class MyLlama(LlamaForCausalLM):\n    pass\n")
    refused(folder)
    assert not mark.exists()
    source = resolve(folder, trust_remote_code=True)
    assert mark.exists() and type(source.skeleton()).__name__ == "MyLlama"
    assert torch.equal(
        source.load().lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"]
    )
    source.save_extras(tmp_path / "out")
    assert (tmp_path / "out" / "my_llama.py").exists()


def test_auto_map_alone_is_no_remote_code(copied):
    folder = copied("llama")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert type(resolve(folder).skeleton()) is transformers.LlamaForCausalLM


def test_quantized_by_another_tool(copied):
    folder = copied("llama")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is already quantized by another tool (gptq): give the original float model" in refused(folder)
    edit_config(folder, quantization_config=None)
    (folder / "laconic.json").write_text("{}")
    assert "is already compressed by laconic" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_wrong_dtype(copied, dtype):
    folder = copied("llama")
    weight = torch.zeros(48, 48).to(dtype)
    edit_weights(folder, model__layers__1__self_attn__q_proj__weight=weight)
    message = refused(folder)
    assert f"model.layers.1.self_attn.q_proj.weight is stored as {str(dtype)[6:]}" in message
    assert "where LlamaForCausalLM has floats" in message


def test_wrong_shapes_and_missing_tensors(copied):
    folder = copied("llama")
    edit_config(folder, intermediate_size=100)
    message = refused(folder)
    assert "has shape (48, 72) in the weight files, but config.json asks for (48, 100)" in message
    edit_config(folder, intermediate_size=72, num_hidden_layers=3)
    message = refused(folder)
    assert "9 of the " in message and "tensors of LlamaForCausalLM are not in the weight files" in message
    assert "(model.layers.2.self_attn.q_proj.weight, " in message and "and 6 more)" in message
    edit_config(folder, num_hidden_layers=1)
    assert "9 tensors in the weight files have no place" in resolve(folder).notes[0]


def test_missing_experts(copied):
    folder = copied("mixtral")
    on_disk = load_file(folder / "model.safetensors")
    lost = next(name for name in on_disk if ".experts.3.w1." in name)
    edit_weights(folder, **{lost.replace(".", "__"): None})
    assert "gate_up_proj cannot be put together from" in refused(folder)


def test_config_and_index_disagree(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path, max_shard_size="60KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["metadata"]["total_size"] += 8
    file.write_text(json.dumps(index))
    assert "says total_size" in resolve(tmp_path).notes[0]


def test_check_finite():
    check_finite("w", torch.ones(3))
    check_finite("n", torch.tensor([1, 2]))
    check_finite("e", torch.zeros(0, 4))
    broken = torch.ones(4, 4)
    broken[0, 1] = float("nan")
    with pytest.raises(BadInput, match="^w holds 1 NaN of 16 values: the weights are broken"):
        check_finite("w", broken)
    broken[1:3, 0] = float("-inf")
    with pytest.raises(BadInput, match="w holds 1 NaN and 2 infinite of 16 values"):
        check_finite("w", broken.to(torch.bfloat16))


# --- modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", MODULES, ids=lambda entry: entry.name)
def test_modules(entry, tmp_path):
    model = entry.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = resolve(model, example=entry.example(model))
    skeleton = source.skeleton()
    assert all(all_tensors(skeleton)[name].is_meta for name in source.names())
    source.fill(skeleton, source.names())
    loaded = source.load()
    assert_same(loaded, model)
    example = source.example()
    for other in (skeleton, loaded):
        assert all(
            torch.equal(a, b) for a, b in zip(outputs(model, example), outputs(other, example), strict=True)
        )
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert source.kind == "module" and source.config is None
    save_file({name: source.read(name) for name in source.names()}, tmp_path / "t.safetensors")
    ratio = source.size_before / (tmp_path / "t.safetensors").stat().st_size
    assert 0.9 < ratio < 1.1


class Shared(nn.Module):
    """Two parameter objects over one memory, a buffer that is not persistent, training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = nn.Parameter(self.a.weight.data)
        self.empty = nn.Linear(0, 4)
        self.register_buffer("positions", torch.arange(5), persistent=False)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 4) -> (n, 4)."""
        return self.b(self.a(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shared_memory_buffers_and_zero_sizes():
    model = Shared().train()
    source = resolve(model)
    assert source.names() == ["a.weight", "a.bias", "empty.weight", "empty.bias", "count"]
    skeleton = source.skeleton()
    assert skeleton.a.weight is skeleton.b.weight and skeleton.a.weight.is_meta
    assert torch.equal(skeleton.positions, model.positions) and skeleton.positions is not model.positions
    loaded = source.load()
    assert torch.equal(loaded.b.weight, model.b.weight) and loaded.count == 7
    assert model.training and not loaded.training
    with pytest.raises(BadInput, match="Shared is a plain nn.Module and how to call it is not known"):
        source.example()


def test_a_transformers_module_in_memory(saved, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved("gpt2"))
    source = resolve(model)
    assert source.kind == "transformers" and source.config is model.config
    assert_same(source.load(), model)
    assert source.load().lm_head.weight is not model.lm_head.weight
    assert outputs(source.load(), source.example())
    source.save_extras(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize(
    ("example", "wanted"),
    [
        (torch.ones(1), (1, [])),
        ((torch.ones(1), torch.ones(1)), (2, [])),
        ({"x": torch.ones(1)}, (0, ["x"])),
        (((torch.ones(1),), {"y": 1}), (1, ["y"])),
    ],
)
def test_examples_in_every_form(example, wanted):
    args, kwargs = resolve((nn.Linear(1, 1), example)).example()
    assert (len(args), list(kwargs)) == wanted


def test_modules_that_are_refused():
    with torch.device("meta"):
        assert "weight is on meta and has no values" in refused(nn.Linear(2, 2))
    assert "has no shape yet (a lazy module)" in refused(nn.LazyLinear(2))
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    assert "weight is not a plain dense tensor" in refused(sparse)
    foreign = nn.Sequential(type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(2, 2))
    assert "already quantized by another tool (bitsandbytes.nn.modules, at 0)" in refused(foreign)
    model = nn.Linear(2, 2)
    model.config = types.SimpleNamespace(quantization_config={"quant_method": "awq"})
    assert "Linear is already quantized by another tool (awq)" in refused(model)
    locked = nn.Linear(2, 2)
    locked.file = sys.stdout
    assert "Linear cannot be copied by copy.deepcopy" in refused(locked)


def test_module_function(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "class Nets:\n    small = staticmethod(lambda: torch.nn.Linear(2, 3))\n"
        "def pair(): return torch.nn.Linear(2, 3), torch.ones(1, 2)\n"
        "def number(): return 3\n"
        "def broken(): raise KeyError('weights')\n"
        "instance = torch.nn.Linear(2, 3)\n"
    )
    (tmp_path / "my_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    path = sys.path.copy()
    source = resolve("my_models:pair")
    assert source.name == "my_models:pair" and source.example()[0][0].shape == (1, 2)
    assert source.spec("weight") == (torch.float32, (3, 2))
    assert resolve("my_models:Nets.small").names() == ["weight", "bias"]
    assert "no_such_module cannot be imported: it does not exist, here or among" in refused(
        "no_such_module:f"
    )
    assert "No module named 'no_such_package'" in refused("my_broken:f")
    assert "the module my_models has no absent" in refused("my_models:absent")
    assert "my_models:number gives a int, not an nn.Module" in refused("my_models:number")
    assert "my_models:broken() raised KeyError: 'weights'" in refused("my_models:broken")
    assert "is not a function but a Linear" in refused("my_models:instance")
    assert sys.path == path
    for name in ("my_models", "my_broken"):
        sys.modules.pop(name, None)


def test_fetched_names(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = {"minilm": saved("bert"), "cifar-cnn": (nn.Linear(2, 2), torch.ones(1, 2))}
    monkeypatch.setitem(sys.modules, "laconic.tasks", types.SimpleNamespace(zoo_source=given.__getitem__))
    assert resolve("minilm").name == "minilm" and resolve("minilm").kind == "transformers"
    assert resolve("cifar-cnn").name == "cifar-cnn" and resolve("cifar-cnn").example()[0][0].shape == (1, 2)


# --- GGUF ------------------------------------------------------------------------------------------------


def write_gguf(file: Path) -> None:
    """A tiny Llama in GGUF, float32, with a tokenizer of a few tokens."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b c"])
    shapes = {"token_embd": (8, 32), "output_norm": (32,), "output": (8, 32)}
    block = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "ffn_gate": (48, 32),
        "ffn_up": (48, 32),
        "ffn_down": (32, 48),
    }
    block |= {f"attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    source = resolve(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    assert_same(source.load(), reference)
    assert source.kind == "transformers" and source.size_before == file.stat().st_size
    assert source.name == resolve(file).name == OtherGgufSource(file).name == "tiny"
    assert "was dequantized to float32" in source.notes[0]
    assert outputs(source.load(), source.example())
    assert getattr(source.config, "quantization_config", None) is None
    source.save_extras(tmp_path / "out")
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert resolve(file).names() == source.names()
    shutil.copy(file, tmp_path / "other.gguf")
    assert "holds 2 GGUF files: name the one" in refused(tmp_path)
    file.write_bytes(b"GGUF but not really")
    assert "tiny.gguf has version" in refused(file)
