"""`batchformer`: both streams by hand, places apart, order, the layer's end, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import BatchFormer, remove_batchformer
from laconic.testing import Example

DOUBLES = {"check_layer_shape": "in training it gives twice the batch: that is the method"}
EXAMPLES = [
    Example(
        lambda: BatchFormer(8, 2, ff=5),
        kind="Layer",
        traits=("gradient:exact", "batch_independent_eval"),
        inputs=[shape],
        wrong=[(*shape[:-1], 7)],
        expected_failures=DOUBLES,
    )
    for shape in ((4, 8), (3, 2, 8))
]


def attention(x, encoder):
    """Of one sequence (S, d), head by head."""
    mixer = encoder.self_attn
    q, k, v = (x @ mixer.in_proj_weight.T + mixer.in_proj_bias).chunk(3, -1)
    size = x.shape[-1] // mixer.num_heads
    parts = []
    for h in range(mixer.num_heads):
        at = slice(h * size, (h + 1) * size)
        parts.append((q[:, at] @ k[:, at].T / size**0.5).softmax(-1) @ v[:, at])
    return torch.cat(parts, -1) @ mixer.out_proj.weight.T + mixer.out_proj.bias


def naive(x, encoder):
    x = encoder.norm1(x + attention(x, encoder))
    hidden = (x @ encoder.linear1.weight.T + encoder.linear1.bias).clamp_min(0)
    return encoder.norm2(x + hidden @ encoder.linear2.weight.T + encoder.linear2.bias)


def test_the_equation():
    layer, x = BatchFormer(8, dropout=0.0).double(), torch.randn(5, 8, dtype=torch.float64)
    assert layer.encoder.linear1.out_features == 8
    torch.testing.assert_close(layer(x), torch.cat([x, naive(x, layer.encoder)]))


def test_places_are_apart():
    layer, x = BatchFormer(8, dropout=0.0).double(), torch.randn(5, 3, 8, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (10, 3, 8)
    for t in range(3):
        torch.testing.assert_close(y[5:, t], naive(x[:, t], layer.encoder))


def test_a_second_layer_looks_through_the_second_stream_alone():
    first, second = BatchFormer(8, dropout=0.0), BatchFormer(8, dropout=0.0, streams=2)
    x = torch.randn(4, 8)
    y = second(first(x))
    assert torch.equal(y[:4], x)
    torch.testing.assert_close(y[4:], naive(first(x)[4:], second.encoder))
    assert second.labels(torch.arange(8)).tolist() == list(range(8))


def test_the_order_of_the_batch_does_not_matter():
    layer, x, order = BatchFormer(8, dropout=0.0), torch.randn(6, 8), torch.randperm(6)
    torch.testing.assert_close(layer(x[order])[6:], layer(x)[6:][order])


def test_a_batch_of_one_and_the_end():
    model = nn.Sequential(nn.Linear(3, 8), BatchFormer(8), nn.Linear(8, 2))
    assert model(torch.randn(1, 3)).shape == (2, 2)
    x = torch.randn(4, 3)
    want = model.eval()(x)
    remove_batchformer(model)
    assert torch.equal(model.train()(x), want) and isinstance(model[1], nn.Identity)


def test_refusals():
    with pytest.raises(ValueError, match="3 heads do not share 8"):
        BatchFormer(8, 3)
    with pytest.raises(ValueError, match="streams is 3"):
        BatchFormer(8, streams=3)
    with pytest.raises(ValueError, match="a batch of 3 is not two streams"):
        BatchFormer(8, streams=2)(torch.zeros(3, 8))
    with pytest.raises(BadInput, match="no BatchFormer to remove"):
        remove_batchformer(nn.Linear(2, 2))
