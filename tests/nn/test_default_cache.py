"""The cache that `generate` makes by itself, and the one whose keys and values are rotated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from laconic.errors import BadInput
from laconic.nn.default_cache import CacheOptions, default_cache, new_cache, use_cache
from laconic.nn.kv_cache import QuantizedCache
from laconic.nn.rotated_cache import RotatedLayer, RotatedQuantizedCache, _Announce, announce_inputs
from laconic.numerics import kv_round
from tests.nn.test_kv_cache import CONFIGS, SMALL, build, off, stepwise, tokens

TOLD: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
STEPS = [50, 1, 1, 5, *[1] * 33, 40, 1, 8, 1]
SCALED = LlamaConfig(
    **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
)  # fmt: skip


def test_generate_makes_the_cache_unless_it_is_told_otherwise() -> None:
    model, ids = build(CONFIGS["llama"], "sdpa"), tokens(1, 70)
    name, want = type(model).__name__, model.generate(ids, **TOLD).sequences
    options = CacheOptions(8, 8)
    use_cache(model, options)
    use_cache(model, options)
    found = model.generate(ids, **TOLD)
    assert isinstance(found.past_key_values, QuantizedCache) and found.past_key_values.layers[0].packed == 32
    assert type(model).__name__ == name and model.config._attn_implementation == "laconic"
    assert torch.equal(found.sequences, want)
    mine = DynamicCache(config=model.config)
    assert model.generate(ids, past_key_values=mine, **TOLD).past_key_values is mine
    assert not isinstance(model.generate(ids, cache_implementation="static", **TOLD).past_key_values, QuantizedCache)
    assert model.generate(ids, use_cache=False, **TOLD).past_key_values is None
    assert default_cache(copy.deepcopy(model)) == options and default_cache(build(CONFIGS["llama"])) is None
    assert isinstance(new_cache(build(CONFIGS["llama"])), DynamicCache)
    drafted = model.generate(ids, prompt_lookup_num_tokens=3, **{**TOLD, "return_dict_in_generate": False})
    assert drafted.shape == want.shape


def test_options_survive_json_and_are_checked() -> None:
    options = CacheOptions(4, 2, 16, 8, "channel", "rotatekv", None, {1: [2, 0, 1]})
    assert CacheOptions.from_json(options.to_json()) == options
    with pytest.raises(BadInput, match="method is 'magic'"):
        CacheOptions(method="magic")
    with pytest.raises(BadInput, match="Linear has no `generate`"):
        use_cache(torch.nn.Linear(2, 2), CacheOptions())
    assert CacheOptions(2, 2).make(CONFIGS["llama"]).layers[0].key_axis == "channel"


@pytest.mark.parametrize("config", [CONFIGS["llama"], CONFIGS["qwen2"], SCALED], ids=["llama", "qwen2", "yarn"])
def test_rotated_logits_are_near_those_of_floats(config: Any) -> None:
    model, ids = build(config), tokens(2, sum(STEPS))
    announce_inputs(model)
    want, errors = stepwise(model, ids, DynamicCache(config=model.config), STEPS), []
    for bits in (8, 4, 2):
        cache = RotatedQuantizedCache(model.config, bits, residual=32, sinks=2)
        got = stepwise(model, ids, cache, STEPS)
        assert cache.layers[0].packed >= 96 and cache.layers[0].positions is cache.layers[1].positions
        assert torch.equal(got[:, :50], want[:, :50])
        errors.append(off(got, want))
    assert 0 < errors[0] < 0.05 and errors[0] < errors[1] < errors[2] < 0.7, errors


def turned(layer: RotatedLayer, k: Any, n: int) -> Any:
    """Announce n tokens at their places."""
    angle = (
        torch.arange(layer.get_seq_length(), layer.get_seq_length() + n)[:, None] * torch.tensor([1.0, 0.1])
    ).repeat(1, 2)
    layer.announce(torch.randn(k.shape[0], n, 12), angle.cos()[None], angle.sin()[None])


def test_what_is_packed_is_the_rotated_keys_before_positions() -> None:
    order = torch.randperm(12).tolist()
    layer = RotatedLayer(4, 4, group=6, residual=0, order=order, size=12, sinks=0)
    k, v = torch.randn(2, 3, 32, 4), torch.randn(2, 3, 32, 4)
    turned(layer, k, 32)
    assert layer.update(k, v)[0] is k and layer.packed == 32
    want = kv_round(layer.rotated_keys(k, 0), 4, 6, dtype=torch.float16)
    assert torch.equal(layer._keys.floats(32, torch.float32), want)
    assert layer.positions.turned(layer.positions.turned(k, 0, back=True), 0, back=False).allclose(k, atol=1e-5)
    keys, values = layer.states()
    assert off(keys, k) < 0.15 and off(values, v) < 0.15


def test_sinks_rows_and_ends_of_a_rotated_layer() -> None:
    layer = RotatedLayer(2, 2, group=12, residual=0, sinks=1)
    k, v = torch.randn(2, 3, 64, 4), torch.randn(2, 3, 64, 4)
    hidden = torch.randn(2, 64, 12)
    hidden[0, 3, 2], hidden[1, 40, 0] = 99, -99
    turned(layer, k, 64)
    layer.announce(hidden, *layer._told[1:])
    layer.update(k, v)
    keys, values = layer.states()
    assert torch.equal(keys[0, :, 3], k[0, :, 3]) and torch.equal(values[1, :, 40], v[1, :, 40])
    assert not torch.equal(keys[1, :, 3], k[1, :, 3])
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.states()[0], keys[[1, 0]])
    layer.crop(-40)
    assert layer.get_seq_length() == 24 and torch.equal(layer.states()[1], values[[1, 0], :, :24])
    turned(layer, k, 40)
    layer.update(k[:, :, :40], v[:, :, :40])
    assert layer.packed == 56 and torch.equal(layer.states()[0][1, :, 3], k[0, :, 3])  # a sink that was not cut off
    assert not torch.equal(layer.states()[0][0, :, 40], k[1, :, 16])
    layer.reset()
    assert layer.nbytes == 0 and layer.positions is None


def test_rotated_generation_with_padding_beams_and_fewer_bytes() -> None:
    model, ids = build(CONFIGS["llama"]), tokens(2, 90)
    use_cache(model, CacheOptions(8, 8, method="rotatekv"))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    want = model.generate(
        ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), num_beams=2, **TOLD
    )
    got = model.generate(ids, attention_mask=mask, num_beams=2, **TOLD)
    assert isinstance(got.past_key_values, RotatedQuantizedCache)
    assert (got.sequences == want.sequences).float().mean() > 0.97
    plain = CacheOptions(2, 2, residual=0).make(model.config)
    rotated = CacheOptions(2, 2, residual=0, method="rotatekv").make(model.config)
    for cache in (plain, rotated):
        with torch.no_grad():
            model(tokens(1, 256), past_key_values=cache, use_cache=True)
    assert plain.nbytes < rotated.nbytes < 0.5 * 2 * 2 * 256 * 64 * 4


def test_a_rotated_cache_says_what_it_lacks() -> None:
    model = build(CONFIGS["gpt2"])
    with pytest.raises(BadInput, match="did not say at which positions"):
        model(tokens(1, 40), past_key_values=RotatedQuantizedCache(model.config), use_cache=True)
    announce_inputs(model)
    with pytest.raises(BadInput, match=r"transformer.h.1: is not given cos and sin"):
        _Announce(1, "transformer.h.1")(
            model, (torch.ones(1, 1, 4),), {"past_key_values": RotatedQuantizedCache(model.config)}
        )
    with pytest.raises(BadInput, match="no attention that knows its layer"):
        announce_inputs(torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match="floats need no rotation"):
        RotatedQuantizedCache(model.config, None)
    llama = build(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=32))
    announce_inputs(llama)
    for told, said in (({"group": 24}, "groups of 24 do not divide 64"), ({"orders": {0: [1, 0]}}, "another model")):
        with pytest.raises(BadInput, match=said):
            llama(tokens(1, 40), past_key_values=RotatedQuantizedCache(llama.config, **told), use_cache=True)
