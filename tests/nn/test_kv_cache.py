"""The packed cache of keys and values in small language models with random weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from laconic.errors import BadInput
from laconic.kernels.attention import BLOCK
from laconic.nn.kv_cache import CachedStates, QuantizedCache, QuantizedLayer

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "qwen2": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=2, n_positions=256, attn_pdrop=0.0),
}


def build(config: PreTrainedConfig, attention: str = "laconic") -> Any:
    config = copy.deepcopy(config)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, 1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # as initialized, attention is nearly uniform, and hides a wrong key
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn")) and p.ndim == 2:
                p.mul_(12)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def stepwise(model: Any, ids: Tensor, cache: Any, steps: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, given in runs of these lengths."""
    found, at = [], 0
    for n in steps:
        seen = mask[:, : at + n] if mask is not None else None
        found.append(model(ids[:, at : at + n], attention_mask=seen, past_key_values=cache, use_cache=True).logits)
        at += n
    assert at == ids.shape[1]
    return torch.cat(found, 1)


def off(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, as a part of the spread of what is right."""
    return float((got - want).square().mean().sqrt() / want.std())


STEPS = [50, 1, 1, 5, *[1] * 33, 40, 1, 8, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_floats_that_grow_in_place_equal_transformers_own_cache(name: str) -> None:
    model, ids = build(CONFIGS[name]), tokens(2, sum(STEPS))
    want = stepwise(build(CONFIGS[name], "sdpa"), ids, DynamicCache(config=model.config), STEPS)
    got = stepwise(model, ids, QuantizedCache(model.config, bits=None), STEPS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key_axis", ["token", "channel"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_near_those_of_floats(name: str, key_axis: Any) -> None:
    model, ids = build(CONFIGS[name]), tokens(2, sum(STEPS))
    want = stepwise(model, ids, DynamicCache(config=model.config), STEPS)
    errors = []
    for bits in (8, 4, 2):
        cache = QuantizedCache(model.config, bits=bits, group=16, residual=32, key_axis=key_axis)
        got = stepwise(model, ids, cache, STEPS)
        assert cache.layers[0].packed >= 96 and cache.get_seq_length() == ids.shape[1]
        assert torch.equal(got[:, :50], want[:, :50])  # the prompt sees itself exactly
        errors.append(off(got, want))
    assert 0 < errors[0] < 0.02 and errors[0] < errors[1] < errors[2] < 0.5, errors


@pytest.mark.parametrize("name", CONFIGS)
def test_on_packed_numbers_or_dequantized_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, sum(STEPS))
    want = {}
    for attention in ("sdpa", "eager"):
        model = build(CONFIGS[name], attention)
        want[attention] = stepwise(model, ids, QuantizedCache(model.config, bits=4, residual=8), STEPS)
    model = build(CONFIGS[name])
    cache = QuantizedCache(model.config, bits=4, residual=8)
    calls = []
    monkeypatch.setattr(
        QuantizedLayer, "states", lambda self, f=QuantizedLayer.states: (calls.append(self), f(self))[1]
    )
    got = stepwise(model, ids, cache, STEPS)
    assert len(calls) == 2  # only the run of 40, once for each layer: all others computed on packed numbers
    for found in want.values():
        torch.testing.assert_close(got, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_step_sees_what_was_exact_until_then(name: str) -> None:
    """The step that packs the first tokens has read them as floats."""
    model, ids = build(CONFIGS[name]), tokens(1, 96)
    want = stepwise(model, ids, DynamicCache(config=model.config), [32, 32, 32])
    got = stepwise(model, ids, QuantizedCache(model.config, bits=2, residual=32), [32, 32, 32])
    torch.testing.assert_close(got[:, :64], want[:, :64], rtol=1e-4, atol=1e-4)
    assert off(got[:, 64:], want[:, 64:]) > 1e-3


def test_generates_with_padding_on_the_left() -> None:
    model = build(CONFIGS["llama"])
    long, short = tokens(1, 60), tokens(1, 23)
    ids = torch.cat([torch.cat([torch.zeros(1, 37, dtype=torch.long), short], 1), long])
    mask = (torch.arange(60) >= torch.tensor([[37], [0]])).long()
    told = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cache = QuantizedCache(model.config, bits=8)
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **told)
    assert cache.layers[0].packed == 64 and cache.get_seq_length() == 99
    plain = model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **told)
    assert off(together.logits[0], plain.logits[0]) < 1e-5
    # Forced along the same tokens, since a near tie may be decided otherwise.
    forced = plain.sequences[:, :99]
    whole = torch.cat([mask, torch.ones(2, 39, dtype=torch.long)], 1)
    position = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(forced, attention_mask=whole, position_ids=position).logits
        cache = QuantizedCache(model.config, bits=8)
        model(forced[:, :60], attention_mask=mask, position_ids=position[:, :60], past_key_values=cache)
        for at in range(60, 99):
            seen = {"attention_mask": whole[:, : at + 1], "position_ids": position[:, at : at + 1]}
            got = model(forced[:, at : at + 1], past_key_values=cache, **seen).logits[:, 0]
            assert off(got, want[:, at]) < 0.03


def test_beams_are_reordered() -> None:
    model, ids = build(CONFIGS["llama"]), tokens(2, 40)
    told = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False}
    want = model.generate(ids, past_key_values=DynamicCache(config=model.config), **told)
    assert torch.equal(model.generate(ids, past_key_values=QuantizedCache(model.config, bits=None), **told), want)
    packed = model.generate(ids, past_key_values=QuantizedCache(model.config, bits=8), **told)
    assert packed.shape == want.shape


@pytest.mark.parametrize("key_axis", ["token", "channel"])
def test_rows_of_the_batch_move_together(key_axis: Any) -> None:
    k, v = torch.randn(3, 2, 70, 16), torch.randn(3, 2, 70, 16)
    layer = QuantizedLayer(4, 2, residual=32, key_axis=key_axis)
    layer.update(k, v)
    before = [x.clone() for x in layer.states()]
    order = torch.tensor([2, 2, 0])
    layer.reorder_cache(order)
    assert all(torch.equal(a, b[order]) for a, b in zip(layer.states(), before, strict=True))
    layer.batch_select_indices(torch.tensor([2]))
    layer.batch_repeat_interleave(2)
    assert all(torch.equal(a, b[[0, 0]]) for a, b in zip(layer.states(), before, strict=True))
    keys, _ = layer.update(k[:2, :, :1], v[:2, :, :1])
    assert keys.shape == (2, 2, 71, 16)


@pytest.mark.parametrize("removed", [1, 20, 38, 39, 50, 101, 102, 500])
@pytest.mark.parametrize("key_axis", ["token", "channel"])
def test_crop_leaves_what_came_before_as_it_was(key_axis: Any, removed: int) -> None:
    k, v = torch.randn(1, 2, 102, 16), torch.randn(1, 2, 102, 16)
    layer = QuantizedLayer(4, 4, residual=32, key_axis=key_axis)
    layer.update(k, v)
    assert (layer.packed, layer.recent) == (64, 38)
    before, left = [x.clone() for x in layer.states()], max(0, 102 - removed)
    layer.crop(-removed)
    assert layer.get_seq_length() == left
    assert all(torch.equal(a, b[:, :, :left]) for a, b in zip(layer.states(), before, strict=True))
    new = torch.randn(1, 2, 75, 16)
    for at in range(75):  # and goes on
        layer.update(new[:, :, at : at + 1], new[:, :, at : at + 1])
    keys, values = layer.states()
    assert keys.shape[2] == left + 75 and torch.equal(keys[:, :, -32:], new[:, :, -32:])
    # 4 bits over the range of about 16 to 32 normal numbers: half a step is at most 0.5 * 8 / 15.
    assert (values[:, :, left:] - new).abs().max() < 0.27
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    assert layer.update(k, v)[0] is k


def test_a_prompt_below_the_residual_is_exact_and_the_newest_stay_exact() -> None:
    k = torch.randn(1, 1, 63, 16)
    layer = QuantizedLayer(2, 2, residual=32)
    layer.update(k, k)
    assert layer.packed == 0 and torch.equal(layer.states()[0], k)
    layer.update(k[:, :, :1], k[:, :, :1])
    assert (layer.packed, layer.recent) == (32, 32)
    assert torch.equal(layer.states()[0][:, :, 32:63], k[:, :, 32:])
    none = QuantizedLayer(2, 2, residual=0)
    none.update(k, k)
    assert (none.packed, none.recent) == (32, 31)


@pytest.mark.parametrize(("bits", "axis", "group"), [(8, "token", 16), (4, "channel", None), (2, "token", None)])
def test_memory_is_what_the_format_says(bits: int, axis: Any, group: int | None) -> None:
    batch, heads, dim, n = 2, 3, 64, 1024 + 32
    layer = QuantizedLayer(bits, bits, group=group, key_axis=axis, capacity=1024)
    layer.update(torch.randn(batch, heads, n, dim), torch.randn(batch, heads, n, dim))
    assert (layer.packed, layer.recent) == (1024, 32)
    scales = 4 * dim // (group or dim)  # float16 scale and low, bytes a token
    keys = dim * bits // 8 + (4 * dim // BLOCK if axis == "channel" else scales)
    values = dim * bits // 8 + scales
    recent = 2 * 4 * dim * 64  # keys and values, float32, 32 + BLOCK places
    assert layer.nbytes == batch * heads * (1024 * (keys + values) + recent)
    whole = QuantizedCache(CONFIGS["llama"], bits=bits)
    model = build(CONFIGS["llama"])
    stepwise(model, tokens(1, 200), whole, [200])
    assert whole.nbytes == sum(x.nbytes for layer in whole.layers for x in layer._tensors())
    assert whole.nbytes > 0


def test_room_grows_rarely_and_can_be_asked_for() -> None:
    layer = QuantizedLayer(4, 4, capacity=2048)
    x = torch.randn(1, 1, 40, 16)
    layer.update(x, x)
    where = [t.data_ptr() for t in layer._tensors()]
    for _ in range(49):
        layer.update(x, x)
    assert layer.get_seq_length() == 2000 and [t.data_ptr() for t in layer._tensors()][2:] == where[2:]
    free = QuantizedLayer(None, None)
    seen = set()
    for _ in range(200):
        free.update(x, x)
        seen.add(free._k.shape[2])
    assert free.recent == 8000 and len(seen) < 16


def test_layers_with_a_window_stay_and_say_why() -> None:
    config = MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    model = build(config)
    cache = QuantizedCache(model.config, bits=4)
    assert set(cache.kept) == {0, 1} and "sliding_attention" in cache.kept[0]
    ids = tokens(1, 50)
    want = stepwise(model, ids, DynamicCache(config=model.config), [30, *[1] * 20])
    torch.testing.assert_close(stepwise(model, ids, cache, [30, *[1] * 20]), want)


def test_a_term_that_is_lacking_is_refused_and_works_under_eager() -> None:
    config = Gemma2Config(
        **SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=32, layer_types=["full_attention"] * 2
    )
    model = build(config)
    with pytest.raises(BadInput, match="Gemma2Attention of layer 0: has softcap"):
        stepwise(model, tokens(1, 40), QuantizedCache(model.config), [40])
    model.set_attn_implementation("eager")
    got = stepwise(model, tokens(1, 80), QuantizedCache(model.config, bits=8, residual=0), [70, *[1] * 10])
    want = stepwise(model, tokens(1, 80), DynamicCache(config=model.config), [70, *[1] * 10])
    assert off(got, want) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_halves(dtype: torch.dtype) -> None:
    model = build(CONFIGS["llama"]).to(dtype)
    ids = tokens(1, 100)
    steps = [70, *[1] * 30]
    want = stepwise(model, ids, DynamicCache(config=model.config), steps)
    for bits in (8, None):
        cache = QuantizedCache(model.config, bits=bits)
        got = stepwise(model, ids, cache, steps)
        assert got.dtype == dtype and cache.layers[0].states()[0].dtype == dtype
        assert off(got.float(), want.float()) < 0.1


def test_states_dequantize_for_whoever_asks() -> None:
    k, v = torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16)
    layer = QuantizedLayer(8, 8)
    layer.update(k, v)
    keys, values = layer.update(k[:, :, :1], v[:, :, :1])
    assert isinstance(keys, CachedStates) and keys.shape == (1, 2, 81, 16) and keys.dtype == torch.float32
    want = layer.states()
    got = keys * 2 + values.transpose(2, 3).transpose(2, 3)
    assert type(got) is Tensor and torch.equal(got, want[0] * 2 + want[1])
    later, _ = layer.update(k[:, :, :1], v[:, :, :1])
    assert torch.equal(keys + 0, want[0])  # was asked for in time
    layer.update(k[:, :, :1], v[:, :, :1])
    with pytest.raises(RuntimeError, match="of an earlier step"):
        later.sum()


def test_gradients_reach_new_tokens() -> None:
    model = build(CONFIGS["llama"])
    cache = QuantizedCache(model.config, bits=8, residual=0)
    stepwise(model, tokens(1, 40), cache, [40])
    model(tokens(1, 3), past_key_values=cache).logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "k_proj.weight" in n}
    assert len(grads) == 2 and all(g is not None and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"bits": 3}, "bits is 3: a cache has 8, 4 or 2"),
        ({"bits": (4, None)}, "bits is"),
        ({"key_axis": "head"}, "key_axis is 'head'"),
        ({"residual": -1}, "residual is -1"),
        ({"group": 0}, "group is 0"),
        ({"scale_dtype": torch.int8}, "scale_dtype is torch.int8"),
    ],
)
def test_what_makes_no_sense_is_refused(told: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        QuantizedCache(CONFIGS["llama"], **told)


def test_a_group_that_does_not_fit_names_the_layer() -> None:
    model = build(CONFIGS["llama"])
    with pytest.raises(BadInput, match="cache layer 0: keys have 32 numbers a head, which groups of 24 do not fit"):
        stepwise(model, tokens(1, 8), QuantizedCache(model.config, group=24), [8])
    with pytest.raises(BadInput, match="cache layer 0: a packed cache is not offloaded"):
        QuantizedCache(model.config).layers[0].offload()
    with pytest.raises(ValueError, match="crop: 3 is positive"):
        QuantizedCache(model.config).crop(3)
