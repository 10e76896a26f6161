"""What the scripts under benchmarks/ compute by themselves: a benchmark that measures wrongly is worse than none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from laconic.interop.gptq import gptq_tensors
from laconic.interop.matrix import QuantizedMatrix
from laconic.numerics import Scheme, affine_params, quantize
from laconic.tasks.language import PerplexityTask
from tests.pipeline.runs import save, token_file
from tests.zoo import ZOO

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """A script as a module; it is in no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def killing() -> ModuleType:
    return script("kill_and_resume")


class Scripted:
    """A runner whose attempts take a fixed time from scratch and half of it where records are left."""

    duration = 10.0

    def __init__(self, attempt_type):
        self.attempt_type, self.asked, self.records = attempt_type, [], {}

    def attempt(self, folder, moment):
        self.asked.append((folder, moment))
        before = self.records.get(folder, 0)
        needs = self.duration / 2 if before else self.duration
        if moment is not None and moment < needs:
            self.records[folder] = int(moment)
            return self.attempt_type(folder, before, self.records[folder], moment, killed=True)
        return self.attempt_type(folder, before, 0, needs, False, before, True)


@pytest.mark.parametrize("chain", [False, True])
def test_every_kill_lands_and_every_folder_is_brought_to_its_end(killing, chain):
    runner = Scripted(killing.Attempt)
    found = list(killing.attempts(runner, 10, 0, chain))
    assert sum(a.killed for a in found) == 10 and not found[-1].killed
    ended = [a.folder for a in found if not a.killed]
    assert ended == sorted(set(ended)) == sorted({a.folder for a in found})  # once each, the last attempt there
    moments = [moment for _, moment in runner.asked if moment is not None]
    assert all(0 <= moment < 10 for moment in moments)
    again = Scripted(killing.Attempt)
    list(killing.attempts(again, 10, 0, chain))
    assert again.asked == runner.asked
    if not chain:
        assert max(sum(a.killed for a in found if a.folder == folder) for folder in ended) == 1


def test_what_counts_as_a_fault(killing):
    made = killing.Attempt
    assert made(0, 4, 9, 1.0, killed=True).faults() == []
    assert made(0, 0, 0, 1.0, False, 0, True).faults() == []
    assert made(0, 4, 0, 1.0, False, 4, True).faults() == []
    assert len(made(0, 4, 0, 1.0, False, 0, True).faults()) == 1
    assert len(made(0, 4, 0, 1.0, False, 0, False).faults()) == 2


@pytest.mark.slow
def test_a_small_model_is_killed_and_resumed(killing, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, data = save("llama", tmp_path / "llama"), token_file(tmp_path / "tokens.npz")
    runner = killing.Runner([str(folder), "--data", str(data), "--budget", "size=5x"], tmp_path)
    assert set(runner.whole()) == set(killing.COMPARED) and runner.duration > 0
    killed, ended = runner.attempt(0, 0.5 * runner.duration), runner.attempt(0, None)
    assert killed.killed and killed.cpu_seconds >= 0.5 * runner.duration
    assert ended.same and ended.began_with == killed.left and ended.faults() == []
    (tmp_path / "out-0" / "recipe.yaml").write_text("other")
    assert killing.hashes(tmp_path / "out-0") != runner.expected


def test_the_peer_is_judged_by_our_perplexity():
    windows = np.random.default_rng(0).integers(3, 90, (5, 12))
    model = ZOO["llama"].build().eval()
    ours = PerplexityTask("t", {"calibrate": windows[:1], "select": windows[:1], "verify": windows})
    theirs = script("peer_llm_compressor").perplexity(model, torch.as_tensor(windows))
    assert theirs == pytest.approx(ours.evaluate(model, "verify").value, rel=1e-6)


# --- alternate ------------------------------------------------------------------------------------------------------


def test_alternating_ratios_are_taken_round_by_round(monkeypatch) -> None:
    """Two that take 2 and 1 units of a clock that runs ever faster: each ratio is 2, though the times drift."""
    alternate = script("alternate")
    clock = {"now": 0.0, "unit": 1.0}

    def work(units: float):
        def run() -> None:
            clock["unit"] *= 1.0001
            clock["now"] += units * clock["unit"]

        return run

    monkeypatch.setitem(alternate.CLOCKS, "wall", lambda: clock["now"])
    found = alternate.alternate({"slow": work(2.0), "fast": work(1.0)}, "slow", 15, at_least=1e-9)
    assert found["fast"]["faster"] == pytest.approx(2, rel=1e-3)
    assert found["fast"]["faster_low"] <= found["fast"]["faster"] <= found["fast"]["faster_high"]
    assert "faster" not in found["slow"] and found["slow"]["microseconds"] > 2e6


def test_the_interval_of_a_median_leaves_out_what_order_statistics_allow() -> None:
    rank = script("alternate")._rank
    assert [rank(n) for n in (5, 6, 9, 15, 25)] == [0, 0, 1, 3, 7]  # one less than the table of the sign test


def test_norm_surgery_of_a_drawn_model_is_within_its_bound(capsys, monkeypatch, tmp_path):
    from tests.norm.test_ln_removal import gpt2

    surgery = script("norm_surgery")
    monkeypatch.setitem(surgery.MODELS, "gpt2", lambda: (gpt2().eval(), {"input_ids": torch.arange(10)[None]}))
    monkeypatch.setattr(sys, "argv", ["norm_surgery.py", "gpt2", "--latency", "--out", str(tmp_path / "record.json")])
    surgery.main()
    said = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in said] == ["rmsnorm", "crmsnorm", "gains"]
    assert all("error" in text and "times as fast" in text for text in said)
    monkeypatch.setattr(surgery, "BOUND", 0.0)
    with pytest.raises(SystemExit, match="an error is above 0"):
        surgery.main()


def test_folded_norms_compare_the_same_function(capsys, tmp_path):
    """The folded models compute what the unfolded do, every norm is gone, and ratios are of the same round."""
    folded = script("folded_norms")
    out = tmp_path / "record.json"
    sizes = ["--width", "8", "--heads", "2", "--layers", "2", "--tokens", "5", "--batch", "2", "--rounds", "3"]
    record = folded.main([*sizes, "--out", str(out)])
    assert out.is_file() and "RepBN, folded" in capsys.readouterr().out
    found = record["models"]["2"]
    assert max(found["off"].values()) < 1e-5
    assert found["arms"]["LayerNorm"]["ratio"] == 1 and all(len(s) == 3 for s in found["seconds"].values())
    made, _ = folded.model_arms(8, 2, 2, 5, 1)
    norms = [m for m in made["RepBN, folded"].func.modules() if "Norm" in type(m).__name__ or "BN" in type(m).__name__]
    assert not norms
    rows = folded.summary({"a": [2.0, 4.0, 6.0], "b": [1.0, 1.0, 3.0]}, "a")
    assert rows["b"]["ratio"] == 2 and rows["b"]["ms"] == 1000


def test_both_powers_are_norms():
    folded, x = script("folded_norms"), torch.randn(3, 64)
    torch.testing.assert_close(folded.l2_norm(x), torch.nn.functional.layer_norm(x, (64,)))
    torch.testing.assert_close(folded.l1_norm(x).abs().mean(-1), torch.ones(3), rtol=1e-3, atol=0)


def test_a_long_context_is_read_through_every_cache():
    from tests.nn.test_kv_cache import CONFIGS, build, tokens

    long = script("long_context")
    model, ids = build(CONFIGS["llama"]), tokens(1, 192)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    want = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    torch.testing.assert_close(long.read(model, ids, long.empty(model, None, 192)), want, rtol=1e-4, atol=1e-4)
    assert long.perplexities([torch.arange(9.0)], [10]) == [pytest.approx(np.exp(4.0))]
    arms = {name: long.ARMS[name] for name in ("floats", "2 bits, keys by channel", "2 bits, rotatekv")}
    rows = long.measure(model, [ids], [{"input_ids": ids}], [96, 192], 2, arms=arms)
    assert [(row["tokens"], row["arm"]) for row in rows] == [
        (n, a) for n in (96, 192) for a in (*arms, "transformers, sdpa")
    ]
    assert rows[0]["ratio"] == 1 and rows[0]["worse_percent"] == 0 and rows[5]["bytes"] < rows[4]["bytes"] / 2
    assert all(long.line(row) for row in rows) and all("</svg>" in drawn for drawn in long.plots(rows).values())


# --- quantizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_quantizers_read_the_values_of_a_gptq_folder(tmp_path, version):
    scheme = Scheme.parse("v1/int4/group32/float16/minmax/zint/nearest")
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    scale, zero = affine_params(x, scheme)
    matrix = QuantizedMatrix(scheme, quantize(x, scale, zero, scheme), scale, zero)
    matrix.zero[matrix.zero == 0] = 1  # version 1 has no other way to write it
    tensors = gptq_tensors(matrix, version)
    save_file({f"a.b.{ending}": value for ending, value in tensors.items()}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"checkpoint_format": version}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = script("quantizers").gptq_weights(tmp_path)
    assert set(found) == {"a.b.weight"} and torch.equal(found["a.b.weight"], matrix.values())


def test_quantizers_say_what_is_missing(tmp_path, capsys, monkeypatch):
    quantizers = script("quantizers")
    with pytest.raises(SystemExit, match="--python torch=x: NAME=PATH, where NAME is one of laconic, llm-compressor"):
        quantizers.interpreters(["torch=x"])
    monkeypatch.setattr(quantizers, "prepare", lambda options: None)
    monkeypatch.setattr(quantizers, "in_own_process", lambda *_: {"perplexity": 9.0})
    out = tmp_path / "record.json"
    given = ["tiny-lm", "--only", "torchao", "--work", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["quantizers.py", *given])
    quantizers.main()
    assert "torchao    rtn  failed: no --python torchao=PATH" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"][0]["failed"] == "no --python torchao=PATH"


# --- weight_methods -------------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    """An embedding, a linear layer with rows of whole groups, one whose rows are shorter, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(40, 128)
        self.norm = torch.nn.LayerNorm(128)
        self.wide, self.narrow = torch.nn.Linear(128, 48), torch.nn.Linear(48, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.relu(self.wide(self.norm(self.table(ids).mean(1)))))


@pytest.fixture
def weight_bench(monkeypatch):
    weights = script("weight_methods")
    rng, made = np.random.default_rng(0), {}
    for split, n in (("calibrate", 24), ("select", 8), ("verify", 40)):
        made[split] = (torch.from_numpy(rng.integers(0, 40, (n, 6))),)
    task = weights.FidelityTask("two", made, classifier=True)
    bench = weights.Bench("two", weights.Settings(verify=32, select=8, calibrate=24, steps=3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Two().eval()
    bench.open(task, model, ((made["verify"][0][:2],), {}))
    return weights, bench


def test_weight_methods_are_compared_at_equal_bits_and_taken_up_again(weight_bench, tmp_path, capsys):
    weights, bench = weight_bench
    file = tmp_path / "two.json"
    names = ["rtn", "gptq", "awq", "rsq", "minmax", "lq_lora", "adaquant", "jlcm"]
    data = weights.run(bench, weights.Record(file, bench), names, (8, 2))
    plans = data["plans"]
    assert set(data["left_out"]) == {"rsq"} and file.is_file()
    assert {p["method"] for p in plans.values()} == {*names, weights.MIXED} - {"rsq"}
    assert plans["rtn/8"]["drop"] < 0.1 < plans["rtn/2"]["drop"]
    assert plans["gptq/2"]["bytes"] == plans["rtn/2"]["bytes"] and plans["gptq/2"]["drop"] != plans["rtn/2"]["drop"]
    assert all(p["low"] <= p["drop"] <= p["high"] and p["bytes"] < data["float"]["bytes"] for p in plans.values())
    for bits in (8, 2):
        mixed = plans[f"{weights.MIXED}/{bits}"]
        assert mixed["bytes"] <= mixed["ceiling"] == plans[f"{mixed['against']}/{bits}"]["bytes"]
    assert bench.quality(bench.kept.model)["drop"] == 0  # nothing of all this changed the float model
    assert "<svg" in file.with_suffix(".svg").read_text() and "best uniform" in capsys.readouterr().out

    measured = []
    bench.uniform = lambda method, bits: measured.append((method, bits)) or dict(plans["rtn/2"])
    assert weights.run(bench, weights.Record(file, bench), names, (8, 2))["plans"].keys() == plans.keys()
    assert not measured
    bench.settings = weights.replace(bench.settings, steps=4)
    weights.run(bench, weights.Record(file, bench), ["rtn"], (2,))
    assert measured == [(weights.METHODS["rtn"], 2)]


def test_bytes_of_a_uniform_plan_are_those_of_the_file(weight_bench, tmp_path):
    from laconic.pipeline.compress import compress

    weights, bench = weight_bench
    plan = {u.name: weights.uniform(u, 3) for u in bench.kept.packable}
    assert str(plan["wide.weight"]).startswith("v1/int3/group64/")
    assert str(plan["narrow.weight"]).startswith("v1/int3/channel/")
    units = {name: str(scheme) for name, scheme in plan.items()}
    made = weights.Recipe(passes=[weights.Quantize(method="rtn", inputs="float", units=units)])
    out = compress(bench.kept.model, out=tmp_path / "out", recipe=made, example=bench.kept.source.example()).out
    assert (out / "model.safetensors").stat().st_size == bench.uniform(weights.METHODS["rtn"], 3)["bytes"]


def test_splits_are_shortened_by_their_order(weight_bench):
    weights, bench = weight_bench
    assert bench.task.sizes == {"calibrate": 24, "select": 8, "verify": 32}
    assert len(bench.task.evaluate(bench.kept.model, "verify").per_example) == 32
    windows = PerplexityTask("t", {split: np.arange(60).reshape(12, 5) for split in ("calibrate", "select", "verify")})
    weights.shortened(windows, {"verify": 3})
    assert windows.windows["verify"][:, 0].tolist() == [0, 20, 40]  # spread over the text
