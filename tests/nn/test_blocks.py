"""Transformer blocks as compiled code against their own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTModel,
)

from laconic.kernels import native, ops
from laconic.kernels.inputs import INT8_TOKENS, int8_tensor
from laconic.nn import PackedParameterSpec, declare, fill, is_packed, pack_tensors
from laconic.nn.blocks import FusedBlock, fuse, fuse_block
from laconic.numerics import Scheme, affine_params, quantize

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")

SCHEMES = ["v1/int8/channel/float32/minmax/znone/nearest", "v1/int4/group16/float16/minmax/zint/nearest"]
SMALL: dict[str, Any] = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_by_reference", False)  # tests/nn/conftest.py puts it back


def packed(model: nn.Module, scheme: str, inputs: str = "", skip: str = "?") -> nn.Module:
    """The model with every linear layer of its blocks packed."""
    parsed = Scheme.parse(scheme)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layer" in path and skip not in path:
            weight = module.weight.detach()
            scale, zero = affine_params(weight, parsed)
            spec = PackedParameterSpec(parsed, tuple(weight.shape), "rows", inputs)
            declare(module, "weight", spec)
            fill(module, "weight", pack_tensors(spec, quantize(weight, scale, zero, parsed), scale, zero))
    return model


def bert(act: str = "gelu", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL, num_attention_heads=4, hidden_act=act, **options)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_attention_heads=6, num_key_value_heads=3)).eval()


def twins(model: nn.Module, scheme: str, inputs: str = "") -> tuple[nn.Module, nn.Module]:
    """The packed model as it is, and with its blocks fused."""
    plain = packed(model, scheme, inputs)
    fused = copy.deepcopy(plain)
    assert set(fuse(fused).values()) == {""}
    return plain, fused


def runs_short(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """What a model gives, and how many of its blocks ran as compiled code."""
    count = 0
    prepared = [m for m in model.modules() if isinstance(m, FusedBlock)]
    originals = [m._ready for m in prepared]
    for module, ready in zip(prepared, originals, strict=True):

        def counted(*a: Any, ready: Any = ready) -> Any:
            nonlocal count
            found = ready(*a)
            count += found is not None
            return found

        object.__setattr__(module, "_ready", counted)
    try:
        with torch.no_grad():
            return model(*args, **kwargs), count
    finally:
        for module in prepared:
            object.__delattr__(module, "_ready")


IDS = torch.tensor([[5, 9, 2, 44, 7, 3, 8], [1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
def test_encoder_blocks(act: str, scheme: str) -> None:
    plain, fused = twins(bert(act), scheme)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    for given in (None, mask):
        with torch.no_grad():
            want = plain(IDS, attention_mask=given)[0]
        got, count = runs_short(fused, IDS, attention_mask=given)
        assert count == 2
        seen = (got[0] - want)[mask.bool()] if given is not None else got[0] - want
        assert float(seen.abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_distilbert(scheme: str) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=99, dim=48, hidden_dim=80, n_layers=2, n_heads=4)
    plain, fused = twins(DistilBertModel(config).eval(), scheme)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    with torch.no_grad():
        want = plain(IDS, attention_mask=mask)[0]
    got, count = runs_short(fused, IDS, attention_mask=mask)
    assert count == 2
    assert float((got[0] - want)[mask.bool()].abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("model", "config"), [(ViTModel, ViTConfig), (DeiTModel, DeiTConfig)])
def test_vision_blocks(model: Any, config: Any, scheme: str) -> None:
    torch.manual_seed(0)
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    plain, fused = twins(model(config(**sizes, num_attention_heads=4, image_size=16, patch_size=4)).eval(), scheme)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = plain(pixels)[0]
    got, count = runs_short(fused, pixels)
    assert count == 2
    assert float((got[0] - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [llama, qwen])
def test_decoder_blocks_with_and_without_a_cache(make: Any, scheme: str) -> None:
    plain, fused = twins(make(), scheme)
    with torch.no_grad():
        want = plain(IDS).logits
    got, count = runs_short(fused, IDS)
    assert count == 2
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-5)
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])  # padded on the left
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for mask in (torch.ones_like(IDS), left):
        assert torch.equal(
            fused.generate(IDS, attention_mask=mask, **options), plain.generate(IDS, attention_mask=mask, **options)
        )


@torch.no_grad()
def test_steps_that_read_a_packed_cache_run_the_blocks_own_forward() -> None:
    """A compiled block would ask for the addresses of keys that are not there."""
    from laconic.nn.kv_cache import QuantizedCache

    plain, fused = twins(llama(), SCHEMES[0])
    found = []
    for model in (plain, fused):
        cache, ids = QuantizedCache(model.config, bits=8), torch.arange(100)[None] % 60
        steps = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([70, 1, 20, 1, 8], 1)]
        assert cache.layers[0].packed == 64
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [bert, llama])
def test_inputs_of_8_bits_for_any_number_of_tokens(make: Any) -> None:
    plain, fused = twins(make(), SCHEMES[1], INT8_TOKENS)
    ids = torch.arange(3 * 40).reshape(3, 40) % 99
    with torch.no_grad():
        want = plain(ids)[0]
    got, count = runs_short(fused, ids)
    assert count == 2
    # A last bit of a norm may turn a code of the next layer's inputs: an 8-bit step, and no more.
    assert float((got[0] - want).abs().max()) < 0.02 * float(want.abs().max())
    assert float((got[0] - want).abs().mean()) < 0.002 * float(want.abs().max())


def packed_with_static_inputs(model: nn.Module, ids: Tensor, mixed: bool) -> nn.Module:
    """Linear layers of the blocks packed, with one scale for the inputs of each, from what they read."""
    largest: dict[str, float] = {}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer" in n}
    for name, module in linear.items():
        module.register_forward_pre_hook(lambda m, args, n=name: largest.__setitem__(n, float(args[0].abs().max())))
    with torch.no_grad():
        model(ids)
    for number, (name, module) in enumerate(linear.items()):
        module._forward_pre_hooks.clear()
        scheme = Scheme.parse((*SCHEMES, "v1/int4/group16/float16/minmax/znone/nearest")[number % 3 if mixed else 1])
        weight = module.weight.detach()
        spec = PackedParameterSpec(scheme, tuple(weight.shape), inputs=int8_tensor(largest[name] / 127))
        scale, zero = affine_params(weight, scheme)
        tensors = pack_tensors(spec, quantize(weight, scale, zero, scheme), scale, zero)
        declare(module, "weight", spec)
        fill(module, "weight", tensors)
    return model


@pytest.mark.parametrize("wide", [80, 70, 77])
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "other groups"])
@pytest.mark.parametrize("make", [bert, llama])
def test_inputs_by_a_scale_that_is_known(make: Any, mixed: bool, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "intermediate_size", wide)
    ids = torch.arange(3 * 40).reshape(3, 40) % 99
    plain = packed_with_static_inputs(make(), ids, mixed)
    fused = copy.deepcopy(plain)
    assert set(fuse(fused).values()) == {""}
    for some in (ids, ids[:1, :5]):  # by panels, and by rows
        with torch.no_grad():
            want = plain(some)[0]
        got, count = runs_short(fused, some)
        assert count == 2
        # As above: a last bit may turn a code, which is one step of 127.
        assert float((got[0] - want).abs().max()) < 0.02 * float(want.abs().max())
        assert float((got[0] - want).abs().mean()) < 0.002 * float(want.abs().max())
    several, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(fused.base_model(ids)[0])  # not the head, whose products are torch's
    finally:
        torch.set_num_threads(several)
    assert torch.equal(*found), "the same bits for any number of threads"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [bert, llama])
def test_many_tokens_and_layers_that_stay_float(make: Any, scheme: str) -> None:
    plain = packed(make(), scheme, skip="v_proj" if make is llama else "output")
    fused = copy.deepcopy(plain)
    assert set(fuse(fused).values()) == {""}
    for ids in (torch.arange(4 * 20).reshape(4, 20) % 99, torch.tensor([[3, 5]])):
        with torch.no_grad():
            want = plain(ids)[0]
        got, count = runs_short(fused, ids)
        assert count == 2
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


def test_its_own_forward_runs_where_the_short_way_does_not_apply() -> None:
    _, fused = twins(bert(), SCHEMES[0])
    fused.train()
    assert runs_short(fused, IDS)[1] == 0, "training"
    fused.eval()
    x = torch.randn(1, 3, 48, requires_grad=True)
    block: Any = fused.encoder.layer[0]
    block(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    seen: list[Tensor] = []
    handle = block.output.dense.register_forward_hook(lambda m, a, out: seen.append(out))
    assert runs_short(fused, IDS)[1] == 1 and len(seen) == 1, "a hook inside"
    handle.remove()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert runs_short(fused, IDS)[1] <= 2
    assert runs_short(copy.deepcopy(fused).to(torch.bfloat16), IDS)[1] == 0, "another type"


def test_new_values_and_places_are_seen() -> None:
    plain, fused = twins(bert(), SCHEMES[0])
    runs_short(fused, IDS)
    for model in (plain, fused):
        model.encoder.layer[0].attention.self.query.weight_scale.mul_(2)
        model.encoder.layer[1].output.dense.weight_packed = nn.Parameter(
            model.encoder.layer[1].output.dense.weight_packed.flip(0).contiguous(), requires_grad=False
        )
        model.encoder.layer[1].output.LayerNorm.bias = nn.Parameter(torch.ones(48))
    with torch.no_grad():
        want = plain(IDS)[0]
    torch.testing.assert_close(runs_short(fused, IDS)[0][0], want, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(fused)
    torch.testing.assert_close(runs_short(copied, IDS)[0][0], want, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_still_collected() -> None:
    plain, fused = twins(llama(), SCHEMES[0])
    with torch.no_grad():
        want = plain(IDS, output_hidden_states=True).hidden_states
        got = fused(IDS, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attentions_are_still_collected() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_attention_heads=4, attn_implementation="eager")
    plain, fused = twins(BertModel(config).eval(), SCHEMES[0])
    with torch.no_grad():
        want, got = (m(IDS, output_attentions=True).attentions for m in (plain, fused))
    assert len(got) == len(want) == 2
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fused_says_why() -> None:
    model = packed(bert(), SCHEMES[0], skip="layer.1")
    assert fuse(model) == {"encoder.layer.0": "", "encoder.layer.1": "none of its linear layers is packed"}
    assert is_packed(model.encoder.layer[0].output.dense) and isinstance(model.encoder.layer[0], FusedBlock)
    assert fuse(model)["encoder.layer.0"] == ""  # twice is as once
    odd = packed(bert(act="tanh"), SCHEMES[0])
    assert set(fuse(odd).values()) == {"its activation Tanh has no kernel"}
    with pytest.raises(ValueError, match="Linear is no transformer block"):
        fuse_block(nn.Linear(2, 2))
