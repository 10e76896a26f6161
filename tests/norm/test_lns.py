"""`lns`: the factor of each layer, that the last norm has none, and that it folds."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.errors import BadInput
from laconic.norm import fold_lns, lns, place
from laconic.zoo import LlamaLM, LlamaLMConfig, Residual


def model_of(placement) -> LlamaLM:
    torch.manual_seed(0)
    model = LlamaLM(place(LlamaLMConfig(23, 16, 5), placement)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_equation() -> None:
    model = model_of(lns())
    x, cos, sin = torch.randn(1, 4, 16, dtype=torch.float64), torch.ones(4, 2).double(), torch.zeros(4, 2).double()
    for number, layer in enumerate(model.layers, 1):
        a, m = layer.attention, layer.perceptron
        h = x + a.branch(a.norm_in(x) / math.sqrt(number), cos, sin)
        want = h + m.branch(m.norm_in(h) / math.sqrt(number))
        torch.testing.assert_close(layer(x, cos, sin), want)
        x = want
    assert not isinstance(model.norm, Residual) and model.norm.weight.shape == (16,)


def test_folded_it_is_an_ordinary_model() -> None:
    model, ids = model_of("lns"), torch.randint(23, (2, 7))
    before = model(ids)
    taken = fold_lns(model)
    assert taken[0] == "layers.1.attention.norm_in" and len(taken) == 8
    torch.testing.assert_close(model(ids), before)
    plain = model_of("pre")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(ids), before)


def test_the_gradient_of_the_gain_has_the_factor() -> None:
    model, ids = model_of("lns"), torch.randint(23, (2, 7))
    model(ids).square().sum().backward()
    scaled = model.layers[3].perceptron.norm_in.weight.grad.clone()
    fold_lns(model)
    model.zero_grad()
    model(ids).square().sum().backward()
    torch.testing.assert_close(scaled, model.layers[3].perceptron.norm_in.weight.grad / 2)


def test_refusals() -> None:
    with pytest.raises(BadInput, match="no block of LlamaLM scales what a norm gives"):
        fold_lns(model_of("pre"))
    model = model_of("lns")
    model.layers[1].attention.norm_in = torch.nn.RMSNorm(16, elementwise_affine=False)
    with pytest.raises(BadInput, match="layers.1.attention: no norm with a gain"):
        fold_lns(model)
