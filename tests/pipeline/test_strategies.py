"""Methods by name, the rewrites and repairs that they bring, and the search among them."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import laconic
from laconic import cli
from laconic.core.structure import Structure
from laconic.errors import BadInput, Impossible
from laconic.nn import packed_specs
from laconic.pipeline.compress import compress, plan
from laconic.pipeline.recipe import Quantize, Recipe, Rotate
from laconic.pipeline.run import Run
from laconic.pipeline.search import candidates, told
from laconic.pipeline.source import resolve
from laconic.pipeline.strategies import HQQ, STRATEGIES, strategy

from .runs import ROOT, hashes, run_cli, save, token_file, trained_classifier

NAMED = [name for name in STRATEGIES if name not in ("auto", "search")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    at = tmp_path_factory.mktemp("llama")
    return save("llama", at / "float"), token_file(at / "tokens.npz", rows=24)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return trained_classifier(tmp_path_factory.mktemp("classifier"))


def few_steps(tmp_path, name):
    """The strategy as a recipe that trains for few steps."""
    quantize = strategy(name).recipe.quantize
    assert quantize is not None
    recipe = strategy(name).recipe.with_passes(steps=5)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return tmp_path / "recipe.yaml"


def written(found):
    return json.loads((found.out / "laconic.json").read_text())["records"]


@pytest.mark.parametrize("name", NAMED)
def test_each_strategy_gives_an_artifact_that_replays_to_the_same_bytes(name, llama, tmp_path):
    """The artifact's own recipe has every choice written out, the rewrites and the method among them."""
    folder, data = llama
    trained = name in ("adaquant", "genie")
    how = {"recipe": few_steps(tmp_path, name)} if trained else {"strategy": name}
    budget = (
        "drop=100000" if name == "hessian_interlayer" else "size=5x" if name in ("uniform", "layer_bits") else "size=3x"
    )
    found = compress(folder, data, budget, seq=16, out=tmp_path / "out", **how)
    again = compress(folder, data, budget, seq=16, out=tmp_path / "again", recipe=found.out / "recipe.yaml")
    assert hashes(found.out) == hashes(again.out)
    assert found.ratio >= 3 and found.exit_code == 0
    loaded = laconic.load(found.out)
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.arange(3, 15)[None]).logits).all()
    recipe = yaml.safe_load((found.out / "recipe.yaml").read_text())
    method = next(step for step in recipe["passes"] if step["pass"] == "quantize")["method"]
    assert method == strategy(name).recipe.quantize.method
    methods = {r.get("method") for r in written(found) if r["action"] == "pack"}
    assert methods <= {method, "rtn"} and (method in methods)


def test_methods_that_weigh_by_inputs_differ_from_one_another(llama, tmp_path):
    """At two bits awq, gptq and rsq give the same layer different codes."""
    folder, data = llama
    weights = []
    for method in ("rtn", "awq", "gptq", "rsq"):
        recipe = Recipe(passes=[Quantize(method=method, bits=[2])])
        found = compress(folder, data, "size=3x", seq=16, out=tmp_path / method, recipe=recipe)
        weights.append(laconic.load(found.out).model.layers[0].mlp.down_proj.weight.float())
    for i, one in enumerate(weights):
        assert all(not torch.equal(one, other) for other in weights[:i])


@pytest.mark.parametrize("step", ["awq", "rotate", "smoothquant"])
def test_a_rewrite_leaves_the_function(step, llama, tmp_path):
    """With nothing packed the rewritten model answers as the float model does, from other weights."""
    folder, data = llama
    (tmp_path / "r.yaml").write_text(f"passes: [{{pass: {step}}}]")
    found = compress(folder, data, "size=1MB", seq=16, out=tmp_path / "out", recipe=tmp_path / "r.yaml")
    loaded, model = laconic.load(found.out), resolve(folder).load()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    path = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(loaded.get_parameter(path), model.get_parameter(path))
    assert {r["pass"] for r in written(found)} == {step}


def test_rotating_unties_a_tied_head_and_counts_its_bytes(tmp_path):
    folder = save("llama_tied", tmp_path / "float")
    data = token_file(tmp_path / "t.npz")
    (tmp_path / "r.yaml").write_text("passes: [{pass: rotate}, {pass: quantize, bits: [8]}]")
    found = compress(folder, data, "size=2x", seq=16, out=tmp_path / "out", recipe=tmp_path / "r.yaml")
    rows = {row["name"]: row for row in found.record["ledger"]}
    assert "lm_head.weight" in rows and rows["lm_head.weight"]["names"] == ["lm_head.weight"]
    assert any("stored twice" in note for note in found.record["notes"])
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        a, b = laconic.load(found.out)(ids).logits, resolve(folder).load()(ids).logits
    assert (a - b).norm() < 0.1 * b.norm()


def test_a_rewrite_touches_nothing_that_is_excluded(llama, tmp_path):
    folder, data = llama
    path = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "r.yaml").write_text("passes: [{pass: awq}, {pass: rotate, stream: false}]")
    found = compress(folder, data, "size=1MB", seq=16, out=tmp_path / "out", recipe=tmp_path / "r.yaml", exclude=[path])
    loaded, model = laconic.load(found.out), resolve(folder).load()
    assert torch.equal(loaded.get_parameter(path), model.get_parameter(path))
    assert any("--exclude" in note for note in found.record["notes"])


def test_trained_rounding_beats_rounding_to_nearest(classifier, tmp_path):
    """At three bits a few hundred steps of adaquant take back most of what rounding costs the outputs."""
    model, data = classifier
    x = torch.from_numpy(next(a for a in np.load(data).values() if a.ndim == 2)).float()
    with torch.no_grad():
        wanted = model(x)
    lost = {}
    for method, steps in (("rtn", 1), ("adaquant", 200), ("genie", 200)):
        recipe = Recipe(passes=[Quantize(method=method, bits=[3], steps=steps)])
        if method == "rtn":
            scheme = "v1/int3/channel/float32/minmax/zint/nearest"
            recipe = Recipe(passes=[Quantize(method=method, schemes=[scheme])])
        found = compress(
            model, data, "size=4x", out=tmp_path / method, recipe=recipe, example=torch.zeros(1, 24)
        )  # fmt: skip
        packed = laconic.load(found.out, into=copy.deepcopy(model))
        with torch.no_grad():
            lost[method] = float((packed(x) - wanted).square().mean())
    assert lost["adaquant"] < 0.7 * lost["rtn"] and lost["genie"] < 0.7 * lost["rtn"]


def biases_are_trained(model, folder):
    """Whether the artifact of a model has another bias than the model."""
    packed = laconic.load(folder, into=copy.deepcopy(model))
    name = next(name for name, p in model.named_parameters() if name.endswith("bias"))
    return not torch.equal(packed.get_parameter(name), model.get_parameter(name))


def stopped(*args, **kwargs):
    """Ctrl-C, where work would go on."""
    raise KeyboardInterrupt


def cut_before_writing(monkeypatch, model, data, budget, out, **options):
    """A run that is interrupted when all is solved."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress(model, data, budget, out=out, **options)


def test_trained_biases_are_in_the_artifact_and_survive_a_resumed_run(classifier, tmp_path, monkeypatch):
    """adaquant trains biases too; solutions that are there are not trained again."""
    model, data = classifier
    recipe = Recipe(passes=[Quantize(method="adaquant", bits=[4], steps=20)])
    options = {"recipe": recipe, "example": torch.zeros(1, 24)}
    found = compress(model, data, "size=4x", out=tmp_path / "out", **options)
    assert biases_are_trained(model, found.out)
    cut_before_writing(monkeypatch, model, data, "size=4x", tmp_path / "cut", **options)
    with monkeypatch.context() as patch:
        patch.setattr("laconic.pipeline.solve.learn", stopped)
        resumed = compress(model, data, "size=4x", out=tmp_path / "cut", resume=True, **options)
    assert hashes(resumed.out) == hashes(found.out)


def test_a_plan_that_cannot_grow_is_written_as_it_was_solved(classifier, tmp_path, monkeypatch):
    """Looking for a larger plan takes nothing of the solved one away, also where options are weighed only then."""
    model, data = classifier
    recipe = Recipe(passes=[Quantize(method="adaquant", bits=[4], steps=20)])
    options = {"recipe": recipe, "example": torch.zeros(1, 24)}
    monkeypatch.setattr(Run, "_measure_select", lambda self, name, decision: 5.0)
    found = compress(model, data, "size=4x, drop=1", out=tmp_path / "out", **options)
    assert any("leaves no room for a larger plan" in note for note in found.record["notes"])
    assert biases_are_trained(model, found.out)
    cut_before_writing(monkeypatch, model, data, "size=4x, drop=1", tmp_path / "cut", **options)
    resumed = compress(model, data, "size=4x, drop=1", out=tmp_path / "cut", resume=True, **options)
    assert hashes(resumed.out) == hashes(found.out)


def test_norms_are_trained_and_kept_only_where_that_helps(llama, tmp_path, monkeypatch):
    folder, data = llama
    norms = {}
    for after in (0.5, 2.0):
        drops = iter([1.0, after])
        monkeypatch.setattr(
            Run, "_measure_select", lambda self, name, decision, d=drops: 0.0 if name == "rounded" else next(d)
        )
        found = compress(folder, data, "size=6x", seq=16, out=tmp_path / str(after), strategy="norm_tweak")
        norms[after] = laconic.load(found.out).get_parameter("model.layers.0.input_layernorm.weight")
        recipe = yaml.safe_load((found.out / "recipe.yaml").read_text())
        assert any(step["pass"] == "norm_tweak" for step in recipe["passes"]) == (after == 0.5)
    float_norm = resolve(folder).load().get_parameter("model.layers.0.input_layernorm.weight")
    assert torch.equal(norms[2.0], float_norm) and not torch.equal(norms[0.5], float_norm)


def test_a_recipe_that_is_refused_does_not_end_the_search(llama, tmp_path, monkeypatch):
    folder, data = llama
    monkeypatch.setattr("laconic.pipeline.search.TRAINED", 0)
    shares = iter([1.0, 0.1])
    monkeypatch.setattr("laconic.pipeline.run.coverage", lambda *given: next(shares, 1.0))
    found = compress(folder, data, "size=5x", seq=16, out=tmp_path / "out", strategy="search", min_coverage=0.5)
    (refused,) = [note for note in found.record["notes"] if "was not tried" in note]
    assert "coverage is 0.100" in refused and any(note.startswith("recipes tried") for note in found.record["notes"])


def test_the_search_takes_the_recipe_that_loses_least(llama, tmp_path, monkeypatch):
    """Every recipe that fits the model is solved and measured; the record says what each lost."""
    folder, data = llama
    wanted = "awq, gptq"

    def measured(self, name, decision):
        found = 1.0 if name.startswith(wanted) else 5.0
        if name != "rounded":
            seen.append(name)
        return found

    seen: list[str] = []
    monkeypatch.setattr(Run, "_measure_select", measured)
    monkeypatch.setattr("laconic.pipeline.search.TRAINED", 0)
    found = compress(folder, data, "size=5x", seq=16, out=tmp_path / "out", strategy="search")
    tried = next(note for note in found.record["notes"] if note.startswith("recipes tried"))
    assert all(
        name in tried for name in ("gptq 5.00", "awq, gptq 1.00", "rotate, gptq 5.00", "rotate, rsq", "norm_tweak")
    )
    recipe = yaml.safe_load((found.out / "recipe.yaml").read_text())
    assert [step["pass"] for step in recipe["passes"]][:2] == ["fold_batchnorm", "awq"]
    again = compress(folder, data, "size=5x", seq=16, out=tmp_path / "again", recipe=found.out / "recipe.yaml")
    assert hashes(found.out) == hashes(again.out)


def test_the_default_searches_only_where_the_drop_is_missed(llama, tmp_path, monkeypatch):
    folder, data = llama
    monkeypatch.setattr("laconic.pipeline.search.TRAINED", 0)
    for drop, many in ((0.5, False), (2.0, True)):
        monkeypatch.setattr(Run, "_measure_select", lambda self, name, decision, d=drop: d)
        found = compress(folder, data, "size=5x, drop=1", seq=16, out=tmp_path / str(drop))
        assert any(note.startswith("recipes tried") for note in found.record["notes"]) == many


def test_candidates_fit_the_model(classifier, llama):
    model, _ = classifier
    source = resolve(llama[0])
    of_llama = source.load()
    names = [told(r) for r in candidates(Recipe(), Structure.build(of_llama, source.example()), of_llama)]
    assert names[:3] == ["awq, gptq", "rotate, gptq", "rotate, rsq"] and "gptq, norm_tweak" in names
    plain = Structure.build(model, ((torch.zeros(1, 24),), {}))
    assert [told(r) for r in candidates(Recipe(), plain, model)] == ["adaquant", "genie"]
    assert [told(r) for r in candidates(Recipe(), plain, model, filled=0.96)] == ["adaquant", "genie", "gptq, uniform"]


def test_one_width_for_all_is_tried_where_it_fills_the_ceiling(llama, tmp_path, monkeypatch):
    folder, data = llama
    monkeypatch.setattr("laconic.pipeline.search.TRAINED", 0)
    size = compress(folder, data, "size=7x", seq=16, out=tmp_path / "alike", strategy="uniform").size_after
    wanted = "gptq, uniform"
    monkeypatch.setattr(Run, "_measure_select", lambda self, name, decision: 1.0 if name.startswith(wanted) else 5.0)
    for budget, there in ((f"size={size}", True), (f"size={int(size * 1.06)}", False)):
        found = compress(folder, data, budget, seq=16, out=tmp_path / budget, strategy="search")
        (tried,) = [note for note in found.record["notes"] if note.startswith("recipes tried")]
        assert (wanted in tried) == there and (len(set(widths(found).values())) == 1) == there


def widths(found, inside=""):
    return {u["name"]: u["bits"] for u in found.record["units"] if u["bits"] <= 8 and inside in u["name"]}


def test_bits_are_given_out_by_other_ways_than_the_program(llama, tmp_path, monkeypatch):
    """Uniform: one width. By blocks: one width within each block, two neighbouring ones over all, and it fits."""
    folder, data = llama
    alike = compress(folder, data, "size=5x", seq=16, out=tmp_path / "uniform", strategy="uniform")
    assert len(set(widths(alike).values())) == 1 and alike.ratio >= 5
    blocks = compress(folder, data, "size=5x", seq=16, out=tmp_path / "blocks", strategy="layer_bits")
    found = [set(widths(blocks, f"layers.{i}.").values()) for i in (0, 1)]
    assert all(len(one) == 1 for one in found) and blocks.ratio >= 5
    used = sorted(set(widths(blocks).values()))
    assert used[-1] - used[0] <= 1

    def measured(self, name, decision):
        """What is below 5 bits costs a tenth of a point each."""
        return sum(0.1 for s in decision.values() if s is not None and s.bits < 5)

    monkeypatch.setattr(Run, "_measure_select", measured)
    bisected = compress(folder, data, "drop=0.5", seq=16, out=tmp_path / "bisect", strategy="hessian_interlayer")
    below = [bits for bits in widths(bisected).values() if bits < 5]
    assert len(below) == 5 and max(widths(bisected).values()) <= 5


@pytest.mark.parametrize("name", ["uniform", "layer_bits"])
def test_every_way_to_give_out_bits_reaches_the_least_there_is(llama, tmp_path, name):
    folder, data = llama
    with pytest.raises(Impossible, match="the least is") as refused:
        compress(folder, data, "size=100x", seq=16, out=tmp_path / "o", strategy=name)
    least = int(re.search(r"the least is ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    found = compress(folder, data, f"size={least}", seq=16, out=tmp_path / "least", strategy=name)
    assert found.size_after == least
    assert compress(folder, data, f"size={least + 1}", seq=16, out=tmp_path / "o", strategy=name).size_after == least


def test_ways_to_give_out_bits_say_what_they_need(llama, classifier, tmp_path):
    folder, data = llama
    model, examples = classifier
    with pytest.raises(BadInput, match="give data, and a drop"):
        compress(folder, data, "size=5x", seq=16, out=tmp_path / "o", strategy="hessian_interlayer")
    with pytest.raises(BadInput, match="needs a chain of blocks"):
        compress(model, examples, "size=4x", out=tmp_path / "o", strategy="layer_bits", example=torch.zeros(1, 24))
    with pytest.raises(BadInput, match="there is no data"):
        compress(folder, None, "size=4x", out=tmp_path / "o", recipe=strategy("layer_bits").recipe)


def test_a_plan_refuses_what_a_run_refuses(llama, classifier, capsys):
    folder, data = llama
    model, examples = classifier
    with pytest.raises(BadInput, match="give data, and a drop"):
        plan(folder, data, "size=5x", strategy="hessian_interlayer")
    with pytest.raises(BadInput, match="needs a chain of blocks, which Classifier has not"):
        plan(model, examples, "size=4x", strategy="layer_bits", example=torch.zeros(1, 24))
    with pytest.raises(BadInput, match="there is no data"):
        plan(folder, None, "size=4x", recipe=strategy("layer_bits").recipe)
    with pytest.raises(BadInput, match="knows no milliseconds"):
        plan(folder, data, "size=4x, latency=2x", strategy="uniform")
    with pytest.raises(BadInput, match="--max-ram is"):
        plan(folder, data, max_ram="1MB")
    code, _, said = run_cli(capsys, "plan", folder, "--data", data, "--strategy", "hessian_interlayer")
    assert code == 2 and "give data, and a drop" in said


def test_a_plan_says_where_bits_are_found_by_measuring(llama):
    folder, data = llama
    for name, budget in (("layer_bits", "size=5x"), ("hessian_interlayer", "drop=1")):
        (said,) = [n for n in plan(folder, data, budget, strategy=name)["notes"] if n.startswith("allocate:")]
        assert "decides by what it measures on the data" in said
    alike = plan(folder, data, "size=5x", strategy="uniform")
    assert not any(n.startswith("allocate:") for n in alike["notes"])
    assert len({unit["bits"] for unit in alike["units"] if unit["bits"]}) == 1


def test_the_command_line_lists_every_strategy():
    assert tuple(STRATEGIES) == cli.STRATEGIES


def test_a_strategy_is_part_of_a_plan(llama):
    folder, data = llama
    found = plan(folder, data, "size=3x", strategy="nf4")
    assert {unit["scheme"] for unit in found["units"]} <= {None, "v1/levelsnf4/group64/float16/minmax/znone/nearest"}


def test_hqq_needs_no_data_and_its_zero_points_are_stored(llama, tmp_path):
    folder, _ = llama
    done = compress(folder, None, "size=4x", out=tmp_path / "out", strategy="hqq")
    model = laconic.load(tmp_path / "out")
    assert done.ratio >= 4 and torch.isfinite(model(torch.arange(3, 15)[None]).logits).all()
    found = {str(spec.scheme) for spec in packed_specs(model).values()}
    assert any("/hqq/zreal/" in scheme for scheme in found) and found <= set(HQQ)


def test_bad_strategies_and_recipes_are_refused_in_a_sentence(llama, tmp_path, capsys):
    folder, data = llama
    with pytest.raises(BadInput, match="'best' is no strategy: there are auto, search, rtn"):
        compress(folder, data, strategy="best", out=tmp_path / "o")
    with pytest.raises(BadInput, match="both a recipe and a strategy"):
        compress(folder, data, strategy="gptq", recipe=Recipe(), out=tmp_path / "o")
    with pytest.raises(ValueError, match="leave schemes out"):
        Quantize(method="genie", schemes=["v1/int4/channel/float32/minmax/zint/nearest"])
    with pytest.raises(ValueError, match="rotate stands twice"):
        Recipe(passes=[Rotate(), Rotate(), Quantize()])
    code, _, said = run_cli(capsys, "compress", folder, "--strategy", "best", "--out", tmp_path / "o")
    assert code == 2 and "is no strategy" in said


def test_values_that_are_not_finite_stop_a_rewrite_and_name_the_layer(tmp_path):
    """An inf that a forward makes out of finite weights shows while the model is smoothed."""

    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.last = nn.LayerNorm(24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x):
            return self.last(torch.relu(self.first(self.norm(x))))

    model = Overflowing().eval()
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    data = tmp_path / "x.npz"
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.normal(size=(60, 24)).astype("float32"), y=rng.integers(0, 3, 60))
    recipe = Recipe.model_validate({"passes": [{"pass": "awq"}, {"pass": "quantize"}]})
    with pytest.raises(BadInput, match="the input of first holds inf or nan"):
        compress(model, data, "size=1.5x", out=tmp_path / "out", recipe=recipe, example=torch.zeros(1, 24))


def test_a_recipe_with_a_pass_that_needs_data_does_without_and_says_so(llama, tmp_path, capsys):
    folder, _ = llama
    (tmp_path / "awq.yaml").write_text(strategy("awq").recipe.to_yaml())
    told = ("--recipe", tmp_path / "awq.yaml", "--budget", "size=3x", "--quiet")
    code, printed, _ = run_cli(capsys, "compress", folder, *told, "--out", tmp_path / "out")
    assert code == 0 and "Note: awq was left out: it needs data" in printed
    records = json.loads((tmp_path / "out" / "laconic.json").read_text())["records"]
    assert {r["method"] for r in records if r["action"] == "pack"} == {"rtn"}


def test_a_strategy_that_needs_data_is_refused_without(llama, tmp_path, capsys):
    folder, _ = llama
    for name, known in STRATEGIES.items():
        if known.data:
            with pytest.raises(BadInput, match=f"the strategy {name} needs data: .* or take rtn, hqq or nf4, which need"):
                plan(folder, strategy=name)
    code, _, said = run_cli(capsys, "compress", folder, "--strategy", "awq", "--out", tmp_path / "out")
    assert code == 2 and "the strategy awq needs data: pass --data" in said and not list(tmp_path.iterdir())


def test_the_guide_says_which_strategies_need_data():
    text = (ROOT / "docs" / "pages" / "guides" / "strategies.md").read_text()
    said = {name: needs for name, needs in re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)}
    assert set(said) == set(STRATEGIES)
    assert {name for name, needs in said.items() if needs.startswith("yes")} - {"search"} == {
        name for name, known in STRATEGIES.items() if known.data
    }
