"""GGUF both ways: bytes that gguf-py reads alike, the same logits in llama.cpp, and files of others on our kernels."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import laconic
from laconic.errors import BadInput
from laconic.interop.ggml_blocks import encode
from laconic.interop.gguf import GgufModel, export_gguf, ggml_name, hugging_face_name
from laconic.interop.gguf_file import GgufFile, write_gguf
from laconic.nn import is_packed, packed_specs
from laconic.pipeline.export import export
from laconic.pipeline.source import resolve
from laconic.pipeline.source_quantized import GgufSource
from tests.interop.models import drawn, in_llama_cpp, logits, off, rounded_to
from tests.pipeline.runs import run_cli

pytest.importorskip("transformers")
llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python, which files are replayed in, is not installed",
)
# Scheme of ours -> type of llama.cpp, and how far its kernels are off, which round inputs to 8 bits.
SCHEMES = {
    "v1/int4/group32/float16/minmax/znone/nearest": ("Q4_0", 0.03),
    "v1/int8/group32/float16/minmax/znone/nearest": ("Q8_0", 0.03),
    "v1/ternary/channel/float16/absmean/znone/nearest": ("TQ2_0", 0.03),
    "v1/int4/group32/float16/minmax/zint/nearest": ("Q4_1", 0.03),
}


@pytest.fixture(scope="module")
def model():
    return drawn()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """`written(scheme)`: an artifact, its GGUF file and what export said."""
    known = {}

    def make(scheme: str):
        if scheme not in known:
            folder = tmp_path_factory.mktemp("gguf")
            artifact = rounded_to(model, folder / "artifact", scheme)
            known[scheme] = artifact, folder / "m.gguf", export(artifact, "gguf", folder / "m.gguf")
        return known[scheme]

    return make


@pytest.fixture
def floats(model, tmp_path):
    """The float model as a GGUF file."""
    export(model, "gguf", tmp_path / "float.gguf")
    return tmp_path / "float.gguf"


def refused(*arguments: object) -> str:
    with pytest.raises(BadInput) as caught:
        laconic.load(*arguments)
    return str(caught.value)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gguf_py_reads_what_we_wrote(written, scheme):
    gguf = pytest.importorskip("gguf")
    artifact, file, said = written(scheme)
    kind = SCHEMES[scheme][0]
    assert said["types"] == {kind: 16} and said["bytes"] == file.stat().st_size
    packed, family = laconic.load(artifact), GgufModel(GgufFile(file))
    for tensor in gguf.GGUFReader(file).tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = packed.get_submodule(hugging_face_name(tensor.name).removesuffix(".weight")).weight.detach().float()
        assert np.array_equal(
            theirs, family.file.decoded(tensor.name, family.file.raw(tensor.name)).reshape(theirs.shape)
        )
        back = family.read(hugging_face_name(tensor.name))
        assert torch.allclose(back, ours, rtol=0, atol=0 if said["exact"] else 2e-3 * float(ours.abs().max()))
    assert said["exact"] == (kind != "Q4_1")


@llama_cpp
@pytest.mark.parametrize("scheme", SCHEMES)
def test_replay_in_llama_cpp(written, scheme):
    artifact, file, _ = written(scheme)
    assert off(in_llama_cpp(file), logits(laconic.load(artifact))) < SCHEMES[scheme][1]


@llama_cpp
@pytest.mark.parametrize(
    "other",
    [
        {"family": "Llama"},
        {
            "family": "Llama",
            "tied": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        {"family": "Mistral", "sliding_window": None},
        {"family": "Qwen2"},
        {"family": "Qwen3", "head_dim": 32},
    ],
    ids=["llama", "tied", "mistral", "qwen2", "qwen3"],
)
def test_replay_of_a_float_model(tmp_path, other):
    net = drawn(**other)
    export(net, "gguf", tmp_path / "m.gguf")
    assert off(in_llama_cpp(tmp_path / "m.gguf"), logits(net)) < 1e-3
    assert off(logits(resolve(tmp_path / "m.gguf").load()), logits(net)) < 1e-5


def test_exact_keeps_every_value(model, tmp_path):
    scheme = "v1/int4/group32/float16/minmax/zint/nearest"
    artifact = rounded_to(model, tmp_path / "artifact", scheme)
    said = export(artifact, "gguf", tmp_path / "m.gguf", exact=True)
    assert said["exact"] and "Q4_1" not in said["types"]
    ours, theirs = laconic.load(artifact), laconic.load(tmp_path / "m.gguf")
    for path in packed_specs(ours):
        name = path.removesuffix(".weight")
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight)


def test_what_fits_no_type_is_float_with_a_note(model, tmp_path):
    artifact = rounded_to(model, tmp_path / "artifact", "v1/levelsnf4/group64/float32/minmax/znone/nearest", head=False)
    said = export(artifact, "gguf", tmp_path / "m.gguf", exact=True)
    assert said["types"] == {"F32": 16} and "fits no type of GGUF" in said["notes"][0]
    ours, theirs = laconic.load(artifact), laconic.load(tmp_path / "m.gguf")
    assert torch.equal(logits(ours), logits(theirs)) or off(logits(ours), logits(theirs)) < 1e-5


def test_floats_are_rounded_to_a_type_on_request(model, tmp_path):
    said = export(model, "gguf", tmp_path / "m.gguf", floats="Q8_0")
    assert said["types"] == {"Q8_0": 16} and not said["exact"]
    there = GgufModel(GgufFile(tmp_path / "m.gguf"))
    down = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(there.file.raw("blk.0.ffn_down.weight"), encode(down, "Q8_0"))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_runs_packed_with_its_values(written, scheme):
    artifact, file, said = written(scheme)
    found = laconic.load(file)
    assert all(is_packed(module) for module in found.modules() if isinstance(module, torch.nn.Linear))
    source = resolve(file)
    for path in packed_specs(found):
        values, name = source.read(path), path.removesuffix(".weight")
        assert torch.allclose(found.get_submodule(name).weight, values, rtol=0, atol=4e-7 * float(values.abs().max()))
    assert off(logits(found), logits(source.load())) < 1e-5
    if said["exact"]:
        assert off(logits(found), logits(laconic.load(artifact))) < 1e-5


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "TQ1_0", "MXFP4", "F16", "BF16"])
def test_every_type_that_others_write_is_read(model, floats, tmp_path, kind):
    file = GgufFile(floats)
    tensors = []
    for name, tensor in file.tensors.items():
        values = file.decoded(name, file.raw(name)).reshape(tensor.shape)
        if len(tensor.shape) == 1:
            tensors.append((name, "F32", tensor.shape, values))
        elif kind in ("F16", "BF16"):
            half = torch.from_numpy(values.copy()).to(torch.float16 if kind == "F16" else torch.bfloat16)
            tensors.append((name, kind, tensor.shape, half.view(torch.int16).numpy()))
        else:
            tensors.append((name, kind, tensor.shape, encode(values, kind)))
    write_gguf(tmp_path / "m.gguf", file.values, tensors)
    found, source = laconic.load(tmp_path / "m.gguf"), resolve(tmp_path / "m.gguf")
    assert len(packed_specs(found)) == (0 if kind in ("F16", "BF16") else 16)
    assert off(logits(found), logits(source.load())) < 1e-5
    assert source.size_before == (tmp_path / "m.gguf").stat().st_size


def test_the_same_values_as_through_transformers(floats):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        floats.parent, gguf_file=floats.name, dtype=torch.float32
    )
    ours = resolve(floats).load()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_a_file_is_compressed_further(floats, tmp_path, capsys):
    code, _, said = run_cli(capsys, "compress", floats, "--out", tmp_path / "out", "--budget", "size=3x", "--quiet")
    assert code == 0, said
    assert len(packed_specs(laconic.load(tmp_path / "out"))) > 4


def test_k_quants_are_read_through_gguf(floats, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = GgufFile(floats)
    raw = np.random.default_rng(0).integers(0, 256, (256, 210), np.uint8)  # Q6_K: 210 bytes of 256
    raw[:, -2:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    tensors = [(n, "F32", t.shape, file.decoded(n, file.raw(n))) for n, t in file.tensors.items()]
    write_gguf(tmp_path / "m.gguf", file.values, tensors)
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 16
    start = GgufFile(tmp_path / "m.gguf").tensors[name.decode()].offset
    changed = bytearray(data)
    changed[at : at + 4] = struct.pack("<I", 14)
    changed[start : start + raw.nbytes] = raw.tobytes()
    (tmp_path / "k.gguf").write_bytes(changed)
    found = laconic.load(tmp_path / "k.gguf").model.layers[0].self_attn.o_proj
    assert not is_packed(found)
    assert np.array_equal(found.weight.detach().numpy(), gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q6_K))


def test_k_quants_without_gguf_are_refused(floats, tmp_path, monkeypatch):
    data = bytearray(floats.read_bytes())
    name = b"blk.0.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 16
    data[at : at + 4] = struct.pack("<I", 12)
    (tmp_path / "k.gguf").write_bytes(data)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "type Q4_K, which the package gguf reads: run `pip install gguf`" in refused(tmp_path / "k.gguf")


# --- names and bad files ---------------------------------------------------------------------------------------------


def test_names_both_ways(model):
    for name, _ in model.named_parameters():
        assert hugging_face_name(ggml_name(name)) == name
    assert hugging_face_name("blk.0.ffn_gate_exps.weight") is None and ggml_name("model.layers.0.other.weight") is None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: b"", "is no GGUF file"),
        (lambda data: b"GGML" + data[4:], "is no GGUF file"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "has version 1"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "counts"),
        (lambda data: data[:300], "in the middle of a value"),
        (lambda data: data[:-4096], "the file has"),
        (lambda data: data.replace(b"token_embd.weight", b"token_embd_weight"), "no whole language model"),
        (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "has no place"),
        (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "are not in the weight files"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_cuont"), "llama.block_count is None"),
    ],
    ids=["empty", "magic", "endian", "version", "count", "header", "cut", "embedding", "name", "missing", "value"],
)
def test_broken_files_get_a_sentence(floats, tmp_path, spoil, says):
    (tmp_path / "bad.gguf").write_bytes(spoil(floats.read_bytes()))
    assert says in refused(tmp_path / "bad.gguf")


def test_other_families_are_refused_with_the_way_out(model, floats, tmp_path):
    file = GgufFile(floats)
    tensors = [(n, "F32", t.shape, file.decoded(n, file.raw(n))) for n, t in file.tensors.items()]
    write_gguf(tmp_path / "m.gguf", {**file.values, "general.architecture": "mamba"}, tensors)
    assert "architecture 'mamba'" in refused(tmp_path / "m.gguf")
    with pytest.raises(BadInput, match="export it to onnx or torch instead"):
        export(drawn("GPTNeoX", num_key_value_heads=None), "gguf", tmp_path / "x.gguf")
    with pytest.raises(BadInput, match="rotary positions of type"):
        scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        export(drawn(rope_parameters=scaled), "gguf", tmp_path / "x.gguf")


# --- tokenizers ------------------------------------------------------------------------------------------------------

TEXT = [
    "the cat sat on the mat in 1984, and  the dog did not",
    "cats and dogs: 12 of them",
    "a bond market",
    "the the cat",
]


def tokenizer_of(folder: Path, kind: str) -> Path:
    """A folder with a tokenizer that was trained on a few sentences: byte-level, or in the manner of sentencepiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    transformers = pytest.importorskip("transformers")
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.pre_tokenizer = tokenizer.pre_tokenizer if kind == "bytes" else None
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    whole.save_pretrained(folder)
    return folder


@llama_cpp
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_text_becomes_the_same_tokens_in_llama_cpp(tmp_path, kind):
    import llama_cpp as cpp
    from transformers import AutoTokenizer

    net = drawn(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=360)
    net.save_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of(tmp_path / "m", kind))
    said = export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert not said["notes"]
    llama = cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in TEXT:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.token_bos() == tokenizer.bos_token_id and llama.token_eos() == tokenizer.eos_token_id
    llama.close()
    pytest.importorskip("gguf")
    export(tmp_path / "m.gguf", "gguf", tmp_path / "again.gguf")
    before, after = (GgufFile(tmp_path / name).values for name in ("m.gguf", "again.gguf"))
    assert before == after | {"general.name": before["general.name"]}


# --- the trained model -----------------------------------------------------------------------------------------------


@pytest.mark.fetched
@pytest.mark.slow
@llama_cpp
def test_smollm_there_and_back(tmp_path):
    from laconic.tasks import fetch

    try:
        file = next(Path(fetch("smollm")).glob("*.gguf"))
    except BadInput as error:
        pytest.skip(f"smollm is not in the cache and could not be fetched: {error}")
    packed = laconic.load(file)
    ids = list(range(100, 140))
    ours = logits(packed, ids)
    assert off(in_llama_cpp(file, ids), ours) < 0.05
    assert bool((in_llama_cpp(file, ids).argmax(-1) == ours.argmax(-1)).float().mean() > 0.9)
    said = export(file, "gguf", tmp_path / "m.gguf")
    assert set(said["types"]) == {"Q4_1", "Q8_0"}
    assert off(in_llama_cpp(tmp_path / "m.gguf", ids), in_llama_cpp(file, ids)) < 1e-4


@pytest.mark.fetched
@pytest.mark.slow
@llama_cpp
def test_the_tokenizer_of_smollm_goes_along(tmp_path):
    import llama_cpp as cpp

    from laconic.tasks import fetch

    try:
        file = next(Path(fetch("smollm")).glob("*.gguf"))
    except BadInput as error:
        pytest.skip(f"smollm is not in the cache and could not be fetched: {error}")
    GgufSource(file).save_extras(tmp_path)
    net = drawn(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=49152)
    assert not export_gguf(net, tmp_path / "m.gguf", tokenizer=tmp_path).notes
    ours, theirs = (cpp.Llama(str(one), vocab_only=True, verbose=False) for one in (tmp_path / "m.gguf", file))
    for text in (
        "Call me Ishmael. Some years ago, in 1851, it's\n\n  odd",
        "<|im_start|>user\nnaïve 東京 🙂<|im_end|>",
    ):
        for special in (False, True):
            assert ours.tokenize(text.encode(), False, special) == theirs.tokenize(text.encode(), False, special)
    same = (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.chat_template",
    )
    mine, yours = GgufFile(tmp_path / "m.gguf").values, GgufFile(file).values
    assert all(mine[key] == yours[key] for key in same)
