"""Level tables, ternary and binary weights by recipe: from `compress` to a loaded model and numpy's reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import laconic
from laconic.core import passes
from laconic.core.structure import Structure
from laconic.core.units import schemes_for
from laconic.nn import packed_specs, unpack_parameter
from laconic.nn.check_ops import CASES, check_op
from laconic.nn.packed import matrix_view, restore_view
from laconic.numerics import Int, Scheme, fake_quantize
from laconic.pipeline.compress import compress, plan
from laconic.quant import GPTQ, RTN
from tests.zoo import ZOO, outputs

from .runs import save

NF4 = "v1/levelsnf4/group32/float16/minmax/znone/nearest"
TERNARY = "v1/ternary/channel/float16/absmean/znone/nearest"
BINARY = "v1/binary/group24/float32/absmean/znone/nearest"
SCHEMES = [NF4, TERNARY, BINARY]


def recipe(folder: Path, units: dict[str, str | None], **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"passes": [{"pass": "quantize", "units": units, **options}]}))
    return file


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda text: text.split("/")[1])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "resnet", "lstm", "raw_parameters"])
def test_from_recipe_to_outputs(name: str, scheme: str, tmp_path: Path) -> None:
    """What is loaded computes exactly what the rounded weights say, and the file has the bytes of the scheme."""
    pytest.importorskip("transformers")
    entry = ZOO[name]
    floats = entry.build()
    if entry.auto:
        model, options = save(name, tmp_path / "float"), {}
    else:
        model, options = floats, {"example": entry.example(floats)}
    packable = [u["name"] for u in plan(model, budget="size=2x", **options)["units"] if u["scheme"]]
    assert packable
    units = {unit: scheme for unit in packable}
    found = compress(model, budget="size=1x", recipe=recipe(tmp_path, units), out=tmp_path / "out", **options)
    assert {u["scheme"] for u in found.record["units"] if u["name"] in units} == {scheme}
    assert {u["bits"] for u in found.record["units"] if u["name"] in units} == {Scheme.parse(scheme).bits}

    loaded = laconic.load(found.out, into=None if entry.auto else entry.build())
    specs = packed_specs(loaded)
    assert set(specs) == set(units) and {str(spec.scheme) for spec in specs.values()} == {scheme}
    with torch.no_grad():
        for path, spec in specs.items():
            owner, _, attribute = path.rpartition(".")
            parameter = floats.get_parameter(path)
            rounded = restore_view(fake_quantize(matrix_view(parameter, spec.view).contiguous(), spec.scheme), spec)
            assert torch.equal(unpack_parameter(loaded.get_submodule(owner), attribute), rounded), path
            parameter.copy_(rounded)
    for a, b in zip(outputs(loaded, entry.example(loaded)), outputs(floats, entry.example(floats)), strict=True):
        torch.testing.assert_close(a, b)


def test_recipe_mixes_elements(tmp_path: Path) -> None:
    """GPTQ takes the integers of a recipe and leaves all else to rounding; compressed-tensors is told of integers alone."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(64, 32)
    np.savez(tmp_path / "x.npz", x=x.numpy())
    units = {
        "0.weight": NF4,
        "2.weight": "v1/int4/group16/float16/minmax/zint/nearest",
        "4.weight": "v1/ternary/group40/float16/mse/znone/nearest",
    }
    found = compress(
        model, tmp_path / "x.npz", "size=1.2x", example=x[:2], recipe=recipe(tmp_path, units, method="gptq"),
        out=tmp_path / "out",
    )  # fmt: skip
    methods = {u["name"]: u["method"] for u in found.record["units"] if u["scheme"]}
    assert methods == {"0.weight": "rtn", "2.weight": "gptq", "4.weight": "rtn"}
    assert "levelsnf4" in (found.out / "recipe.yaml").read_text()
    again = compress(
        model, tmp_path / "x.npz", "size=1.2x", example=x[:2], recipe=found.out / "recipe.yaml", out=tmp_path / "again"
    )
    assert (again.out / "model.safetensors").read_bytes() == (found.out / "model.safetensors").read_bytes()


def test_compressed_tensors_is_told_of_integers_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = save("llama", tmp_path / "float")
    names = [u["name"] for u in plan(folder, budget="size=2x")["units"] if u["scheme"] and u["op"] == "linear"]
    units = {names[0]: "v1/int4/group24/float16/minmax/znone/nearest", names[1]: NF4}
    compress(folder, budget="size=1x", recipe=recipe(tmp_path, units), out=tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = said["config_groups"].values()
    assert group["targets"] == [names[0].removesuffix(".weight")]
    assert names[1].removesuffix(".weight") in said["ignore"]


def test_the_integer_program_is_not_offered_them() -> None:
    model = nn.Linear(256, 64)
    structure = Structure.build(model, ((torch.randn(2, 256),), {}))
    from laconic.core.units import find_units

    (unit,) = [u for u in find_units(model, structure) if u.options]
    assert all(isinstance(scheme.element, Int) for scheme in schemes_for(unit))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda text: text.split("/")[1])
def test_passes(scheme: str) -> None:
    """Rounding takes them; GPTQ refuses with the path and what to do."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    structure = Structure.build(model, ((torch.randn(2, 64),), {}))
    weight = model[0].weight.detach().clone()
    records, _ = passes.run(RTN(scheme), passes.Context(model, structure))
    assert [record.path for record in records] == ["0.weight", "2.weight"]
    assert torch.equal(model[0].weight, fake_quantize(weight, Scheme.parse(scheme)))
    from laconic.quant import gptq_matrix

    with pytest.raises(ValueError, match=r"fc\.weight: gptq works on integer codes.*rtn"):
        gptq_matrix(torch.randn(4, 32), torch.eye(32), Scheme.parse(scheme), name="fc.weight")
    assert GPTQ.id == "gptq"


@pytest.mark.parametrize("name", CASES)
def test_what_runs_is_right(name: str) -> None:
    """Whichever kernel is registered reads these codes as what they are."""
    assert "cases" in check_op(name)
