"""Nested scales, block floats, codebooks and adapters: from recipe or memory to a file, and back by every reader."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import laconic
from laconic.core.lora import add_lora_, lora_layers, merge_lora_
from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.record import ADAPT
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.interop.ggml_blocks import as_blocks
from laconic.interop.matrix import QuantizedMatrix
from laconic.nn import packed_specs, unpack_parameter
from laconic.nn.packed import matrix_view, restore_view
from laconic.numerics import Scheme, fake_quantize
from laconic.pipeline.compress import compress, plan
from laconic.pipeline.source import resolve
from laconic.quant import RTN, NFConfig, lq_lora_, qlora_
from tests.zoo import ZOO, outputs

from .artifacts import round_records, write_artifact
from .runs import run_cli, save
from .test_artifact import alone, check_equal
from .test_codebooks import recipe

transformers = pytest.importorskip("transformers")

FORMS = [
    "nf4",
    "v1/levelsnf2/group16/linear4x16bfloat16/minmax/znone/nearest",
    "v1/levelsnf3/group32/linear8x256/minmax/znone/nearest",
    "v1/levelsnf8/group16/dynamic8x64/minmax/znone/nearest",
    "v1/int4/group16/dynamic8x256/minmax/zint/nearest",
    "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4", "fp8_e4m3", "fp8_e5m2",
    "v1/floate2m1/group20/e8m0/ceil/znone/away",
    "v1/codebook4/group16/float16/minmax/znone/nearest",
    "v1/codebook6x2/channel/float32/absmean/znone/nearest",
    "v1/codebook8x4/tensor/bfloat16/minmax/znone/nearest",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def test_numpy_reads_every_form(tmp_path: Path) -> None:
    """Matrices that are transposed, tied, convolutions' and odd: numpy's numbers are torch's to the bit."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(60, 7 + i) for i in range(len(FORMS)))
            self.conv = nn.Conv2d(4, 6, 3)
            self.raw = nn.Parameter(torch.randn(3, 5, 12) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None])

    torch.manual_seed(0)
    for number, model in enumerate((Odd(), ZOO["gpt2"].build())):
        source = resolve(model)
        records = round_records(source, map(Scheme.parse, itertools.cycle(FORMS[7 * number :] + FORMS[: 7 * number])))
        if number == 0:
            assert {record.spec.scheme for record in records} == {Scheme.parse(form) for form in FORMS}
        folder = write_artifact(tmp_path / str(number), source, records)
        check_equal(alone(folder, tmp_path / "found.npz"), source, records)


@pytest.mark.parametrize("name", ["llama", "mixtral", "resnet"])
def test_from_recipe_to_text(name: str, tmp_path: Path) -> None:
    """Each form in some parameter of one model: the file has its bytes, and what is loaded is the rounded float model."""
    floats = ZOO[name].build()
    auto = ZOO[name].auto
    model, options = (save(name, tmp_path / "float"), {}) if auto else (floats, {"example": ZOO[name].example(floats)})
    names = [u["name"] for u in plan(model, budget="size=1.1x", **options)["units"] if not u["reason"] or u["scheme"]]
    units = {}
    for unit, form in zip(names, itertools.cycle(FORMS), strict=False):
        scheme = Scheme.parse(form)
        rows = floats.get_parameter(unit).shape
        units[unit] = form if not scheme.refusal(math.prod(rows[1:])) and not scheme.refusal(rows[-1]) else "mxfp4"
    found = compress(model, budget="size=1x", recipe=recipe(tmp_path, units), out=tmp_path / "out", **options)
    loaded = laconic.load(found.out, into=None if auto else ZOO[name].build())
    specs = packed_specs(loaded)
    assert {path: str(spec.scheme) for path, spec in specs.items()} == {
        unit: str(Scheme.parse(form)) for unit, form in units.items()
    }
    rows = {row["name"]: row["bytes"] for row in json.loads((found.out / "laconic.json").read_text())["ledger"]}
    with torch.no_grad():
        for path, spec in specs.items():
            owner, _, attribute = path.rpartition(".")
            assert rows[path] == spec.scheme.nbytes(*spec.matrix) + 8 * len(spec.shape)
            parameter = floats.get_parameter(path)
            rounded = restore_view(fake_quantize(matrix_view(parameter, spec.view).contiguous(), spec.scheme), spec)
            assert torch.equal(unpack_parameter(loaded.get_submodule(owner), attribute), rounded), path
            parameter.copy_(rounded)
    example = ZOO[name].example(floats)
    for a, b in zip(outputs(loaded, example), outputs(floats, example), strict=True):
        torch.testing.assert_close(a, b)
    if name == "llama":
        ids = torch.tensor([[3, 5, 7]])
        said = loaded.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(said, floats.generate(ids, max_new_tokens=6, do_sample=False))
        again = transformers.AutoModelForCausalLM.from_pretrained(found.out)
        assert torch.equal(outputs(again, example)[0], outputs(loaded, example)[0])
        half = laconic.load(found.out, dtype=torch.bfloat16)
        assert half.lm_head.weight.dtype == torch.bfloat16 == half(ids).logits.dtype
        assert torch.equal(half.lm_head.weight, loaded.lm_head.weight.bfloat16())


def test_a_recipe_names_what_cannot_be(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 48), nn.ReLU(), nn.Linear(48, 16))
    options = {"budget": "size=1x", "example": torch.zeros(2, 30), "out": tmp_path / "out"}
    units = {"0.weight": "v1/codebook8x4/channel/float32/minmax/znone/nearest"}
    with pytest.raises(BadInput, match=r"packs 0\.weight as v1/codebook8x4.*rows of 30 are no whole runs of 4"):
        compress(model, recipe=recipe(tmp_path, units), **options)
    with pytest.raises(BadInput, match="mxfp5"):
        compress(model, recipe=recipe(tmp_path, {"2.weight": "mxfp5"}), **options)
    wrong = {"2.weight": "v1/floate2m1/group32/e8m0/minmax/znone/nearest"}
    with pytest.raises(BadInput, match="scales in e8m0, and no others, go by"):
        compress(model, recipe=recipe(tmp_path, wrong), **options)


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(how: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    if how == "qlora":
        qlora_(model, rank=3, alpha=6)
    elif how == "lq_lora":
        lq_lora_(model, 3, NFConfig(3, 4, "bfloat16", block=24, scale_block=16), iterations=2)
    else:
        add_lora_(model, 2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(0.02 * torch.randn_like(layer.lora_B))
    return model.eval()


@pytest.mark.parametrize("how", ["qlora", "lq_lora", "floats"])
def test_adapters_beside_packed_weights(how: str, tmp_path: Path) -> None:
    model = adapted(how)
    example = ZOO["llama"].example(model)
    want = outputs(model, example)
    folder = laconic.save(model, tmp_path / "out")
    manifest = json.loads((folder / "laconic.json").read_text())
    size = (folder / "model.safetensors").stat().st_size
    assert sum(row["bytes"] for row in manifest["ledger"]) < size < sum(r["bytes"] for r in manifest["ledger"]) + 40000
    assert {r["path"] for r in manifest["records"] if r["action"] == ADAPT} == set(lora_layers(model))

    loaded = laconic.load(folder, verify=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, example), want, strict=True))
    assert {n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    by_class = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(outputs(by_class, example), want, strict=True))
    assert sum(p.requires_grad for p in by_class.parameters()) == 2 * len(lora_layers(model))

    found = alone(folder, tmp_path / "found.npz")
    merged = adapted(how)
    merge_lora_(merged)
    path = next(iter(lora_layers(model)))
    torch.testing.assert_close(
        torch.from_numpy(found[f"{path}.weight"]), merged.get_submodule(path).weight.detach(), rtol=1e-5, atol=1e-6
    )

    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], 0.5)
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loaded(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    again = laconic.load(laconic.save(loaded, tmp_path / "trained"))
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, example), outputs(loaded.eval(), example), strict=True))
    assert not torch.equal(outputs(again, example)[0], want[0])
    assert (again.generate(ids, max_new_tokens=3, do_sample=False)).shape == (1, 8)
    want = outputs(again, example)
    assert set(merge_lora_(again)) == set(lora_layers(model))
    for a, b in zip(outputs(again, example), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_adapters_of_a_module_and_of_conv1d(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(transformers.pytorch_utils.Conv1D(32, 64), nn.Linear(32, 32), nn.BatchNorm1d(32))

    model = made()
    qlora_(model, rank=2)
    with torch.no_grad():
        model[0].lora_B.normal_(), model[1].lora_B.normal_()
    folder = laconic.save(model.eval(), tmp_path / "out")
    x = torch.randn(3, 64)
    again = laconic.load(folder, into=made())
    assert torch.equal(again(x), model(x)) and not again[2].weight.requires_grad
    found = alone(folder, tmp_path / "found.npz")
    merge_lora_(model)
    np.testing.assert_allclose(found["0.weight"], model[0].weight.detach().T, rtol=1e-5, atol=1e-5)
    third = laconic.load(laconic.save(again, tmp_path / "third"), into=made())
    assert torch.equal(third(x), again(x))


def test_saving_refuses(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Linear has neither packed weights nor adapters"):
        laconic.save(nn.Linear(8, 8), tmp_path / "out")
    model = nn.Sequential(nn.Linear(64, 8))
    qlora_(model, 2)
    (tmp_path / "taken").mkdir()
    with pytest.raises(BadInput, match="is there already: name another"):
        laconic.save(model, tmp_path / "taken")
    with pytest.raises(BadInput, match="no artifact of laconic"):
        laconic.save(model, tmp_path / "taken", overwrite=True)
    folder = laconic.save(model, tmp_path / "out")
    assert laconic.save(model, folder, overwrite=True) == folder
    manifest = json.loads((folder / "laconic.json").read_text())
    manifest["records"][0]["rank"] = 0
    (folder / "laconic.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="an adapter of rank 0"):
        laconic.load(folder, into=nn.Sequential(nn.Linear(64, 8)))


def test_inspect_of_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = laconic.save(adapted("qlora"), tmp_path / "out")
    code, out, err = run_cli(capsys, "inspect", folder, "--json")
    assert code == 0, err
    found = {row["name"]: row for row in json.loads(out)["units"]}
    packed = found["model.layers.0.self_attn.q_proj.base.weight"]
    assert packed["scheme"] == str(Scheme.parse("nf4")) and packed["bytes"] < packed["bytes_before"] / 5
    assert found["model.layers.0.self_attn.q_proj.lora_A"]["reason"].startswith("an adapter")
    code, out, _ = run_cli(capsys, "inspect", folder)
    assert code == 0 and "lora_A" in out


def test_powers_of_two_go_to_other_programs() -> None:
    """MXFP4 in the bytes of GGUF, exactly; what no block holds is left to be written as floats."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for form, holds in (("mxfp4", True), ("nvfp4", False), ("mxfp8", False), (FORMS[-1], False), (FORMS[-3], False)):
        layer = nn.Sequential(nn.Linear(64, 8))
        with torch.no_grad():
            layer[0].weight.copy_(x)
        run_pass(RTN(form), Context(layer, Structure.build(layer, ((x,), {}))))
        matrix = QuantizedMatrix.of(layer[0])
        assert torch.equal(matrix.values(), layer[0].weight) and matrix.shape == (8, 64)
        made = as_blocks(matrix, exact=True)
        assert (made is not None) == holds
        assert made is None or (made[0], made[2]) == ("MXFP4", True)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "nf4", FORMS[1], FORMS[-2]])
def test_traced(form: str) -> None:
    """A packed model goes through torch.export, scales and all, and its input has a gradient."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(3, 64)
    run_pass(RTN(form), Context(model, Structure.build(model, ((x,), {}))))
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))
    leaf = x.clone().requires_grad_()
    model[0](leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, model[0].weight.sum(0).expand(3, 64), rtol=1e-4, atol=1e-4)
