"""`llama_lm`: transformers' own Llama says the same with the same weights; sizes are as published; norms move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.testing import Example, Ints
from laconic.zoo import SCHEMES, LlamaLM, LlamaLMConfig
from laconic.zoo._llama_lm import rotary, rotate

TINY = LlamaLMConfig(vocabulary=23, width=16, layers=2, heads=4, kv_heads=2, hidden=24)
# By hand: queries and outputs, keys and values, the gated perceptron, two norms.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
LLAMA_2_7B = LlamaLMConfig(32_000, 4096, 32, 32, hidden=11_008)
# Published counts of published configs.
PUBLISHED = {
    "Llama 2 7B": (LLAMA_2_7B, 6_738_415_616),
    "Llama 3.2 1B": (LlamaLMConfig(128_256, 2048, 16, 32, 8, 8192, tied=True), 1_235_814_400),
    "TinyLlama 1.1B": (LlamaLMConfig(32_000, 2048, 22, 32, 4, 5632), 1_100_048_384),
    "SmolLM 135M": (LlamaLMConfig(49_152, 576, 30, 9, 3, 1536, tied=True), 134_515_008),
}

EXAMPLES = [
    Example(
        lambda: LlamaLM(TINY),
        kind="Model",
        traits=("causal",),
        inputs=[Ints((2, 7), 23)],
        stated={
            "parameters": 2 * 23 * 16 + 2 * LAYER + 16,
            "published": (lambda: LlamaLM(LLAMA_2_7B), PUBLISHED["Llama 2 7B"][1]),
        },
    )
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_as_published(name: str) -> None:
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaLM(config).parameters()) == count


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `LlamaForCausalLM`, under our names."""
    names = {
        "model.embed_tokens": "embedding",
        "model.norm": "norm",
        "lm_head": "head",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.branch.q",
        "self_attn.k_proj": "attention.branch.k",
        "self_attn.v_proj": "attention.branch.v",
        "self_attn.o_proj": "attention.branch.o",
        "mlp.gate_proj": "perceptron.branch.gate",
        "mlp.up_proj": "perceptron.branch.up",
        "mlp.down_proj": "perceptron.branch.down",
        "post_attention_layernorm": "perceptron.norm_in",
        "input_layernorm": "attention.norm_in",
    }
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_says_the_same(kv_heads: int, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=24, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    ours = LlamaLM(LlamaLMConfig(23, 16, 2, 4, kv_heads, 24, theta=500.0, tied=tied))
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    ids = torch.randint(23, (3, 11))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_table_of_embeddings() -> None:
    model = LlamaLM(LlamaLMConfig(23, 16, 1, tied=True))
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.std() < 0.05


def test_scores_depend_on_distances_alone() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = rotary(12, 8, 100.0, q)
    scores = rotate(q.expand(12, 8), cos, sin) @ rotate(k.expand(12, 8), cos, sin).T
    for offset in (0, 3, -5):
        along = scores.diagonal(offset)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_angles_are_not_rounded_with_the_model() -> None:
    cos, _ = rotary(4096, 8, 10_000.0, torch.zeros(1, dtype=torch.bfloat16))
    exact, _ = rotary(4096, 8, 10_000.0, torch.zeros(1, dtype=torch.float64))
    assert cos.dtype == torch.bfloat16
    assert (cos.double() - exact).abs().max() < 0.01
    assert not list(LlamaLM(TINY).buffers())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_placement_trains(scheme: str) -> None:
    torch.manual_seed(0)
    model = LlamaLM(LlamaLMConfig(23, 16, 4, placement=scheme))
    ids = torch.randint(23, (2, 7))
    logits = model(ids)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_norms_that_only_some_placements_have() -> None:
    made = {scheme: LlamaLM(LlamaLMConfig(23, 16, 4, placement=scheme)) for scheme in SCHEMES}
    assert {s for s, m in made.items() if isinstance(m.norm_embedding, nn.RMSNorm)} == {"peri"}
    assert {s for s, m in made.items() if isinstance(m.norm, nn.Identity)} == {"post", "deepnorm"}
    assert isinstance(LlamaLM(LlamaLMConfig(23, 16, 4, norm_embedding=True)).norm_embedding, nn.RMSNorm)


def test_deepnorm_begins_with_smaller_values_but_not_smaller_queries() -> None:
    torch.manual_seed(0)
    branch = LlamaLM(LlamaLMConfig(23, 128, 8, placement="deepnorm")).layers[0].attention.branch
    ratio = branch.v.weight.std() / branch.q.weight.std()
    assert ratio.item() == pytest.approx((8 * 8) ** -0.25, rel=0.05)


def test_the_default_perceptron_is_as_large_as_one_of_four_widths() -> None:
    for width in (64, 128, 576):
        assert 3 * LlamaLMConfig(10, width, heads=2).inner == pytest.approx(8 * width, rel=0.1)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="5 heads of an even width each do not fill a width of 16"):
        LlamaLMConfig(10, 16, heads=5)
    with pytest.raises(BadInput, match="16 heads of an even width"):
        LlamaLMConfig(10, 16, heads=16)
    with pytest.raises(BadInput, match="4 heads cannot share 3"):
        LlamaLMConfig(10, 16, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match=r"\(N, T\) are wanted, not \(3,\)"):
        LlamaLM(TINY)(torch.zeros(3, dtype=torch.long))
