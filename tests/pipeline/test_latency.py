"""Latency as a ceiling: plans are timed, and what keeps a ceiling is chosen by quality."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import laconic
from laconic.core.allocate import allocate, allocate_within
from laconic.core.units import Unit
from laconic.errors import BadInput, Impossible
from laconic.kernels import native
from laconic.kernels.inputs import INT8_TOKENS, static_scale
from laconic.nn import packed_specs
from laconic.nn.blocks import FusedBlock
from laconic.pipeline import deciding, reading, timed
from laconic.pipeline import run as run_module
from laconic.pipeline.budget import parse_budget
from laconic.pipeline.compress import compress
from laconic.pipeline.measure import Times, latency_ms
from laconic.pipeline.report_record import _time_sentence
from laconic.pipeline.timing import LayerTimes

from .runs import run_cli, save, token_file

needs_kernels = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")


class TestAllocateWithin:
    def test_one_limit_is_allocate(self) -> None:
        rng = np.random.default_rng(0)
        cost, size = rng.random((9, 4)).tolist(), rng.random((9, 4)).tolist()
        got = allocate_within(cost, [("bytes", size, 4.0)], gap=1e-9)
        best = allocate(cost, size, 4.0)
        assert sum(c[i] for c, i in zip(cost, got, strict=True)) == pytest.approx(
            sum(c[i] for c, i in zip(cost, best, strict=True)), rel=1e-6
        )

    def test_two_limits_against_every_choice(self) -> None:
        rng = np.random.default_rng(1)
        cost, size, time = (rng.random((5, 3)) - offset for offset in (0, 0, 0.5))
        limits = [("bytes", size.tolist(), 2.2), ("time", time.tolist(), -0.4)]
        got = allocate_within(cost.tolist(), limits, gap=1e-9)
        total = lambda table, choice: sum(table[u, i] for u, i in enumerate(choice))  # noqa: E731
        allowed = [
            choice for choice in np.ndindex(*(3,) * 5) if total(size, choice) <= 2.2 and total(time, choice) <= -0.4
        ]
        assert allowed and total(size, got) <= 2.2 + 1e-6 and total(time, got) <= -0.4 + 1e-6
        assert total(cost, got) == pytest.approx(min(total(cost, choice) for choice in allowed), abs=1e-6)

    def test_what_cannot_be_kept_is_named(self) -> None:
        with pytest.raises(Impossible, match="the least time is 2, which is more than the bound of 1"):
            allocate_within([[1.0], [1.0]], [("time", [[1.0], [1.0]], 1.0)])
        # Each bound can be kept, both together cannot.
        with pytest.raises(Impossible, match="bytes, time"):
            allocate_within([[1.0, 1.0]], [("bytes", [[0.0, 1.0]], 0.5), ("time", [[1.0, 0.0]], 0.5)])
        with pytest.raises(ValueError, match="not finite"):
            allocate_within([[float("nan")]], [])


class _Times(LayerTimes):
    """Rounded inputs halve the time of a layer, float ones double it; everything takes 1 ms as it is."""

    def __init__(self) -> None:
        super().__init__({})

    def extra(self, unit: Unit, scheme: Any, inputs: str) -> float:
        return 0.0 if scheme is None else -0.5 if inputs else 1.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    at = tmp_path_factory.mktemp("llama")
    return save("llama", at / "float"), token_file(at / "tokens.npz")


def keep_time(monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    """Let a clock of one's own measure, before the decision and after the work."""
    for module in (deciding, run_module):
        monkeypatch.setattr(module, "latency_ms", lambda runs: Times(clock(runs)))


def test_a_busy_machine_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third call takes four times as long as the others: medians are those of quick calls, and the report says so."""
    now, calls = 0.0, 0

    def work() -> None:
        nonlocal now, calls
        calls += 1
        now += 0.4 if calls % 3 == 0 else 0.1

    monkeypatch.setattr("time.perf_counter", lambda: now)
    found = latency_ms({"after": work, "before": lambda: None}, rounds=12, at_least=0)
    assert found["after"] == pytest.approx(100) and found.spread == pytest.approx(4, rel=0.3)
    latency = {"before": 100.0, "after": 50.0, "batch": 1}
    assert "Something else was running" in _time_sentence({**latency, "spread": found.spread})
    assert "Something" not in _time_sentence({**latency, "spread": 1.2})


def test_inputs_stay_float_where_the_ceiling_allows_it(
    monkeypatch: pytest.MonkeyPatch, llama: Any, tmp_path: Any
) -> None:
    keep_time(monkeypatch, lambda runs: {name: 10.0 for name in runs})
    result = compress(*llama, "size=3x, latency=20ms", out=tmp_path / "out")
    assert result.met and result.record["budget"]["latency"] == {"text": "20ms", "ms": 20.0, "met": True}
    assert all(not spec.inputs for spec in packed_specs(laconic.load(tmp_path / "out")).values())


@needs_kernels
def test_a_ceiling_that_needs_it_rounds_inputs_and_the_artifact_says_so(
    monkeypatch: pytest.MonkeyPatch, llama: Any, tmp_path: Any
) -> None:
    seen: list[str] = []

    def clock(runs: dict[str, Any]) -> dict[str, float]:
        """10 ms for the float model; the packed one has 8 ms with float inputs, and 4 ms with rounded ones."""
        for run in runs.values():
            run()
        seen.extend(runs)
        return {name: 10.0 if name in ("float", "before") else 4.0 for name in runs}

    keep_time(monkeypatch, clock)
    monkeypatch.setattr(deciding, "LayerTimes", lambda rows: _Times())
    result = compress(*llama, "size=3x, latency=2x", out=tmp_path / "out")
    assert result.met and seen == ["float", "packed", "after", "before"]
    loaded = laconic.load(tmp_path / "out")
    linear = {name: spec for name, spec in packed_specs(loaded).items() if "proj" in name}
    assert linear and {spec.inputs for spec in linear.values()} == {INT8_TOKENS}
    assert any("round their inputs to 8 bits" in note for note in result.record["notes"])
    # The recipe that was written gives the same file again, without a clock.
    again = compress(*llama, "size=3x", recipe=tmp_path / "out" / "recipe.yaml", out=tmp_path / "again")
    assert (again.out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    assert {s.inputs for n, s in packed_specs(laconic.load(again.out)).items() if "proj" in n} == {INT8_TOKENS}


def test_inputs_with_a_scale_that_is_calibrated(llama: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "static.yaml"
    recipe.write_text("passes:\n- pass: quantize\n  inputs: int8_static\n- pass: fuse_blocks\n")
    result = compress(*llama, "size=3x", recipe=recipe, out=tmp_path / "out")
    specs = {n: s for n, s in packed_specs(laconic.load(result.out)).items() if "proj" in n}
    scales = {name: static_scale(spec.inputs) for name, spec in specs.items()}
    assert scales and all(scale > 0 for scale in scales.values())
    assert scales["model.layers.0.self_attn.q_proj.weight"] == scales["model.layers.0.self_attn.k_proj.weight"]
    assert len(set(scales.values())) > 2, "layers that read other inputs have other scales"
    # What was written says it again, and gives the same file.
    again = compress(*llama, "size=3x", recipe=result.out / "recipe.yaml", out=tmp_path / "again")
    assert (again.out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    assert scales == {n: static_scale(s.inputs) for n, s in packed_specs(laconic.load(again.out)).items() if n in scales}
    code, _, err = run_cli(
        capsys, "compress", llama[0], "--budget", "size=3x", "--recipe", str(recipe), "--out", str(tmp_path / "bad")
    )
    assert code == 2 and "calibrates a scale for every layer, and the model has no data" in err


def test_a_ceiling_out_of_reach_ends_with_the_fastest_that_was_measured(
    llama: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(
        capsys,
        "compress",
        llama[0],
        "--data",
        llama[1],
        "--budget",
        "size=3x, latency=1000000x",
        "--out",
        tmp_path / "out",
    )
    assert code == 2 and "cannot be reached" in err and "the fastest plan that was measured takes" in err
    assert not (tmp_path / "out").exists()


def test_a_miss_after_the_work_is_a_miss(monkeypatch: pytest.MonkeyPatch, llama: Any, tmp_path: Any) -> None:
    times = {"float": 10.0, "before": 10.0, "packed": 4.0, "after": 6.0}
    keep_time(monkeypatch, lambda runs: {name: times[name] for name in runs})
    result = compress(*llama, "size=3x, latency=2x", out=tmp_path / "out")
    assert not result.met and result.exit_code == 3
    assert result.record["budget"]["latency"] == {"text": "2x", "ms": 5.0, "met": False}


def test_the_search_corrects_itself_by_whole_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers promise 6 ms, the whole takes 9: the next plan must gain the difference."""
    rooms: list[float] = []

    def fit(ground: Any, costs: Any, ceiling: Any, extra: Any, room: float) -> dict[str, Any]:
        rooms.append(room)
        return {}

    monkeypatch.setattr(timed, "fit_within", fit)
    whole = iter([11.0, 7.0])
    ground: Any = SimpleNamespace(units=[], packable=[])
    found, tried = timed.find_timed(ground, {}, _Times(), None, 10.0, 8.0, [""], lambda decision: next(whole))
    assert found.milliseconds == 7.0 and [t.milliseconds for t in tried] == [11.0, 7.0]
    assert rooms == pytest.approx([timed.MARGIN * 8 - 10, timed.MARGIN * 8 - 1 - 10])


def test_latency_needs_what_it_is_measured_on(monkeypatch: pytest.MonkeyPatch, llama: Any, tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="a latency is measured on data"):
        compress(llama[0], None, "size=3x, latency=2x", out=tmp_path / "out")
    monkeypatch.setattr(reading, "RUNTIME", 1 << 30)
    bound = (1 << 30) + (150 << 20)
    heavy: Any = SimpleNamespace(units=[SimpleNamespace(nbytes=bound)])
    run = reading.Reading(reading.Options(max_ram=bound), parse_budget("latency=2x"), lambda *a: None)
    with pytest.raises(BadInput, match="a latency is held against the float model, which does not fit under --max-ram"):
        run.must_stream(heavy)


@needs_kernels
def test_blocks_run_fused_and_the_recipe_can_say_no(llama: Any, tmp_path: Any) -> None:
    result = compress(*llama, "size=3x", out=tmp_path / "out")
    records = json.loads((result.out / "laconic.json").read_text())["records"]
    assert (
        sum(r["action"] == "fuse" for r in records)
        == sum(isinstance(m, FusedBlock) for m in laconic.load(result.out).modules())
        > 0
    )
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("version: 1\npasses:\n- pass: quantize\n  method: rtn\n")
    plain = compress(*llama, "size=3x", recipe=recipe, out=tmp_path / "plain")
    assert not any(isinstance(m, FusedBlock) for m in laconic.load(plain.out).modules())
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        assert torch.isfinite(laconic.load(result.out)(ids).logits).all()
