"""`place`: Hugging Face's layers against the equations, for every scheme; what is refused, and by which path."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from laconic.core.placement import SCHEMES, Placement
from laconic.core.placing import place, placements_of, unscale_
from laconic.errors import BadInput

LAYERS, WIDTH = 4, 16


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=23, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(23, (2, 7))}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=23, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(23, (2, 7))}


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=23, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.randint(23, (2, 7))}


def vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 8, 8)}


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}
OWN = {"llama": "pre", "gpt2": "pre", "bert": "post", "vit": "pre"}


def make(name: str):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():  # gains of one would hide which norm stands where
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_placement_that_a_model_has_is_the_same_model(name: str) -> None:
    model, inputs = make(name)
    before = output(model, inputs)
    names = list(model.state_dict())
    done = place(model, OWN[name])
    assert len(done.placements) == LAYERS and not done.fresh and not done.notes
    if name != "bert":  # Llama's norms keep float32 inside, whatever the model is in
        assert not done.removed
    assert list(model.state_dict()) == names
    torch.testing.assert_close(output(model, inputs), before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_runs_and_trains_on_every_model(name: str, scheme: str) -> None:
    model, inputs = make(name)
    done = place(model, scheme)
    assert list(placements_of(model).values()) == list(done.placements.values())
    out = model.train()(**inputs)[0]
    out.square().mean().backward()
    used = [p for n, p in model.named_parameters() if p.grad is not None]
    assert len(used) > 10 and all(p.grad.isfinite().all() for p in used)
    again, _ = make(name)  # what was saved opens in a model that was placed likewise
    place(again, scheme)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(again.eval(), inputs), output(model.eval(), inputs))


def reference(model: nn.Module, scheme: str, ids: Tensor) -> Tensor:
    """GPT-2 by its parts, with the norms as the scheme says."""
    body = model.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    if scheme == "peri":
        x = body.h[0].norm_embedding(x)
    for number, layer in enumerate(body.h, 1):
        t = ids.shape[1]
        mask = torch.full((1, 1, t, t), -torch.inf, dtype=x.dtype).triu(1)
        attention = lambda h, layer=layer, mask=mask: layer.attn(h, attention_mask=mask)[0]  # noqa: E731
        for branch, norm, out in ((attention, layer.ln_1, "norm_out_1"), (layer.mlp, layer.ln_2, "norm_out_2")):
            if scheme == "peri":
                x = x + getattr(layer, out)(branch(norm(x)))
            elif scheme == "mix" and number <= LAYERS // 4:
                x = norm(x + branch(x))
            elif scheme == "lns":
                x = x + branch(norm(x) / math.sqrt(number))
            else:
                x = x + branch(norm(x))
    return model.lm_head(body.ln_f(x))


@pytest.mark.parametrize("scheme", ["pre", "mix", "lns", "peri"])
def test_the_equations_of_gpt2(scheme: str) -> None:
    model, inputs = make("gpt2")
    place(model, scheme)
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), reference(model, scheme, inputs["input_ids"]))


def test_generation_with_a_cache_agrees_with_one_without() -> None:
    for name in ("llama", "gpt2"):
        model, inputs = make(name)
        place(model, "peri")
        made = [
            model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=c, pad_token_id=0)
            for c in (True, False)
        ]
        assert torch.equal(*made)


def test_hidden_states_are_recorded_and_copies_are_independent() -> None:
    model, inputs = make("llama")
    place(model, "mix")
    with torch.no_grad():
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == LAYERS + 1
    other = copy.deepcopy(model)
    torch.testing.assert_close(output(other, inputs), output(model, inputs))


def test_new_norms_begin_at_one_and_models_without_a_last_norm_get_one() -> None:
    model, _ = make("bert")
    done = place(model, "pre")
    assert done.fresh == (f"encoder.layer.{LAYERS - 1}.norm_final",)
    norm = model.encoder.layer[-1].norm_final
    assert (norm.weight == 1).all() and not norm.bias.any()
    model, _ = make("gpt2")
    assert place(model, "post").removed == ("transformer.ln_f",)


def test_first_weights_are_scaled_where_asked() -> None:
    model, _ = make("gpt2")
    before = copy.deepcopy(model.transformer.h[0].attn.c_attn.weight)
    done = place(model, "deepnorm", init=True)
    after, gain = model.transformer.h[0].attn.c_attn.weight, (8 * LAYERS) ** -0.25
    torch.testing.assert_close(after[:, 2 * WIDTH :], gain * before[:, 2 * WIDTH :])
    assert torch.equal(after[:, : 2 * WIDTH], before[:, : 2 * WIDTH]) and not done.notes
    model, _ = make("llama")
    assert "init=True" in place(model, "fixup").notes[0]
    model, _ = make("llama")
    place(model, "fixup", init=True)
    assert not model.model.layers[0].mlp.down_proj.weight.any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_factor_of_lns_folds_into_the_gain(name: str) -> None:
    model, inputs = make(name)
    place(model, "lns")
    before = output(model, inputs)
    taken = unscale_(model)
    assert len(taken) == 2 * (LAYERS - 1)
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-6)
    plain, _ = make(name)  # what is left is the ordinary model
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(plain, inputs), before, rtol=1e-5, atol=1e-6)


def test_a_config_of_ours_gets_the_placement() -> None:
    from laconic.zoo import LlamaLMConfig

    assert place(LlamaLMConfig(23, 16, 4), "lns").placement == "lns"


def test_refusals() -> None:
    model, _ = make("gpt2")
    place(model, "pre")
    with pytest.raises(BadInput, match=r"the norms of transformer.h were placed already"):
        place(model, "post")
    with pytest.raises(BadInput, match=r"Module: found layers of Linear; place knows LlamaDecoderLayer"):
        other = nn.Module()
        other.layers = nn.ModuleList([nn.Linear(2, 2)])
        place(other, "pre")
    with pytest.raises(BadInput, match="a model or a config with a placement is wanted, not a str"):
        place("gpt2", "pre")
    model, _ = make("gpt2")
    with pytest.raises(BadInput, match="N_in and N_add"):
        place(model, lambda layer, layers: Placement(norm_in=True, norm_after_add=True))
    model, _ = make("llama")
    with pytest.raises(BadInput, match="no layer of LlamaForCausalLM scales"):
        unscale_(model)
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=True,
        add_cross_attention=True,
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"encoder.layer.0 has cross-attention"):
        place(BertModel(config), "pre")
