"""The cache of keys and values as part of what compress gives back: recipe, artifact, its choice, and memory as a ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, MistralConfig

import laconic
from laconic.errors import BadInput, Impossible
from laconic.nn.default_cache import CacheOptions, default_cache
from laconic.nn.kv_cache import QuantizedCache
from laconic.nn.rotated_cache import RotatedQuantizedCache, announce_inputs
from laconic.numerics import rotate_heads
from laconic.pipeline import cache_bits
from laconic.pipeline.cache_bits import (
    CANDIDATES,
    ThroughCache,
    attention_for,
    cache_bytes,
    cache_shapes,
    calibrated,
    check_fits,
    choose_cache,
    measured,
    options_of,
    step_of,
    token_bytes,
)
from laconic.pipeline.compress import compress, plan
from laconic.pipeline.recipe import KVCache, Recipe, load_recipe
from laconic.pipeline.source import resolve
from laconic.tasks import load_task
from laconic.tasks.language import PerplexityTask
from tests.nn.test_kv_cache import CONFIGS, SMALL, build, tokens
from tests.zoo import ZOO

from .runs import Classifier, save, token_file

GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


def _spans(cache: Any) -> list[Any]:
    """Codes, scales and lows of all layers."""
    return [x for layer in cache.layers for part in (layer._keys, layer._values) for x in part.tensors()]


def recipe(at: Path, text: str) -> Path:
    at.write_text(f"passes: [{{pass: quantize, method: rtn}}, {text}]\n")
    return at


def windows(length: int = 161) -> PerplexityTask:
    rng = np.random.default_rng(0)
    return PerplexityTask("t", {split: rng.integers(1, 61, (3, length)) for split in ("calibrate", "select", "verify")})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("llama")
    return save("llama", at / "float"), token_file(at / "tokens.npz", rows=12, length=100)


# --- through the artifact ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "length"),
    [
        ("{pass: kv_cache, key_bits: 4, value_bits: 2, residual: 0}", QuantizedCache, 70),
        ("{pass: kv_cache, method: rotatekv, key_bits: 2, value_bits: 2, residual: 0}", RotatedQuantizedCache, 24),
    ],
)
def test_an_artifact_brings_its_cache(llama: Any, tmp_path: Path, said: str, kind: type, length: int) -> None:
    out, data = tmp_path / "out", token_file(tmp_path / "tokens.npz", rows=12, length=length)
    found = compress(llama[0], data, "size=3x", recipe=recipe(tmp_path / "r.yaml", said), out=out)
    assert any("bytes a token" in note for note in found.record["notes"])
    without = [note for note in found.record["notes"] if "without the cache: windows of 24 tokens" in note]
    assert bool(without) == (length == 24)
    ids = torch.arange(3, 73)[None]
    model = laconic.load(out)
    if length > 24:
        task = load_task(data, resolve(llama[0]))
        want = measured(model, task, "verify", default_cache(model)).value
        assert found.record["after"]["value"] == pytest.approx(want) != task.evaluate(model, "verify").value
    first = model.generate(ids, **GENERATE)
    assert type(first.past_key_values) is kind and first.past_key_values.layers[0].packed == 64
    options = default_cache(model)
    assert (
        options is not None and options.attention == "laconic" and bool(options.orders) == (kind is not QuantizedCache)
    )
    assert model.generate(ids, use_cache=False, **GENERATE).past_key_values is None

    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert default_cache(again) == options and torch.equal(again.generate(ids, **GENERATE).sequences, first.sequences)
    assert default_cache(AutoModel.from_pretrained(out)) is None  # it does not generate
    step = load_recipe(out / "recipe.yaml").kv_cache
    assert step is not None and options_of(step) == CacheOptions(
        options.key_bits, options.value_bits, residual=0, method=options.method, attention=None
    )


def test_recipes_of_caches() -> None:
    steps = Recipe(passes=[KVCache(key_bits=2, value_bits=2)]).passes
    assert [p.action for p in Recipe().with_cache(steps[0]).passes][-2:] == ["kv_cache", "fuse_blocks"]
    for options in (*CANDIDATES, CacheOptions(2, 2, 64, 8, "token", "rotatekv", None)):
        assert options_of(step_of(options)) == (None if options is None else CacheOptions(
            options.key_bits, options.value_bits, options.group, options.residual, options.key_axis, options.method, None
        ))  # fmt: skip
    for wrong in ({"key_bits": None}, {"key_bits": 3}, {"residual": -1}, {"method": "magic"}):
        with pytest.raises(ValueError, match="KVCache"):
            KVCache(**wrong)


# --- what fits, and what it takes -------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_that_the_layers_hold(name: str) -> None:
    model, ids = build(CONFIGS[name]), tokens(1, 32 * 7 + 16 + 3)
    shapes = cache_shapes(model)
    assert cache_shapes(model.to("meta")) == shapes
    model, packed = build(CONFIGS[name]), 32 * 7
    plain = DynamicCache(config=model.config)
    found: list[tuple[Any, Any]] = [(None, plain)]
    for options in (CacheOptions(8, 4, 16, 16), CacheOptions(2, 2, residual=16)):
        found.append((options, options.make(model.config, capacity=256)))
    if name != "gpt2":
        announce_inputs(model)
        options = CacheOptions(2, 4, 16, 16, method="rotatekv")
        found.append((options, RotatedQuantizedCache(model.config, (2, 4), 16, 16, sinks=0, capacity=256)))
    for options, cache in found:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        if options is None:
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        else:
            assert cache.layers[0].packed == packed
            held = sum(layer.nbytes for layer in cache.layers)
            held -= sum((256 - packed) * x[:, :, :1].nbytes // (1 if x.shape[2] == 256 else 32) for x in _spans(cache))
        want = cache_bytes(shapes, options, ids.shape[1])
        if options is not None and options.method == "rotatekv":
            want -= (
                20 * sum(4 * s.heads * (s.key_dim + s.value_dim) for s in shapes) + 2 * shapes[0].key_dim * ids.shape[1]
            )
        assert held == want, options
    assert token_bytes(shapes, None) == 4 * sum(s.heads * (s.key_dim + s.value_dim) for s in shapes)
    assert token_bytes(shapes, CANDIDATES[1]) < 0.5 * token_bytes(shapes, None)


def test_models_without_such_a_cache_are_refused(llama: Any, tmp_path: Path) -> None:
    for name in ("bert", "t5"):
        if name in ZOO:
            with pytest.raises(BadInput, match="leave kv_cache out"):
                cache_shapes(ZOO[name].build())
    with pytest.raises(BadInput, match="Classifier does not generate, and has no cache of keys and values"):
        compress(
            Classifier(),
            example=torch.zeros(1, 24),
            recipe=recipe(tmp_path / "r", "{pass: kv_cache}"),
            out=tmp_path / "o",
        )
    window = MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    with pytest.raises(BadInput, match="no layer that keeps all"):
        check_fits(CacheOptions(), cache_shapes(build(window)), "x")
    assert cache_bytes(cache_shapes(build(window)), CacheOptions(), 100) == 2 * 15 * 4 * 2 * 32
    with pytest.raises(BadInput, match="keys of x have 32 numbers, which groups of 24 do not fit"):
        check_fits(CacheOptions(group=24), cache_shapes(build(CONFIGS["llama"])), "x")
    check_fits(CacheOptions(group=64, method="rotatekv"), cache_shapes(build(CONFIGS["llama"])), "x")
    with pytest.raises(BadInput, match="rotatekv orders channels by running the float model on data"):
        compress(llama[0], recipe=recipe(tmp_path / "r", "{pass: kv_cache, method: rotatekv}"), out=tmp_path / "o")
    assert not (tmp_path / "o").exists() and attention_for(build(CONFIGS["llama"], "sdpa")) == "laconic"


def test_orders_are_by_rising_sums_of_rotated_keys() -> None:
    model, ids = build(CONFIGS["llama"]), tokens(2, 40)
    options = calibrated(CacheOptions(2, 2, method="rotatekv"), model, [{"input_ids": ids}])
    assert set(options.orders) == {0, 1} and all(sorted(o) == list(range(64)) for o in options.orders.values())
    for i, order in options.orders.items():
        seen: list[Any] = []
        handle = model.model.layers[i].self_attn.k_proj.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        with torch.no_grad():
            model(ids)
        handle.remove()
        total = rotate_heads(seen[0].double(), 64).sum((0, 1))  # the key layer's outputs have no positions yet
        assert total[order].diff().min() > -0.05 * total.std()  # float16 cos and sin: near ties may change places
    assert not any(block._forward_pre_hooks for block in model.model.layers)
    with pytest.raises(BadInput, match="which these data are not"):
        calibrated(CacheOptions(method="rotatekv"), model, [(ids,)])
    with pytest.raises(BadInput, match="pass --data or --task"):
        calibrated(CacheOptions(method="rotatekv"), model, [])
    with pytest.raises(BadInput, match="did not say at which positions"):
        calibrated(CacheOptions(method="rotatekv"), build(CONFIGS["gpt2"]), [{"input_ids": ids}])


# --- what it costs ----------------------------------------------------------------------------------


def test_chunks_through_a_float_cache_are_the_model_itself() -> None:
    model, task = build(CONFIGS["llama"]), windows()
    want = task.evaluate(model, "select").value
    floats = task.evaluate(ThroughCache(model, lambda: DynamicCache(config=model.config)), "select")
    assert floats.value == pytest.approx(want, rel=1e-5)
    losses = [abs(measured(model, task, "select", CacheOptions(b, b, residual=0)).value / want - 1) for b in (8, 2)]
    assert 0 < losses[0] < losses[1] and losses[0] < 0.05
    with pytest.raises(BadInput, match=r"windows of 40 tokens of t are too short .* --seq 97"):
        measured(model, windows(40), "select", CacheOptions())
    mask = torch.ones(2, 70)
    got = ThroughCache(model, lambda: DynamicCache(config=model.config), 64)(tokens(2, 70), mask)
    assert got.shape == (2, 70, 61)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build(CONFIGS["llama"]), windows()
    before = task.evaluate(model, "select")
    worse = {8: 1.001, 4: 1.01, 2: 1.3}

    def fake(model: Any, task: Any, split: str, options: CacheOptions, chunk: int) -> Any:
        scores = before.per_example.copy()
        scores[:, 0] += scores[:, 1] * np.log(worse[options.value_bits])
        return type(before)(task.metric.value(scores), scores, answers=before.answers)

    monkeypatch.setattr(cache_bits, "measured", fake)
    chosen, rows = choose_cache(model, task, allowed_drop=2.0, before=before)
    assert chosen == CacheOptions(4, 4) and [round(row.drop or 0, 1) for row in rows] == [0.0, 0.1, 1.0, 30.0, 30.0]
    assert choose_cache(model, task, allowed_drop=50.0, before=before)[0] == CacheOptions(2, 2)
    assert choose_cache(model, task, allowed_drop=0.0)[0] is None
    room = rows[2].bytes
    chosen, rows = choose_cache(model, task, allowed_drop=0.5, room=room, before=before)
    assert chosen == CacheOptions(4, 4) and rows[0].drop is rows[1].drop is None
    assert choose_cache(model, task, allowed_drop=None, before=before)[0] is None
    assert rows[2].to_json()["name"] == "4 bits" and rows[0].to_json()["options"] is None
    with pytest.raises(BadInput, match=r"no cache of 4,096 tokens in 1 rows fits into 10 bytes: the least takes"):
        choose_cache(model, task, room=10, before=before)


def test_rotated_candidates_are_calibrated() -> None:
    model, task = build(CONFIGS["llama"]), windows()
    rotated = CacheOptions(2, 2, residual=0, method="rotatekv")
    chosen, rows = choose_cache(model, task, candidates=[rotated], allowed_drop=1e9)
    assert chosen is not None and chosen.orders and rows[0].value is not None
    assert not any(block._forward_pre_hooks for block in model.model.layers)


# --- memory as a ceiling ----------------------------------------------------------------------------


def test_memory_is_weights_and_cache_together(llama: Any, tmp_path: Path) -> None:
    folder, data = llama
    told = {"seq": 100, "batch": 2}
    least = plan(folder, budget="size=2x")["least"]
    shapes = cache_shapes(ZOO["llama"].build())
    smallest, floats = (cache_bytes(shapes, o, 100, 2) for o in (CANDIDATES[-1], None))
    with pytest.raises(Impossible, match=f"the least is {least + smallest:,} bytes.*2 x 100 tokens"):
        plan(folder, budget=f"memory={least + smallest - 1}B", **told)
    allowed = int(1.2 * (least + smallest))
    found = compress(folder, data, f"memory={allowed}B", out=tmp_path / "out", **told)
    memory = found.record["budget"]["memory"]
    assert memory["met"] and found.exit_code == 0
    assert memory["weights"] + memory["cache"] <= allowed and memory["cache"] < floats
    assert default_cache(laconic.load(tmp_path / "out")) is not None
    planned = plan(folder, budget=f"memory={allowed}B", **told)
    shown = {key: planned["memory"][key] for key in ("bytes", "cache", "tokens", "batch", "cache_bits", "met")}
    assert shown == {key: memory[key] for key in shown} and planned["memory"]["weights"] == planned["size_after"]
    measuring = plan(folder, data, f"memory={allowed + floats}B, drop=50", **told)["notes"]
    assert any("compress measures what each cache loses" in note for note in measuring)
    with_drop = compress(folder, data, f"memory={allowed + floats}B, drop=50", out=tmp_path / "b", **told)
    assert with_drop.record["budget"]["memory"]["tried"]
    fixed = recipe(tmp_path / "r", "{pass: kv_cache, key_bits: null, value_bits: null}")
    with pytest.raises(Impossible, match="the least is"):
        plan(folder, budget=f"memory={least + floats - 1}B", recipe=fixed, **told)
    assert plan(folder, budget=f"memory={least + floats}B", recipe=fixed, **told)["size_after"] == least


def test_without_a_cache_memory_is_the_weights(tmp_path: Path) -> None:
    model, example = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.zeros(1, 64)
    found = compress(model, budget="memory=8KB", example=example, out=tmp_path / "out")
    assert found.size_after <= 8000 and found.record["budget"]["memory"]["cache"] == 0
    with pytest.raises(Impossible, match=r"weights of [\d,]+ at the fewest bits$"):
        plan(model, budget="memory=1KB", example=example)
