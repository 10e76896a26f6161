"""Compression with data: the verdict, recipes that replay, and what each method is worth."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import laconic
from laconic.errors import BadInput
from laconic.pipeline import solve as solve_module
from laconic.pipeline.compress import compress, plan
from laconic.pipeline.residency import InMemory
from laconic.pipeline.run import Run
from laconic.pipeline.source import resolve
from laconic.pipeline.walk import Chain
from tests.zoo import ZOO, outputs

from .runs import Classifier, hashes, run_cli, save, token_file, trained_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return trained_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    at = tmp_path_factory.mktemp("llama")
    return save("llama", at / "float"), token_file(at / "tokens.npz")


def run(classifier, out, budget="size=3x, drop=1", **options):
    model, data = classifier
    return compress(model, data, budget, example=torch.zeros(2, 24), out=out, **options)


@pytest.fixture(scope="module")
def result(classifier, tmp_path_factory):
    return run(classifier, tmp_path_factory.mktemp("result") / "out")


def test_the_verdict_is_that_of_the_paired_comparison(result, classifier):
    record = result.record
    assert result.metric == "accuracy" and result.exit_code == 0 and result.met
    assert result.value_before > 0.9
    assert result.drop == pytest.approx(100 * (result.value_before - result.value_after))
    assert result.drop_low <= result.drop <= result.drop_high
    assert result.certified == (result.drop_high <= 1)
    assert result.size_after == (result.out / "model.safetensors").stat().st_size <= result.size_before / 3
    assert record["latency"]["before"] > 0 and record["latency"]["after"] > 0
    assert record == json.loads((result.out / "report.json").read_text())
    assert (result.out / "report.html").stat().st_size > 10_000


def test_the_artifact_is_what_was_measured(result, classifier):
    """The verify split scored again, from the folder."""
    from laconic.pipeline.source import resolve
    from laconic.tasks import load_task

    model, data = classifier
    task = load_task(data, resolve(model, example=torch.zeros(2, 24)))
    loaded = laconic.load(result.out, into=Classifier())
    assert task.evaluate(loaded, "verify").value == result.value_after
    assert task.evaluate(model, "verify").value == result.value_before


def test_the_given_model_is_left_as_it_was(classifier, result):
    model, _ = classifier
    assert type(model.enter) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_the_same_run_gives_the_same_bytes(classifier, result, tmp_path):
    again = run(classifier, tmp_path / "again")
    assert hashes(again.out) == hashes(result.out)
    assert again.units_reused == 0


def test_the_recipe_of_an_artifact_gives_it_again(classifier, result, tmp_path):
    replayed = run(classifier, tmp_path / "again", recipe=result.out / "recipe.yaml")
    assert hashes(replayed.out) == hashes(result.out)


def test_without_a_budget_a_recipe_with_every_scheme_is_held_to_none(classifier, tmp_path):
    model, data = classifier
    step = {"pass": "quantize", "units": {"enter.weight": "v1/int8/channel/float16/minmax/znone/nearest"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"passes": [step]}))
    given = {"recipe": tmp_path / "recipe.yaml", "example": torch.zeros(2, 24)}
    found = compress(model, data, out=tmp_path / "out", **given)
    assert 1 < found.ratio < 4 and found.exit_code == 0
    assert plan(model, data, **given)["size_after"] == found.size_after
    assert compress(model, data, "size=4x", out=tmp_path / "bound", **given).exit_code == 3


def test_the_frontier_of_what_was_tried_comes_as_recipes(classifier, result, tmp_path):
    points = [p for p in result.record["tried"] if p.get("recipe")]
    assert points and all((result.out / p["recipe"]).is_file() for p in points)
    assert [p["size"] for p in sorted(points, key=lambda p: p["drop"])] == sorted((p["size"] for p in points), reverse=True)
    assert all(p["recipe"] in (result.out / "report.html").read_text() for p in points)
    smallest = min(points, key=lambda p: p["size"])
    again = run(classifier, tmp_path / "again", recipe=result.out / smallest["recipe"])
    assert again.size_after == smallest["size"], "the recipe of a plan gives the file that the plan says"


def test_explain_weighs_every_parameter(classifier, result):
    told = result.record["explained"]
    units = told["units"]
    assert sum(one["share"] for one in units.values()) == pytest.approx(1.0)
    for name, one in units.items():
        assert one["up"] is None or (one["up"]["bytes"] > 0 and one["up"]["share"] < 0), name
        assert one["down"] is None or one["down"]["bytes"] < 0, name
    gains = [-one["up"]["share"] * told["total"] / one["up"]["bytes"] * 1e6 for one in units.values() if one["up"]]
    assert told["price"] >= max(gains) * (1 - 1e-9), "the price is the best that more bytes buy"


def test_explain_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "explained_model.py").write_text(MODULE)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(60, 24)).astype(np.float32))
    arguments = ("compress", "explained_model:build", "--data", "x.npz", "--budget", "size=3x")
    code, printed, said = run_cli(capsys, *arguments, "--out", "out", "--explain", "--quiet")
    assert code == 0, said
    printed = " ".join(printed.split())
    assert "enter.weight: int" in printed and "of the loss" in printed and "a megabyte more would take away" in printed
    code, printed, _ = run_cli(capsys, *arguments, "--out", "again", "--recipe", "out/recipe.yaml", "--explain", "--quiet")
    assert code == 0 and "The recipe states every choice" in " ".join(printed.split())


MODULE = """
import torch
from tests.pipeline.runs import Classifier

def build():
    torch.manual_seed(0)
    return Classifier().eval(), torch.zeros(2, 24)
"""


def test_a_miss_is_exit_3_and_is_written(tmp_path, capsys, monkeypatch):
    """Against the float model's own output 2 bits always lose something, so a drop of nothing is missed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "missed_model.py").write_text(MODULE)
    (tmp_path / "two.yaml").write_text("passes: [{pass: quantize, method: rtn, bits: [2]}]")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(60, 24)).astype(np.float32))
    arguments = ("compress", "missed_model:build", "--data", "x.npz", "--out", "out", "--json")
    code, printed, said = run_cli(capsys, *arguments, "--recipe", "two.yaml", "--budget", "size=5x, drop=0")
    assert code == 3, said
    line = json.loads(printed)
    assert line["drop"] > 0 and (line["met"], line["certified"]) == (False, False)
    assert line["size_after"] <= line["size_before"] / 5
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {u["bits"] for u in record["units"] if u["scheme"]} == {2}
    assert "missed" in record["verdict"]["sentence"] and (tmp_path / "out" / "laconic.json").exists()


def test_kept_and_excluded_parameters_are_stored_bit_for_bit(llama, tmp_path):
    from safetensors.torch import load_file

    folder, data = llama
    found = compress(
        folder,
        data,
        "size=1.5x",
        keep=["lm_head"],
        exclude=["model.layers.0.*_proj.weight"],
        out=tmp_path / "out",
    )
    before, after = load_file(folder / "model.safetensors"), load_file(found.out / "model.safetensors")
    reasons = {row["name"]: row["reason"] for row in found.record["ledger"]}
    assert reasons["lm_head.weight"] == "named by --keep lm_head"
    left = [n for n, r in reasons.items() if r and "--exclude" in r]
    assert len(left) == 7
    assert all(torch.equal(before[n], after[n]) for n in [*left, "lm_head.weight"])


def test_coverage_has_a_floor(classifier, result, tmp_path):
    assert run(classifier, tmp_path / "a", min_coverage=result.coverage).coverage == result.coverage
    with pytest.raises(BadInput, match="below --min-coverage"):
        run(classifier, tmp_path / "b", min_coverage=min(1.0, result.coverage + 0.01))


def test_batch_norms_are_folded_and_outputs_stay(tmp_path):
    entry = ZOO["convnet"]
    model = entry.build()
    example = entry.example(model)
    found = compress(model, budget="size=1.6x", example=example, out=tmp_path / "out")
    assert any("batch norms were folded" in note for note in found.record["notes"])
    loaded = laconic.load(found.out, into=entry.build())
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in loaded.modules()) < sum(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    )
    for x, y in zip(outputs(loaded, example), outputs(model, example), strict=True):
        assert (x - y).norm() < 0.03 * y.norm()


class Correlated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_gptq_beats_rounding_on_correlated_inputs(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(400, 6) @ torch.randn(6, 64) + 0.1 * torch.randn(400, 64)
    np.savez(tmp_path / "x.npz", x=x.numpy())
    model = Correlated().eval()
    errors = {}
    scheme = "v1/int3/group32/float16/minmax/zint/nearest"
    for method in ("gptq", "rtn"):
        recipe = tmp_path / f"{method}.yaml"
        step = {"pass": "quantize", "method": method, "units": {"layer.weight": scheme}}
        recipe.write_text(yaml.safe_dump({"passes": [step]}))
        found = compress(
            model, tmp_path / "x.npz", "size=2x", example=x[:2], recipe=recipe, out=tmp_path / method
        )
        assert [u["method"] for u in found.record["units"] if u["scheme"]] == [method]
        loaded = laconic.load(found.out, into=Correlated())
        with torch.no_grad():
            errors[method] = float((loaded(x) - model(x)).square().sum())
    assert errors["gptq"] < 0.5 * errors["rtn"]


def test_walking_the_chain_is_running_the_model_from_its_start(llama, tmp_path, monkeypatch):
    """Carried activations give the bits that a run of the whole model per block gives."""
    folder, data = llama
    starts = []
    real = Chain.start
    monkeypatch.setattr(Chain, "start", lambda self, spill=None: (starts.append(1), real(self, spill))[1])
    carried = compress(folder, data, "size=5x", out=tmp_path / "carried")
    assert starts == [1]

    def by_block(units):
        groups: dict[str, list] = {}
        for unit in units:
            groups.setdefault(".".join(unit.name.split(".")[:3]), []).append(unit)
        return list(groups.values())

    monkeypatch.setattr(Chain, "find", classmethod(lambda cls, *given: "it was not looked at"))
    monkeypatch.setattr(solve_module, "_stages", by_block)
    rerun = compress(folder, data, "size=5x", out=tmp_path / "rerun")
    assert starts == [1]
    assert [u["method"] for u in rerun.record["units"]].count("gptq") >= 10
    assert hashes(rerun.out) == hashes(carried.out)


class Skipping(nn.Module):
    """The second block reads the input once more, so carrying the first one's output is not enough."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first + x))


def test_a_loop_that_is_no_chain_is_not_taken_for_one():
    """Blocks that are called twice, or do not hand on what they made, are walked from the start."""
    names = ("blocks.0", "blocks.1", "blocks.2")
    task = SimpleNamespace(forward=lambda model, batch: model(*batch))
    batches = [(torch.randn(4, 8),)]
    twice = SimpleNamespace(blocks=names, calls={"blocks.0": 1, "blocks.1": 2, "blocks.2": 1})
    assert Chain.find(Skipping(), twice, task, batches, InMemory()) == "its blocks run more than once"
    once = SimpleNamespace(blocks=names, calls=dict.fromkeys(names, 1))
    said = Chain.find(Skipping(), once, task, batches, InMemory())
    assert said == "blocks.1 reads more than the output of blocks.0"


class Offset(nn.Module):
    """Layers with biases, fed with inputs far from zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(torch.relu(self.enter(x + 5.0)))


def test_biases_take_up_what_rounding_shifts_where_the_select_split_gains_by_it(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32))
    model, drops = Offset().eval(), {}
    quantize = {"pass": "quantize", "method": "rtn", "bits": [3]}
    for name, passes in (("with", [quantize, {"pass": "bias_correction"}]), ("without", [quantize])):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"passes": passes}))
        found = compress(
            model, tmp_path / "x.npz", "size=4x", out=tmp_path / name, recipe=tmp_path / f"{name}.yaml",
            example=torch.zeros(1, 32),
        )  # fmt: skip
        drops[name] = found.drop
        loaded = laconic.load(found.out, into=Offset())
        same = torch.equal(loaded.enter.bias, model.enter.bias)
        assert same == (name == "without")
        rows = {row["name"]: row["method"] for row in found.record["ledger"]}
        assert rows["enter.bias"] == (None if same else "bias_correction")
    assert drops["with"] < 0.7 * drops["without"]


def test_a_plan_on_the_frontier_has_the_passes_that_its_point_was_measured_with(tmp_path, monkeypatch):
    """Corrected biases that the select split does not like: the better point has none, and so has its recipe."""
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32))
    passes = [{"pass": "quantize", "method": "gptq", "bits": [3]}, {"pass": "bias_correction"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"passes": passes}))
    measure = Run._measure_select

    def disliked(self, name, decision):
        found = measure(self, name, decision)
        return found + 100 if "bias correction" in name else found

    for wanted in ("with", "without"):
        with monkeypatch.context() as patch:
            if wanted == "without":
                patch.setattr(Run, "_measure_select", disliked)
            found = compress(
                Offset().eval(), tmp_path / "x.npz", "size=4x", out=tmp_path / wanted, recipe=tmp_path / "recipe.yaml",
                example=torch.zeros(1, 32),
            )  # fmt: skip
        texts = {p["name"]: (found.out / p["recipe"]).read_text() for p in found.record["tried"] if p.get("recipe")}
        solved = {name: text for name, text in texts.items() if not name.startswith("rounded")}
        assert solved
        assert all(("pass: bias_correction" in text) == ("+ bias correction" in name) for name, text in solved.items())
        assert ("pass: bias_correction" in (found.out / "recipe.yaml").read_text()) == (wanted == "with")


def test_smoothing_is_a_step_of_a_recipe_and_leaves_the_function(llama, tmp_path):
    """With nothing packed, the smoothed model answers as the float model does."""
    folder, data = llama
    (tmp_path / "smooth.yaml").write_text("passes: [{pass: smoothquant, alpha: 0.6}]")
    found = compress(folder, data, "size=1MB", out=tmp_path / "out", recipe=tmp_path / "smooth.yaml")
    records = json.loads((found.out / "laconic.json").read_text())["records"]
    smoothed = [r for r in records if r["action"] == "rewrite"]
    assert len(smoothed) >= 3 and {r["alpha"] for r in smoothed} == {0.6}
    ids = torch.arange(3, 15)[None]
    loaded, model = laconic.load(found.out), resolve(folder).load()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    norm = smoothed[0]["path"] + ".weight"
    assert not torch.equal(loaded.get_parameter(norm), model.get_parameter(norm))


def test_a_solved_plan_that_misses_the_drop_is_followed_by_a_larger_one(classifier, tmp_path, monkeypatch):
    """The select split says what solving did; while it misses and bytes are left, the plan grows."""
    model, data = classifier
    shares = iter([5.0, 3.0, 0.0])
    solved = []

    def measured(self, name, decision):
        if name == "rounded":
            return 0.0
        solved.append(self.ground.layout(decision).total_bytes)
        return next(shares)

    monkeypatch.setattr(Run, "_measure_select", measured)
    (tmp_path / "plain.yaml").write_text("passes: [{pass: quantize}]")
    found = compress(
        model, data, "drop=1", out=tmp_path / "out", recipe=tmp_path / "plain.yaml", example=torch.zeros(1, 24)
    )
    assert len(solved) == 3 and solved == sorted(set(solved)) and found.size_after == solved[2]


def test_tied_weights_stay_tied_with_data(tmp_path):
    folder = save("gpt2", tmp_path / "float")
    found = compress(folder, token_file(tmp_path / "t.npz"), "size=4x", seq=8, out=tmp_path / "out")
    rows = {row["name"]: row for row in found.record["ledger"]}
    assert set(rows["transformer.wte.weight"]["names"]) == {"transformer.wte.weight", "lm_head.weight"}
    assert "lm_head.weight" not in rows
    assert any(u["method"] == "gptq" for u in found.record["units"])


def test_a_function_that_scores_a_model_is_data_enough(classifier, tmp_path):
    model, _ = classifier

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            return float(net(torch.ones(1, 24)).softmax(-1).max())

    found = compress(model, score, "size=3x", example=torch.zeros(2, 24), out=tmp_path / "out")
    assert found.value_before is not None and found.exit_code == 0
    assert {u["method"] for u in found.record["units"] if u["scheme"]} == {"rtn"}
