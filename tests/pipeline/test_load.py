"""The whole zoo packed, written and loaded: by `laconic.load`, Auto classes, a fresh process; and errors."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import laconic
from laconic.core.record import FOLD, Record, apply_records
from laconic.errors import BadInput
from laconic.nn import is_packed, packed_specs
from laconic.numerics import Int, Scale, Scheme
from laconic.pipeline.load import load
from laconic.pipeline.source import resolve
from laconic.tasks.cifar_cnn import CifarCNN
from tests.pipeline.artifacts import round_records, rounded, write_artifact
from tests.pipeline.runs import run_cli, save, token_file
from tests.zoo import ZOO, outputs

transformers = pytest.importorskip("transformers")
REPOSITORY = Path(__file__).parents[2]
INT3 = Scheme(Int(3), Scale("group", group=20, dtype="bfloat16"), zero="int")


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Loading bars and reports of transformers are not what is tested."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    caplog.set_level(logging.ERROR)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: the artifact of a zoo model, its float model, and the outputs of the packed one."""
    known = {}

    def make(name: str):
        if name not in known:
            entry = ZOO[name]
            model = entry.build()
            source = resolve(model)
            records = round_records(source)
            folder = write_artifact(tmp_path_factory.mktemp(name) / "out", source, records)
            packed = source.load()
            apply_records(packed, records)
            known[name] = folder, model, outputs(packed, entry.example(model))
        return known[name]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """`copied(name)`: an artifact of one's own, to damage."""
    return lambda name: Path(shutil.copytree(made(name)[0], tmp_path / name))


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether all outputs are bit-equal."""
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def float_skeleton(name: str) -> nn.Module:
    """A model of other values, which loading must replace to the last one."""
    model = ZOO[name].build()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 0.37 if tensor.is_floating_point() else 3))
    return model


# --- the zoo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_load_is_bit_equal(made, name):
    folder, model, expected = made(name)
    entry = ZOO[name]
    loaded = load(folder, into=None if entry.auto else float_skeleton(name), verify=True)
    assert not loaded.training
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if n.endswith(("_packed", "_shape")))
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
    assert same(outputs(loaded, entry.example(model)), expected)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.auto])
def test_auto_class_is_bit_equal_and_saves_again(made, name, tmp_path):
    folder, model, expected = made(name)
    entry = ZOO[name]
    auto = getattr(transformers, entry.auto)
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(outputs(loaded, entry.example(model)), expected)
    assert packed_specs(loaded) == packed_specs(load(folder))
    loaded.save_pretrained(tmp_path / "again")
    for again in (auto.from_pretrained(tmp_path / "again"), load(tmp_path / "again")):
        assert same(outputs(again, entry.example(model)), expected)


def test_nothing_packed_is_skipped(made):
    """Every parameter of two dimensions is packed, in memory as on disk, and in both ways of loading."""
    for name in ("mixtral", "bert", "whisper"):
        folder, model, _ = made(name)
        wanted = {n for n, p in model.named_parameters() if p.ndim >= 2}
        assert set(packed_specs(load(folder))) == wanted


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_low_bits_in_half_precision(name, tmp_path):
    """A bfloat16 folder: scales keep their own type, computing happens in the model's."""
    entry = ZOO[name]
    model = entry.build()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "float")
    source = resolve(tmp_path / "float")
    records = round_records(source, INT3)
    folder = write_artifact(tmp_path / "out", source, records)
    packed = source.load()
    apply_records(packed, records)
    expected = outputs(packed, entry.example(model))
    assert expected[0].dtype == torch.bfloat16
    assert same(outputs(load(folder), entry.example(model)), expected)
    auto = getattr(transformers, entry.auto).from_pretrained(folder)
    auto.save_pretrained(tmp_path / "again")
    for again in (auto, load(tmp_path / "again")):
        assert same(outputs(again, entry.example(model)), expected)


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "t5", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_changes_computing_and_not_scales(made, name, dtype):
    """T5 keeps parts in float32 when loaded in float16: so do packed ones."""
    folder, model, _ = made(name)
    entry = ZOO[name]
    ours, theirs = (
        load(folder, dtype=dtype),
        getattr(transformers, entry.auto).from_pretrained(folder, dtype=dtype),
    )
    for loaded in (ours, theirs):
        buffers = dict(loaded.named_buffers())
        assert {buffers[f"{path}_scale"].dtype for path in packed_specs(loaded)} == {torch.float16}
    assert {n: t.dtype for n, t in ours.state_dict().items()} == {n: t.dtype for n, t in theirs.state_dict().items()}
    assert same(outputs(ours, entry.example(model)), outputs(theirs, entry.example(model)))


def test_fresh_process(made, tmp_path):
    """Loaded by a process that has nothing but the folder, in both orders of import."""
    names = ["gpt2", "qwen2_moe", "t5", "clip", "lstm"]
    script = f"""
import torch
import {{first}}
import laconic, transformers
from tests.zoo import ZOO, outputs
for name, folder in {[(name, str(made(name)[0])) for name in names]!r}:
    entry = ZOO[name]
    model = entry.build()
    example = entry.example(model)
    found = {{{{"load": outputs(laconic.load(folder, into=None if entry.auto else model), example)}}}}
    if entry.auto:
        found["auto"] = outputs(getattr(transformers, entry.auto).from_pretrained(folder), example)
    for how, values in found.items():
        torch.save(values, r"{tmp_path}/" + name + "." + how)
"""
    for first in ("laconic", "transformers.quantizers.auto"):
        env = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS=str(torch.get_num_threads()))
        done = subprocess.run(
            [sys.executable, "-c", script.format(first=first)],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for name in names:
            for how in ("load", "auto") if ZOO[name].auto else ("load",):
                file = tmp_path / f"{name}.{how}"
                assert same(torch.load(file, weights_only=True), made(name)[2]), (name, how, first)
                file.unlink()


def test_import_is_light():
    """`import laconic` brings neither torch nor transformers; a finder goes when its work is done."""
    script = (
        "import sys, laconic\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import transformers\n"
        "from transformers.quantizers import auto\n"
        "assert 'laconic' in auto.AUTO_QUANTIZER_MAPPING\n"
        "waiting = [f.watched for f in sys.meta_path if type(f).__module__ == 'laconic._hooks']\n"
        "assert 'transformers.quantizers.auto' not in waiting, waiting\n"
        "import inspect; assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


# --- other classes than the saved one -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "llama_tied", "whisper", "vit", "wav2vec2", "mixtral"])
def test_base_class_drops_the_head_only(made, name):
    folder, model, _ = made(name)
    base, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    whole = load(folder)
    inner = getattr(whole, whole.base_model_prefix)
    wanted = {k: v for k, v in inner.state_dict().items()}
    found = base.state_dict()
    assert wanted.keys() <= found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert len(packed_specs(base)) >= len(packed_specs(inner)) > 0


@pytest.mark.parametrize(("auto", "config"), [("GPT2LMHeadModel", "gpt2"), ("LlamaForCausalLM", "llama_tied")])
def test_head_on_a_packed_base_is_tied_to_it(auto, config, tmp_path):
    """The base model knows of no tie; with a head, its weight becomes an alias of the packed embedding."""
    whole = ZOO[config].build()
    base = getattr(whole, whole.base_model_prefix)
    folder = rounded(base, tmp_path / "out")
    loaded = getattr(transformers, auto).from_pretrained(folder)
    expected = rounded_in_memory(whole)
    example = ZOO[config].example(whole)
    assert same(outputs(loaded, example), outputs(expected, example))
    assert is_packed(loaded.lm_head) and not list(loaded.lm_head.parameters())
    loaded.save_pretrained(tmp_path / "again")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "again")
    assert same(outputs(again, example), outputs(expected, example))


def rounded_in_memory(model: nn.Module) -> nn.Module:
    source = resolve(model)
    packed = source.load()
    apply_records(packed, round_records(source))
    return packed


def test_base_saved_again_after_dropping_a_head(made, tmp_path):
    """What is saved again names the modules as the class has them now."""
    base = transformers.AutoModel.from_pretrained(made("gpt2")[0])
    base.save_pretrained(tmp_path / "base")
    saved = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert all(not row["path"].startswith(("transformer.", "lm_head")) for row in saved["records"])
    again = transformers.AutoModel.from_pretrained(tmp_path / "base")
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)


def test_another_head_is_initialised_by_transformers(made):
    folder, model, _ = made("bert")
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert "classifier.weight" in info["missing_keys"]
    assert is_packed(loaded.bert.encoder.layer[0].attention.self.query)
    assert loaded.classifier.weight.requires_grad and loaded.classifier.weight.std() > 0


# --- through transformers -----------------------------------------------------------------------------------


def test_from_pretrained_needs_config_and_weights_alone(made, tmp_path):
    folder, model, expected = made("bert")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert same(outputs(loaded, ZOO["bert"].example(model)), expected)


def test_generate(made):
    folder, _, _ = made("llama_tied")
    ids = torch.arange(5, 12)[None]
    found = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (
        load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder),
    )]  # fmt: skip
    assert torch.equal(*found) and found[0].shape[1] > 7


def test_adapters_can_be_trained_on_top(made):
    """Gradients pass through packed layers to what lies below."""
    model = transformers.AutoModelForCausalLM.from_pretrained(made("llama")[0])
    assert model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
    embeds = torch.randn(1, 5, 48, requires_grad=True)
    model(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_config_with_a_parameter_that_the_class_lacks(copied):
    folder = copied("gpt2")
    edit(folder / "config.json", lambda config: config.update(n_layer=1))
    with pytest.raises(BadInput, match=r"transformer\.h\.1.* was changed, and GPT2LMHeadModel has no such part"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_lack_a_packed_tensor(copied):
    """transformers alone would initialise it at random and print a table."""
    folder = copied("gpt2")
    drop(folder, "transformer.h.1.attn.c_attn.weight_scale")
    with pytest.raises(BadInput, match=r"holds nothing as transformer\.h\.1\.attn\.c_attn\.weight_scale"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_lack_a_float(copied):
    folder = copied("gpt2")
    drop(folder, "transformer.h.1.ln_1.bias")
    with pytest.raises(BadInput, match=r"lacks transformer\.h\.1\.ln_1\.bias of GPT2LMHeadModel"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_state_dict_of_another_model(made):
    """Weights handed over in memory are checked after loading."""
    folder, _, _ = made("gpt2")
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.attn.c_attn.weight_shape"] += 1
    config = transformers.AutoConfig.from_pretrained(folder)
    with pytest.raises(BadInput, match="another shape is stored beside its weights"):
        transformers.GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state)


def test_quantization_config_of_a_newer_laconic(copied):
    folder = copied("gpt2")
    edit(folder / "config.json", lambda config: config["quantization_config"].update(version=2))
    with pytest.raises(BadInput, match="has version 2 of laconic's format"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_path_that_climbs_out_of_config(copied):
    folder = copied("gpt2")
    edit(folder / "config.json", lambda c: c["quantization_config"]["records"][0].update(path="../x"))
    with pytest.raises(BadInput, match=r"'\.\./x', which climbs out"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_float_models_are_not_compressed_by_loading(tmp_path):
    from laconic.pipeline.hf import LaconicConfig

    ZOO["gpt2"].build().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="from_pretrained does not compress"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LaconicConfig())


def test_what_save_pretrained_wrote_is_opened_by_every_command(made, tmp_path, capsys):
    folder = tmp_path / "again"
    load(made("llama_tied")[0]).save_pretrained(folder)
    with pytest.raises(BadInput, match="already compressed by laconic"):
        resolve(folder)
    float_one = save("llama_tied", tmp_path / "float")
    tokens = token_file(tmp_path / "tokens.npz", rows=30)
    values = []
    for one in (folder, made("llama_tied")[0]):
        code, printed, said = run_cli(capsys, "compare", float_one, one, "--data", tokens, "--seq", 16, "--json")
        assert code == 0, said
        values.append(json.loads(printed)["value_after"])
    assert values[0] == values[1]
    assert run_cli(capsys, "inspect", folder)[0] == 2
    code, _, said = run_cli(capsys, "export", folder, "--to", "torch", "--out", tmp_path / "program.pt2")
    assert code == 0, said
    (folder / "read.py").write_text("")  # an artifact whose laconic.json is still to come
    with pytest.raises(BadInput, match="not finished"):
        load(folder)


def test_an_artifact_is_no_source(made):
    with pytest.raises(BadInput, match="already compressed by laconic"):
        resolve(str(made("gpt2")[0]))
    with pytest.raises(BadInput, match="already compressed by laconic"):
        resolve(transformers.AutoModelForCausalLM.from_pretrained(made("gpt2")[0]))


# --- laconic.load -------------------------------------------------------------------------------------------


def test_public_name():
    assert laconic.load is load


def test_own_models_need_no_skeleton(tmp_path):
    torch.manual_seed(0)
    model = CifarCNN().eval()
    folder = rounded(model, tmp_path / "out")
    images = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        assert torch.equal(load(folder)(images), rounded_in_memory(model)(images))


def test_own_model_of_other_widths_says_into(tmp_path):
    model = CifarCNN(channels=(4, 4, 4, 4, 4, 4), hidden=(8, 8)).eval()
    folder = rounded(model, tmp_path / "out")
    with pytest.raises(BadInput, match=r"does not fit this model.*record says"):
        load(folder)
    load(folder, into=CifarCNN(channels=(4, 4, 4, 4, 4, 4), hidden=(8, 8)))


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "torch.nn.Linear", "laconic.errors.BadInput", "laconic",
     "laconic.x.Y",
             "laconic.nn.packed.nn.Linear", "laconic..os.system"],
)  # fmt: skip
def test_nothing_foreign_is_imported(copied, name):
    folder = copied("called_twice")
    edit(folder / "laconic.json", lambda manifest: manifest["model"].update({"class": name}))
    with pytest.raises(BadInput, match=r"cannot build by itself.*into=model"):
        load(folder)


def test_into_works_in_place_and_on_meta(made):
    folder, model, expected = made("lstm")
    skeleton = resolve(ZOO["lstm"].build()).skeleton()
    assert next(skeleton.parameters()).is_meta
    assert load(folder, into=skeleton) is skeleton
    assert same(outputs(skeleton, ZOO["lstm"].example(model)), expected)
    with pytest.raises(BadInput, match="packed already"):
        load(folder, into=skeleton)


def test_into_of_another_structure(made):
    with pytest.raises(BadInput, match="does not fit this model"):
        load(made("lstm")[0], into=ZOO["convnet"].build())


def test_into_with_more_than_the_file_holds(made):
    model = ZOO["called_twice"].build()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(BadInput, match=r"2 tensors of the model are not in it \(extra\.weight, extra\.bias\)"):
        load(made("called_twice")[0], into=model)


def test_into_with_less_than_the_file_holds(made):
    model = ZOO["called_twice"].build()
    model.never.bias = None
    with pytest.raises(BadInput, match=r"1 in it have no place in the model \(never\.bias\)"):
        load(made("called_twice")[0], into=model)


def test_into_of_another_dtype(made):
    folder, _, _ = made("called_twice")
    with pytest.raises(BadInput, match=r"enter\.weight was float32 .* is bfloat16 in the one given"):
        load(folder, into=ZOO["called_twice"].build().to(torch.bfloat16))
    half = load(folder, into=ZOO["called_twice"].build(), dtype=torch.bfloat16)
    assert half(torch.randn(2, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_buffers_that_no_file_holds_must_be_real(made):
    model = ZOO["called_twice"].build()
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(BadInput, match=r"table of CalledTwice are on meta"):
        load(made("called_twice")[0], into=model)


# --- the mapped file ----------------------------------------------------------------------------------------


def in_file(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's bytes lie in a mapping of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if name == [str(file)] and low <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= high:
            return True
    return False


linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc to see mappings")


@linux
@pytest.mark.parametrize("name", ["llama_tied", "t5", "resnet", "convnet"])
def test_tensors_are_views_of_the_mapped_file(made, name):
    folder, model, expected = made(name)
    file = folder / "model.safetensors"
    skeleton = None if ZOO[name].auto else float_skeleton(name)
    loaded = load(folder, into=skeleton)
    stored = {n: tensor for n, tensor in load_file(file).items() if tensor.numel() and not n.startswith("__pad_")}
    tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    found = {n for n, tensor in tensors.items() if tensor.numel() and in_file(tensor, file)}
    assert found == set(stored)  # codes, scales and what is not packed
    assert {n.rpartition("_")[2] for n in found} >= {"packed", "scale"}
    loaded.to("cpu").eval().requires_grad_(False)
    assert all(in_file(tensors[n], file) for n in found)
    loaded.to(torch.float64)
    kept = {n for n, t in (dict(loaded.named_parameters()) | dict(loaded.named_buffers())).items() if in_file(t, file)}
    packed = {n for n in found if n.endswith(("_packed", "_scale", "_zero_point", "_shape"))}
    assert packed <= kept
    own = load(folder, into=None if skeleton is None else float_skeleton(name), mmap=False)
    assert not any(in_file(tensor, file) for tensor in own.state_dict().values())
    assert same(outputs(own, ZOO[name].example(model)), expected)


WIDE = "nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024), nn.Linear(1024, 4096), nn.Linear(4096, 1024)).eval()"


@linux
def test_no_second_copy_in_memory(tmp_path):
    """Memory of the process's own (not of the file's pages) after loading and an answer, against the file."""
    source = resolve(eval(WIDE))  # the script below has the same, and imports nothing of ours
    folder = write_artifact(tmp_path / "out", source, [r for r in round_records(source) if not r.path.startswith("3.")])
    size = (folder / "model.safetensors").stat().st_size
    assert size > 25e6  # seen among the bytes of torch itself
    script = f"""
import sys, torch
from torch import nn
from laconic.pipeline.load import load
def own():
    rows = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return 1024 * int(rows["Private_Dirty"].split()[0])
with torch.device("meta"):
    first, skeleton = {WIDE}, {WIDE}
example = torch.zeros(1, 1024)
with torch.inference_mode():
    load(r"{folder}", into=first, mmap=True)(example)  # what torch and the kernels keep
    del first
    before = own()
    model = load(r"{folder}", into=skeleton, mmap=sys.argv[1] == "True")
    model(example)
print(own() - before)
"""
    grown = {}
    for mapped in (True, False):
        env = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
        command = [sys.executable, "-c", script, str(mapped)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        grown[mapped] = int(done.stdout)
    assert grown[True] < 0.1 * size and grown[False] > 0.8 * size, grown


def test_what_is_written_to_mapped_weights_stays_in_this_process(made):
    """An optimizer steps on norms and biases, codes are overwritten; the file and the next load know nothing of it."""
    folder, model, expected = made("gpt2")
    before = (folder / "model.safetensors").read_bytes()
    loaded = load(folder)
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert trained
    ids = torch.arange(6)[None]
    optimizer = torch.optim.SGD(trained, 1.0)
    loaded(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        loaded.transformer.wte.weight_packed.zero_()
        loaded.transformer.ln_f.bias.data.fill_(3)
    assert not same(outputs(loaded, ZOO["gpt2"].example(model)), expected)
    assert (folder / "model.safetensors").read_bytes() == before
    assert same(outputs(load(folder), ZOO["gpt2"].example(model)), expected)


def test_a_mapped_model_outlives_its_folder(copied, made, tmp_path):
    folder = copied("llama")
    loaded = load(folder)
    shutil.rmtree(folder)
    _, model, expected = made("llama")
    assert same(outputs(copy.deepcopy(loaded), ZOO["llama"].example(model)), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert same(outputs(load_again(tmp_path / "again"), ZOO["llama"].example(model)), expected)


def load_again(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


# --- folds, devices, damage ---------------------------------------------------------------------------------


def test_folded_norms(tmp_path):
    """Records of a fold are replayed: the norm goes, the convolution gets a bias."""
    from laconic.norm import fold_batchnorm

    source = resolve(ZOO["convnet"].build())
    model = source.load()
    fold_batchnorm(model, "down", "down_bn")
    folded = resolve(model)
    records = [Record(FOLD, "down", {"norm": "down_bn"}), *round_records(folded)]
    example = ZOO["convnet"].example(model)
    apply_records(model, records[1:])
    expected = outputs(model, example)

    tensors = {name: tensor for name, tensor in model.state_dict().items()}
    folder = write_artifact(tmp_path / "out", source, [])
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    from laconic.pipeline.artifact import write_artifact_files

    write_artifact_files(folder, source=source, records=records)
    assert same(outputs(load(folder, into=ZOO["convnet"].build()), example), expected)


def test_folded_norms_of_a_transformers_model(tmp_path):
    """The same, through both roads, and into the base class, whose paths have no prefix."""
    from laconic.norm import fold_batchnorm
    from laconic.pipeline.artifact import write_artifact_files

    entry = ZOO["resnet"]
    source = resolve(entry.build())
    model = source.load()
    conv, norm = "resnet.embedder.embedder.convolution", "resnet.embedder.embedder.normalization"
    fold_batchnorm(model, conv, norm)
    expected = outputs(model, entry.example(model))
    folder = write_artifact(tmp_path / "out", source, [])
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_artifact_files(folder, source=source, records=[Record(FOLD, conv, {"norm": norm})])
    assert same(outputs(load(folder), entry.example(model)), expected)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert same(outputs(loaded, entry.example(model)), expected)
    loaded.save_pretrained(tmp_path / "again")
    base = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert base.embedder.embedder.convolution.bias is not None
    assert isinstance(base.embedder.embedder.normalization, nn.Identity)


def test_a_missing_device(made):
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="the device cuda is not usable here"):
            load(made("gpt2")[0], device="cuda")
    with pytest.raises(BadInput, match=".gpu. is not a device: name one as cpu"):
        load(made("gpt2")[0], device="gpu")
    with pytest.raises(BadInput, match="meta holds no values"):
        load(made("gpt2")[0], device="meta")


def test_damaged_files(copied):
    folder = copied("gpt2")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(BadInput, match="cut short"):
        load(folder)
    file.write_bytes(data)
    drop(folder, "transformer.ln_f.weight")
    with pytest.raises(BadInput, match=r"1 tensors of the model are not in it \(transformer\.ln_f\.weight\)"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("transformer.wte.weight_scale", "is torch.float32 .* and torch.float16 in the model"),
     ("transformer.ln_f.weight", "is torch.int32 .* and torch.float32 in the model")],
)  # fmt: skip
def test_a_tensor_of_another_dtype(copied, name, message):
    folder = copied("gpt2")
    other = torch.float32 if name.endswith("_scale") else torch.int32
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(other)}))
    with pytest.raises(BadInput, match=message):
        load(folder)


def test_a_tensor_of_another_shape(copied):
    folder = copied("gpt2")
    change_tensors(folder, lambda t: t.update({"transformer.ln_f.weight": torch.ones(7)}))
    with pytest.raises(BadInput, match=r"transformer\.ln_f\.weight has shape \(7,\)"):
        load(folder)


def edit(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def drop(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(name))


def change_tensors(folder: Path, change) -> None:
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("__pad_")}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
