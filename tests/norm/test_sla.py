"""`sla`: attention by its definition, both orders of summing, the convolution over the grid, dead queries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from laconic.norm import RepBN, SimplifiedLinearAttention, fold, linear_attention
from laconic.testing import Example

TRAITS = ("gradient:exact", "batch_independent_eval")
EXAMPLES = [
    Example(
        lambda: SimplifiedLinearAttention(4, 2, 9, 3),
        kind="Layer",
        traits=TRAITS,
        inputs=[(2, 9, 4)],
        wrong=[(2, 8, 4)],
    ),
    Example(
        lambda: SimplifiedLinearAttention(4, 2, (2, 4), 3, qkv_bias=False, reduction=2),
        kind="Layer",
        traits=TRAITS,
        inputs=[(2, 8, 4)],
        wrong=[(2, 8, 5)],
    ),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (40, 50)])
def test_attention_by_its_definition(n, m):
    q, k, v = drawn(n, 3).relu(), drawn(m, 3, seed=1).relu(), drawn(m, 4, seed=2)
    weights = q @ k.T
    want = (weights / (weights.sum(1, keepdim=True) + 0.1)) @ v
    torch.testing.assert_close(linear_attention(q, k, v, 0.1), want)


def test_the_equation():
    layer, x = SimplifiedLinearAttention(6, 2, (3, 4), 3).double(), drawn(2, 12, 6)
    nn.init.normal_(layer.positions, generator=torch.Generator().manual_seed(0))
    q, k, v = layer.qkv(x).split(6, -1)
    q, k = q.relu(), (k + layer.positions).relu()
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        o = linear_attention(q[..., part], k[..., part], v[..., part])
        picture = v[..., part].transpose(1, 2).reshape(2, 3, 3, 4)
        local = functional.conv2d(picture, layer.dwc.weight, layer.dwc.bias, padding=1, groups=3)
        heads.append(o + local.flatten(2).transpose(1, 2))
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def test_reduced_keys_and_values():
    layer, x = SimplifiedLinearAttention(4, 1, (2, 4), 3, reduction=2).double(), drawn(2, 8, 4)
    picture = x.transpose(1, 2).reshape(2, 4, 2, 4)
    reduced = layer.norm(layer.reduce(picture).flatten(2).transpose(1, 2))
    k, v = layer.kv(reduced).split(4, -1)
    o = linear_attention(layer.q(x).relu(), k.relu(), v)
    stretched = functional.interpolate(v.transpose(1, 2), size=8, mode="linear").reshape(2, 4, 2, 4)
    want = layer.proj(o + layer.dwc(stretched).flatten(2).transpose(1, 2))
    torch.testing.assert_close(layer(x), want)
    assert layer.positions.shape == (1, 2, 4)


def test_a_dead_query_gets_the_convolution_alone():
    layer, x = SimplifiedLinearAttention(4, 1, 4, 3), torch.randn(1, 4, 4)
    with torch.no_grad():
        layer.qkv.weight[:4], layer.qkv.bias[:4] = 0, -1
    y = layer(x)
    v = layer.qkv(x)[..., 8:]
    torch.testing.assert_close(y, layer.proj(layer.dwc(v.mT.reshape(1, 4, 2, 2)).flatten(2).mT))


def test_half_precision_is_summed_in_float32():
    layer, x = SimplifiedLinearAttention(8, 2, 256, dtype=torch.bfloat16), torch.randn(2, 256, 8).bfloat16()
    wide = SimplifiedLinearAttention(8, 2, 256)
    wide.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x).float(), wide(x.float()), atol=0.05, rtol=0.05)


def test_a_norm_before_it_folds_into_it():
    model, x = nn.Sequential(RepBN(4), SimplifiedLinearAttention(4, 2, 9)).eval(), torch.randn(2, 9, 4)
    nn.init.normal_(model[0].bias), nn.init.uniform_(model[0].running_var, 0.5, 2)
    want = model(x)
    assert fold(model, ((x,), {})).folded == {"0": ("1.qkv",)}
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 8}, "8 tokens are no square"),
        ({"num_heads": 3}, "4 channels in 3 heads"),
        ({"kernel_size": 4}, "be odd"),
        ({"reduction": 2}, r"a grid of \(3, 3\) cannot be reduced by 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SimplifiedLinearAttention(**{"dim": 4, "num_heads": 2, "num_tokens": 9, **options})


def test_it_shows_its_options():
    shown = repr(SimplifiedLinearAttention(4, 2, 9))
    assert shown.startswith("SimplifiedLinearAttention(\n  grid=(3, 3), num_heads=2, reduction=1")
