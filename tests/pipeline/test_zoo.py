"""Every model of the zoo: compressed, saved, loaded with equal outputs, and accounted for to the byte."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from laconic.core.record import FOLD
from laconic.numerics import Scheme
from laconic.pipeline.compress import Result, compress, plan
from laconic.pipeline.source_base import all_tensors, stored_names
from tests.zoo import ZOO, outputs

from .runs import ROOT, environ, read_header, save

SLACK = 1.15  # a budget this much above the least file leaves room to choose
FRESH = ("bert", "gpt2", "mixtral", "t5", "resnet", "lstm", "raw_parameters")  # loaded in a new process too


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """`compressed(name)`: the result for a zoo model, made once."""
    made: dict[str, Result] = {}

    def result(name: str) -> Result:
        if name not in made:
            made[name] = _compress(name, tmp_path_factory.mktemp(name))
        return made[name]

    return result


def _compress(name: str, folder: Path) -> Result:
    entry = ZOO[name]
    model: Any
    if entry.auto:
        model, options = save(name, folder / "float"), {}
    else:
        model = entry.build()
        options = {"example": entry.example(model)}
    least = plan(model, budget="size=1.01x", **options)["least"]
    return compress(model, budget=f"size={int(SLACK * least)}B", out=folder / "out", **options)


def _load(name: str, folder: Path) -> torch.nn.Module:
    return laconic.load(folder, into=None if ZOO[name].auto else ZOO[name].build())


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_loads_with_equal_outputs_every_way(name, compressed):
    entry, folder = ZOO[name], compressed(name).out
    model = _load(name, folder)
    example = entry.example(model)
    expected = outputs(model, example)
    assert all(torch.isfinite(x).all() for x in expected)
    assert _equal(expected, outputs(_load(name, folder), example))
    if entry.auto:
        import transformers

        auto = getattr(transformers, entry.auto).from_pretrained(folder)
        assert type(auto) is type(model)
        assert _equal(expected, outputs(auto.eval(), example))


@pytest.mark.parametrize("name", ZOO)
def test_packed_outputs_are_those_of_the_dequantized_weights(name, compressed):
    """What is loaded computes with the values that the file stands for, and nothing else changed."""
    from laconic.nn import packed_specs

    entry, result = ZOO[name], compressed(name)
    packed = _load(name, result.out)
    assert set(packed_specs(packed)) >= {u["name"] for u in result.record["units"] if u["scheme"]}
    reference = entry.build()
    if result.record["ledger"] and any("folded" in note for note in result.record["notes"]):
        pytest.skip("batch norms were folded: compared with the float model in test_compress")
    loss = {u["name"]: u["loss"] for u in result.record["units"] if u["scheme"]}
    for path, value in reference.named_parameters():
        if path in loss:
            spec = packed_specs(packed)[path]
            value.data.copy_(_dequantized(result.out, path, spec))
    example = entry.example(packed)
    for x, y in zip(outputs(packed, example), outputs(reference, example), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4)


def _dequantized(folder: Path, path: str, spec: Any) -> torch.Tensor:
    from safetensors.torch import load_file

    from laconic.nn import restore_view
    from laconic.numerics import dequantize, unpack

    stored = load_file(folder / "model.safetensors")
    rows, k = spec.matrix
    codes = unpack(stored[f"{path}_packed"], spec.scheme.bits, k)
    zero = stored.get(f"{path}_zero_point", stored.get(f"{path}_zero"))
    if spec.scheme.zero == "int":
        words = zero.T.clone(memory_format=torch.contiguous_format)  # packed along the rows
        zero = unpack(words, spec.scheme.bits, rows).T
    return restore_view(dequantize(codes, stored[f"{path}_scale"], zero, spec.scheme), spec)


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_process_gives_the_same_bits(name, compressed, tmp_path):
    entry, folder = ZOO[name], compressed(name).out
    script = (
        "import sys, torch, laconic\nfrom tests.zoo import ZOO, outputs\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "entry = ZOO[sys.argv[1]]\n"
        "model = laconic.load(sys.argv[2], into=None if entry.auto else entry.build())\n"
        "torch.save(outputs(model, entry.example(model)), sys.argv[3])\n"
    )
    threads = str(torch.get_num_threads())
    arguments = [sys.executable, "-c", script, name, str(folder), str(tmp_path / "out.pt"), threads]
    subprocess.run(arguments, check=True, env=environ(), cwd=ROOT, timeout=120)
    model = _load(name, folder)
    assert _equal(torch.load(tmp_path / "out.pt"), outputs(model, entry.example(model)))


@pytest.mark.parametrize("name", ZOO)
def test_the_ledger_accounts_for_every_byte_of_the_file(name, compressed):
    result = compressed(name)
    file = result.out / "model.safetensors"
    header, tensors = read_header(file)
    tensors.pop("__metadata__")
    padding = {n for n in tensors if n.startswith("__") or "padding" in n}
    spans = {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in tensors.items()}
    assert header + sum(spans.values()) == file.stat().st_size == result.size_after
    ledger = json.loads((result.out / "laconic.json").read_text())["ledger"]
    taken: set[str] = set()
    for row in ledger:
        own = [row["name"]] if row["scheme"] is None else [
            n for n in spans if n.removeprefix(row["name"]) in ("_packed", "_scale", "_zero_point", "_zero", "_shape")
        ]  # fmt: skip
        assert row["bytes"] == sum(spans[n] for n in own), row["name"]
        assert not taken & set(own)
        taken |= set(own)
    assert taken == set(spans) - padding
    assert result.record["ledger_header"] == header
    assert result.record["ledger_padding"] == sum(spans[n] for n in padding)


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_stands_in_the_ledger_once_with_scheme_or_reason(name, compressed):
    result = compressed(name)
    model = ZOO[name].build()
    rows = result.record["ledger"]
    named = [n for row in rows for n in row["names"]]
    assert len(named) == len(set(named))
    gone = _folded_away(result)
    expected = set(stored_names(model)) - gone
    assert {row["name"] for row in rows} - _new_biases(result, model) == expected
    every = {n for n, _ in model.named_parameters(remove_duplicate=False)} - gone
    assert every <= set(named)  # ties stand under all their names
    for row in rows:
        assert bool(row["scheme"]) != bool(row["reason"]), row
        if row["scheme"]:
            Scheme.parse(row["scheme"])
            assert row["method"] == "rtn"  # no data was given


@pytest.mark.parametrize("name", ZOO)
def test_coverage_recomputed_from_the_file(name, compressed):
    result = compressed(name)
    _, tensors = read_header(result.out / "model.safetensors")
    tensors.pop("__metadata__")
    shapes = {row["name"]: row["shape"] for row in result.record["ledger"]}
    packed = {n.removesuffix("_packed") for n in tensors if n.endswith("_packed")}
    covered = sum(math.prod(shape) for n, shape in shapes.items() if n in packed)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert packed <= set(shapes)
    assert result.coverage == pytest.approx(covered / total)
    assert result.coverage > 0.7


@pytest.mark.parametrize("name", [n for n, entry in ZOO.items() if entry.tied])
def test_tied_weights_are_stored_once_and_stay_tied(name, compressed):
    model = _load(name, compressed(name).out)
    _, tensors = read_header(compressed(name).out / "model.safetensors")
    tied = [row for row in compressed(name).record["ledger"] if len(row["names"]) > 1]
    assert tied
    for row in tied:
        stored = [n for n in tensors if any(n.startswith(other + "_packed") for other in row["names"])]
        assert stored == ([row["name"] + "_packed"] if row["scheme"] else [])
        if row["scheme"]:
            first, *rest = (_codes(model, n) for n in row["names"])
            assert rest and all(other is first for other in rest)


def _codes(model: torch.nn.Module, path: str) -> torch.Tensor:
    """The codes that a packed parameter reads, be they its own or another module's."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._packed_owner:
        module, name = module._packed_owner[name]
    return module._parameters[f"{name}_packed"]


def _folds(result: Result) -> list[tuple[str, str]]:
    records = json.loads((result.out / "laconic.json").read_text())["records"]
    return [(r["path"], r["norm"]) for r in records if r["action"] == FOLD]


def _folded_away(result: Result) -> set[str]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{norm}.{part}" for _, norm in _folds(result) for part in parts}


def _new_biases(result: Result, model: torch.nn.Module) -> set[str]:
    return {f"{layer}.bias" for layer, _ in _folds(result)} - set(all_tensors(model))
