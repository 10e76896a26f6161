"""`mosaicbert`: slopes and attention by hand, padding that costs nothing, the recipe's parts, and the vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.norm import (
    LowPrecisionLayerNorm,
    MaskTokens,
    MosaicBert,
    MosaicBertConfig,
    MosaicEncoder,
    alibi_bias,
    alibi_slopes,
    low_precision_layernorm,
    repad,
    unpad,
)
from laconic.testing import Case, Example, Ints

TINY = MosaicBertConfig(23, width=12, layers=2, heads=3, hidden=10, dropout=0.0)
# By hand: attention with its norm, the gated perceptron with its norm.
LAYER = (3 * 12 * 12 + 36) + (12 * 12 + 12) + 24 + 2 * 12 * 10 + (10 * 12 + 12) + 24
EXAMPLES = [
    Example(
        lambda: MosaicBert(TINY),
        kind="Model",
        inputs=[Ints((2, 7), 23)],
        stated={"parameters": 23 * 12 + 2 * 12 + 24 + 2 * LAYER + (12 * 12 + 12 + 24) + 23},
    ),
    Example(
        lambda: MaskTokens(4, 50, special=(0, 1)),
        kind="Data",
        traits=("transform",),
        inputs=[Ints((6, 40), 50)],
        stated={"range": (-100, 49)},
    ),
    Example(
        lambda: LowPrecisionLayerNorm(8),
        kind="Layer",
        traits=("gradient:exact", "batch_independent_eval"),
        inputs=[(3, 8)],
        wrong=[(3, 7)],
    ),
]

# Roles of the vectors -> our names, in a layer.
ROLES = {
    "qkv_weight": "attention.qkv.weight",
    "qkv_bias": "attention.qkv.bias",
    "attn_out_weight": "attention.out.weight",
    "attn_out_bias": "attention.out.bias",
    "attn_norm_weight": "attention.norm.weight",
    "attn_norm_bias": "attention.norm.bias",
    "glu_weight": "perceptron.gated.weight",
    "mlp_out_weight": "perceptron.out.weight",
    "mlp_out_bias": "perceptron.out.bias",
    "mlp_norm_weight": "perceptron.norm.weight",
    "mlp_norm_bias": "perceptron.norm.bias",
}


def run_vector(case: Case):
    args = case.args
    if case.what == "forward":
        return {"bias": alibi_bias(args["num_heads"], args["length"], args["symmetric"])}
    config = MosaicBertConfig(
        1, args["hidden_size"], args["num_layers"], args["num_heads"], args["intermediate_size"],
        dropout=args["dropout"], eps=args["layer_norm_eps"],
    )  # fmt: skip
    encoder = MosaicEncoder(config)
    for role, name in ROLES.items():
        for layer, value in zip(encoder.layers, case.arrays(role), strict=True):
            layer.get_parameter(name).data.copy_(value)
    x = case.array("input").requires_grad_()
    y = encoder(x, case.array("mask"))
    y.backward(case.array("grad_output"))
    found = {f"grad_{r}": [layer.get_parameter(n).grad for layer in encoder.layers] for r, n in ROLES.items()}
    return {"output": y, "grad_input": x.grad, **found}


def test_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    six = [2 ** (-2 * i) for i in range(1, 5)] + [2**-1, 2**-3]
    assert alibi_slopes(6).tolist() == six
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert len(alibi_slopes(12)) == 12


def test_the_bias_of_both_forms():
    m = alibi_slopes(3)
    both, causal = alibi_bias(3, 5, dtype=torch.float64), alibi_bias(3, 5, False, dtype=torch.float64)
    for h in range(3):
        for i in range(5):
            for j in range(5):
                assert both[h, i, j] == -m[h] * abs(i - j)
                assert causal[h, i, j] == -m[h] * max(i - j, 0)


def naive(model, ids, mask):
    """Every token at its place, one head at a time; padding is looked at by nobody."""
    c = model.config
    x = model.norm(model.words(ids) + model.types.weight[0])
    bias = alibi_bias(c.heads, ids.shape[1], dtype=x.dtype)
    hidden = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask == 0, -torch.inf)
    for layer in model.encoder.layers:
        q, k, v = layer.attention.qkv(x).chunk(3, -1)
        size, parts = c.width // c.heads, []
        for h in range(c.heads):
            at = slice(h * size, (h + 1) * size)
            scores = q[..., at] @ k[..., at].mT / math.sqrt(size) + bias[h] + hidden[:, None, :]
            parts.append(scores.softmax(-1) @ v[..., at])
        x = layer.attention.norm(x + layer.attention.out(torch.cat(parts, -1)))
        u, w = layer.perceptron.gated(x).split(c.hidden, -1)
        x = layer.perceptron.norm(x + layer.perceptron.out(0.5 * u * (1 + torch.erf(u / math.sqrt(2))) * w))
    return model.head(model.transform(x))


def setting():
    torch.manual_seed(0)
    model = MosaicBert(TINY).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    return model, torch.randint(23, (3, 9)), mask


def test_the_equation():
    model, ids, mask = setting()
    got, want = model(ids, mask), naive(model, ids, mask)
    torch.testing.assert_close(got[mask != 0], want[mask != 0])


def test_padding_changes_nothing():
    model, ids, mask = setting()
    torch.testing.assert_close(model(ids, mask)[1, :4], model(ids[1:2, :4])[0])
    other = torch.where(mask == 0, (ids + 1) % 23, ids)
    assert torch.equal(model(other, mask), model(ids, mask))
    whole = torch.ones_like(mask)
    torch.testing.assert_close(model(ids, whole), model(ids))


def test_only_positions_that_are_asked_for():
    model, ids, mask = setting()
    asked = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(model(ids, mask, positions=asked), model(ids, mask)[asked & (mask != 0)])
    labels = torch.where(asked, ids, torch.full_like(ids, -100))
    want = F.cross_entropy(model(ids, mask)[asked & (mask != 0)], ids[asked & (mask != 0)])
    torch.testing.assert_close(model.masked_loss(ids, labels, mask).double(), want, rtol=1e-5, atol=1e-5)
    assert model.masked_loss(ids, torch.full_like(ids, -100), mask) == 0


def test_everything_padding_is_finite():
    model, ids, _ = setting()
    assert model(ids, torch.zeros_like(ids)).isfinite().all()
    assert model(ids[:, :0]).shape == (3, 0, 23)


def test_unpadding_and_back():
    x, mask = torch.randn(3, 4, 2), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    rows, places = unpad(x, mask)
    assert len(rows) == 5
    assert torch.equal(repad(rows, places, 3, 4), x * mask[..., None])


def test_shares_of_masked_tokens():
    ids = torch.randint(2, 100, (200, 200), generator=torch.Generator().manual_seed(0))
    masked, labels = MaskTokens(1, 100, 0.3, special=(5,))(ids, generator=torch.Generator().manual_seed(1))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    assert not (labels == 5).any()
    share = float(chosen[ids != 5].double().mean())
    became, stayed = float((masked[chosen] == 1).double().mean()), float((masked == ids)[chosen].double().mean())
    assert abs(share - 0.3) < 0.01 and abs(became - 0.8) < 0.02 and abs(stayed - 0.1) < 0.02


def test_layer_norms_in_autocasts_type():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(4, 8)
    want, weight = model(x), model[1].weight
    low_precision_layernorm(model)
    assert isinstance(model[1], LowPrecisionLayerNorm) and model[1].weight is weight
    assert torch.equal(model(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_refusals():
    with pytest.raises(BadInput, match="5 heads do not share a width of 12"):
        MosaicBertConfig(10, 12, 1, 5)
    with pytest.raises(ValueError, match="0 heads"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match=r"it must be \(0, 1\]|in \(0, 1\]"):
        MaskTokens(0, 10, 0.0)
    with pytest.raises(ValueError, match="no token of a vocabulary of 10"):
        MaskTokens(10, 10)
    model, ids, mask = setting()
    with pytest.raises(ValueError, match=r"a mask of \(3, 8\)"):
        model(ids, mask[:, :8])
    with pytest.raises(ValueError, match=r"positions of \(2, 9\)"):
        model(ids, positions=mask[:2])
