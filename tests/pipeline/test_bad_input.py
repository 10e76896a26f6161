"""Bad input: one clear sentence, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import laconic
from laconic.errors import BadInput, Impossible
from laconic.pipeline import run as run_module
from laconic.pipeline import workspace as workspace_module
from laconic.pipeline.compress import compress, plan
from tests.zoo import ZOO

from .runs import hashes, run_cli, save, token_file, trained_classifier


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save("llama", tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture
def copied(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(sentence, *arguments)`: the command line says the sentence, exits with 2 and writes nothing."""

    def check(sentence: str, *arguments: object) -> str:
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
        code, printed, said = run_cli(capsys, "compress", "--out", tmp_path / "out", "--json", *arguments)
        assert code == 2, said
        assert printed == ""
        assert sentence in said and said.startswith("laconic: ") and said.count("\n") == 1, said
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
        return said

    return check


def edit_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


# --- the model ------------------------------------------------------------------------------------


def test_no_model_and_no_task(refused):
    refused("no model was named")


def test_a_model_that_is_not_there(refused, tmp_path):
    refused("is neither a folder", tmp_path / "nowhere")


def test_missing_weights(refused, copied):
    (copied / "model.safetensors").unlink()
    refused("holds no weights", copied)


def test_half_a_checkpoint(refused, copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused("model.safetensors", copied)


def test_a_header_that_lies(refused, copied):
    file = copied / "model.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    refused("model.safetensors", copied)


def test_tensors_are_missing(refused, copied):
    edit_weights(copied, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    refused("model.layers.0.mlp.up_proj.weight", copied)


def test_a_wrong_dtype(refused, copied):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(copied, lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(f"{name} is stored as int8", copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(refused, copied, name, value):
    def spoil(tensors):
        tensors[name].view(-1)[3] = value

    edit_weights(copied, spoil)
    refused(name, copied)


def test_weights_that_are_not_finite_are_found_while_streaming(refused, copied, monkeypatch):
    monkeypatch.setattr(run_module.Run, "must_stream", lambda self, meta: True)
    edit_weights(copied, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    refused("model.layers.1.mlp.up_proj.weight", copied)


def test_a_pickle(refused, copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    refused("a pickle can run code", copied)


def test_remote_code(refused, copied):
    edit_config(copied, model_type="mine", architectures=["MyModel"], auto_map={"AutoConfig": "c.C"})
    refused("--trust-remote-code", copied)


def test_quantized_by_another_tool(refused, copied):
    edit_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
    refused("already quantized by another tool (gptq)", copied)


def test_an_artifact_as_input(refused, llama, tmp_path):
    compress(llama, budget="size=5x", out=tmp_path / "artifact")
    refused("already compressed by laconic", tmp_path / "artifact")


def test_an_artifact_whose_paths_climb_out(llama, tmp_path):
    out = compress(llama, budget="size=5x", out=tmp_path / "artifact").out
    manifest = json.loads((out / "laconic.json").read_text())
    manifest["hashes"]["../../secret"] = "0" * 64
    (out / "laconic.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="secret"):
        laconic.load(out, verify=True)


def test_two_copies_of_one_tied_weight(refused, tmp_path):
    folder = save("llama_tied", tmp_path / "model")

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit_weights(folder, untie)
    refused("lm_head.weight", folder)


def test_a_plain_module_without_an_example(tmp_path):
    with pytest.raises(BadInput, match="how to call it is not known"):
        compress(nn.Linear(64, 64), out=tmp_path / "out")
    with pytest.raises(BadInput, match="how to call it is not known.*NPZ file of its inputs"):
        compress(nn.Linear(64, 64), lambda model: 1.0, out=tmp_path / "out")  # a function that scores, without batches


def test_a_plain_module_is_called_as_its_data_are(tmp_path):
    model, data = trained_classifier(tmp_path)
    named = compress(model, data, "size=4x", out=tmp_path / "out")
    assert named.record["drop"] is not None and named.record["coverage"] > 0.5
    given = compress(model, data, "size=4x", example=torch.zeros(2, 24), out=tmp_path / "given")
    assert hashes(named.out) == hashes(given.out)
    units = [{k: row[k] for k in ("name", "scheme")} for row in plan(model, data, "size=4x")["units"]]
    assert units == [{k: row[k] for k in ("name", "scheme")} for row in plan(model, data, "size=4x", example=torch.zeros(2, 24))["units"]]


# --- the data -------------------------------------------------------------------------------------


def test_data_that_is_not_there(refused, llama, tmp_path):
    refused("is no data", llama, "--data", tmp_path / "nowhere.npz")


def test_empty_data(refused, llama, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    refused("is empty", llama, "--data", tmp_path / "empty.txt")


def test_a_single_row(refused, llama, tmp_path):
    file = token_file(tmp_path / "one.npz", rows=1)
    refused("1 example, too few", llama, "--data", file)


def test_the_wrong_modality(refused, llama, tmp_path):
    np.savez(tmp_path / "images.npz", pixel_values=np.zeros((20, 3, 8, 8), np.float32))
    refused("reads input_ids", llama, "--data", tmp_path / "images.npz")


def test_data_and_task_together(refused, llama, tmp_path):
    file = token_file(tmp_path / "t.npz")
    refused("give one of them", llama, "--data", file, "--task", "minilm-bbc")


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 64)
        self.inner = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


def test_a_forward_that_fails_on_the_data_is_named_with_its_place(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(40, 23)).astype(np.float32))
    with pytest.raises(BadInput, match=r"forward fails on the data in first: RuntimeError: .*shapes"):
        compress(
            Fails(), tmp_path / "data.npz", "size=1.5x", example=torch.zeros(2, 24), out=tmp_path / "out"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ("small", "does not parse at 'small'"), ("size=", "does not parse"), ("size=4y", "is no size"),
        ("size=0x", "above zero"), ("size=-4x", "above zero"), ("size=nanx", "above zero"),
        ("drop=-1", "a finite number of zero or more"),
        ("size=infx", "finite"), ("size=4x,size=20MB", "bounds size twice"), ("speed=2x", "names 'speed'"),
        ("drop=lots", "does not parse at 'drop=lots'"), ("", "is empty"), (",", "is empty"),
        ("latency=2x", "a latency is measured on data"), ("memory=8KB", "the least is"),
        ("size=4x,drop=1", "only be held on data"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be_worked_with(refused, llama, budget, sentence):
    refused(sentence, llama, "--budget", budget)


def test_an_impossible_budget_prints_the_least_figure(refused, llama, capsys):
    least = plan(llama, budget="size=2x")["least"]
    said = refused("cannot be reached", llama, "--budget", "size=1000x")
    assert f"{least:,} bytes" in said
    ratio = re.search(r"\((.*x) smaller\)", said)[1]
    assert plan(llama, budget=f"size={ratio}")["size_after"] >= least, "what is printed can be asked for"
    # Bars are for terminals: where they are asked for and there is none, the sentence stays the only line.
    assert run_cli(capsys, "compress", "--budget", "size=1000x", "--out", llama.parent / "no", llama) == (2, "", said)
    assert compress(llama, budget=f"size={least}B", out=llama.parent / "least").size_after == least
    with pytest.raises(Impossible):
        plan(llama, budget=f"size={least - 1}B")


def test_the_least_figure_counts_folded_batch_norms(tmp_path):
    entry = ZOO["convnet"]
    model = entry.build()
    options = {"example": entry.example(model)}
    least = plan(model, budget="size=1.01x", **options)["least"]
    assert compress(model, budget=f"size={least}B", out=tmp_path / "o", **options).size_after == least


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"budget": 4}, r"a budget is a text or a Budget, not 4 \(int\): write it like"),
        ({"data": torch.zeros(3, 24)}, "data is a file, .*, not a Tensor: save arrays"),
        ({"recipe": {"passes": []}}, "a recipe is a Recipe or a YAML file, not a dict"),
        ({"batch": 0}, "batch must be at least 1, not 0"), ({"seq": 0}, "seq must be at least 1, not 0"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_arguments_of_another_kind(tmp_path, given, sentence):
    with pytest.raises(BadInput, match=sentence):
        compress(nn.Linear(24, 64), example=torch.zeros(3, 24), out=tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


# --- everything else ------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--keep", "--exclude"])
def test_a_pattern_that_matches_nothing(refused, llama, flag):
    refused(f"{flag} 'encoder.*' matches no parameter", llama, flag, "encoder.*")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("passes: [{pass: magic}]", "'magic'"),
        (
            "passes: [{pass: quantize}, {pass: fold_batchnorm}]",
            "quantize spoils what fold needs",
        ),
        ("passes: [{pass: quantize}, {pass: quantize}]", "stands twice"),
        ("passes: [{pass: quantize, bits: [9]}]", "bits are some of"),
        ("passes: [{pass: quantize, units: {lm_head.weight: int4}}]", "scheme 'int4'"),
        ("passes: [{pass: quantize, units: {nope.weight: null}}]", "names 'nope.weight'"),
        ("passes: [{pass: quantize, speed: 3}]", "speed"),
        ("version: 2", "version"),
        ("- a list", "its top"),
        ("a: [", "is no YAML"),
    ],
)
def test_recipes_that_do_not_hold(refused, llama, tmp_path, text, sentence):
    (tmp_path / "recipe.yaml").write_text(text)
    refused(sentence, llama, "--recipe", tmp_path / "recipe.yaml")


def test_a_recipe_that_is_missing_or_no_text(refused, llama, tmp_path):
    refused("cannot be read", llama, "--recipe", tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    refused("is no text", llama, "--recipe", tmp_path / "bytes.yaml")


def test_a_gpu_that_is_not_there(refused, llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("sees no GPU here", llama, "--device", "cuda")
    refused("is not known", llama, "--device", "abacus")


def test_an_output_that_exists(refused, llama, tmp_path):
    (tmp_path / "out").mkdir()
    refused("exists; name another folder or pass --overwrite", llama)


def test_overwrite_never_replaces_what_is_no_artifact(refused, llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused("is not an artifact of laconic", llama, "--overwrite")


def test_overwrite_never_replaces_the_data_that_is_read(refused, llama, tmp_path):
    compress(llama, budget="size=4x", out=tmp_path / "out")
    file = token_file(tmp_path / "out" / "tokens.npz")
    refused("which is read", llama, "--overwrite", "--data", file)


def test_a_full_disk(refused, llama, monkeypatch):
    monkeypatch.setattr(
        workspace_module.shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1000)
    )
    refused("1,000 are free: make room", llama)


def test_a_disk_that_fills_up_on_the_way_keeps_what_is_solved(llama, tmp_path, monkeypatch):
    whole = workspace_module.os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(workspace_module.os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device; make room and run again with --resume"):
        compress(llama, budget="size=5x", out=tmp_path / "out")
    monkeypatch.setattr(workspace_module.os, "fsync", whole)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tmp"))
    assert compress(llama, budget="size=5x", out=tmp_path / "out", resume=True).units_reused > 0


def test_an_output_that_cannot_be_made(refused, llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be made"):
        compress(llama, budget="size=5x", out=tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("text", "sentence"), [("lots", "is no size"), ("100MB", "at least"), ("0GB", "a byte at least")]
)
def test_memory_bounds_that_cannot_be_kept(refused, llama, text, sentence):
    refused(sentence, llama, "--max-ram", text)


def test_coverage_below_the_least_leaves_nothing_behind(refused, llama):
    refused(
        "below --min-coverage", llama, "--budget", "size=2x", "--min-coverage", "0.99", "--keep", "lm_head"
    )


class Odd(nn.Module):
    """Layers without elements, and rows that no group length divides."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Linear(0, 17)
        self.none = nn.Linear(17, 0)
        self.odd = nn.Linear(17, 131)
        self.prime = nn.Linear(131, 67)
        self.conv = nn.Conv1d(67, 7, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.odd(x + self.nothing(x[:, :0])))
        return self.conv(torch.relu(self.prime(h))[..., None])[..., 0] + self.none(x).sum()


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_zero_size_layers_and_lengths_that_do_not_divide_work(tmp_path, ratio):
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(3, 17)
    result = compress(model, budget=f"size={ratio}x", example=x, out=tmp_path / "out")
    loaded = laconic.load(result.out, into=Odd())
    assert torch.equal(loaded(x), laconic.load(result.out, into=Odd())(x)) and torch.isfinite(loaded(x)).all()
    reasons = {row["name"]: row["reason"] for row in result.record["ledger"]}
    assert reasons["nothing.weight"] == reasons["none.weight"] == "has no elements"
    assert result.size_after <= result.size_before / ratio
