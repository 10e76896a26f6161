"""`snn`: torch's own formulas, the fixed point through many layers, dropout's moments, conversion and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from laconic.errors import BadInput
from laconic.norm import SELU, AlphaDropout, alpha_dropout, lecun_normal_, to_self_normalizing
from laconic.testing import Example

TRAITS = ("gradient:exact", "batch_independent_eval")


def wide():
    return nn.Sequential(nn.Linear(400, 300), nn.Conv2d(30, 40, 3))


def as_stated(model):
    """Mean 0 and variance 1 / fan_in, as far as so many numbers show it; biases 0."""
    rows = [layer.weight.detach().float().flatten(1) for layer in model]
    spreads = [float(row.var() * row.shape[1]) for row in rows]
    means = [float(row.mean() * row.shape[1] ** 0.5) for row in rows]
    return (
        all(abs(s - 1) < 0.1 for s in spreads)
        and all(abs(m) < 0.05 for m in means)
        and not any(layer.bias.any() for layer in model)
    )


EXAMPLES = [
    Example(
        SELU,
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4)],
        wrong=[torch.ones(3, 4, dtype=torch.int64)],
        expected_failures={
            "check_layer_refuses_wrong_shape": "torch's SELU takes every shape, and its error on integers names the type"
        },
    ),
    Example(
        AlphaDropout,
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4)],
        wrong=[torch.ones(3, 4, dtype=torch.int64)],
        expected_failures={
            "check_layer_refuses_wrong_shape": "it takes every shape; integers are refused by their type",
        },
    ),
    Example(lambda: lecun_normal_, kind="Init", name="lecun_normal_", inputs=lambda g: [wide()], holds=as_stated),
]


def test_the_equation_of_selu():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    lam, alpha = 1.0507009873554805, 1.6732632423543772
    want = [lam * v if v > 0 else lam * alpha * (math.exp(v) - 1) for v in x.tolist()]
    torch.testing.assert_close(SELU()(x), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_dropout_keeps_mean_and_variance(p, mean, variance):
    g = torch.Generator().manual_seed(0)
    x = mean + variance**0.5 * torch.randn(400_000, generator=g, dtype=torch.float64)
    y = alpha_dropout(x, p, mean=mean, variance=variance, generator=g)
    assert abs(float(y.mean()) - mean) < 0.02 and abs(float(y.var()) - variance) < 0.03 * variance
    share = float((y == y.mode().values).double().mean())
    assert abs(share - p) < 0.005


def test_dropout_is_that_of_torch_at_the_usual_fixed_point():
    """Values alone: which are dropped is drawn otherwise."""
    x = torch.randn(1000, dtype=torch.float64)
    ours, theirs = alpha_dropout(x, 0.3), nn.functional.alpha_dropout(x, 0.3, training=True)
    a, b = (set(y.round(decimals=6).tolist()) for y in (ours, theirs))
    kept = (0.7 + (LAMBDA_ALPHA**2) * 0.7 * 0.3) ** -0.5
    shift = kept * 0.3 * LAMBDA_ALPHA
    allowed = set((kept * x + shift).round(decimals=6).tolist()) | {round(kept * -LAMBDA_ALPHA + shift, 6)}
    assert a <= allowed and b <= allowed


LAMBDA_ALPHA = 1.7580993408473766


def test_dropout_in_evaluation_mode_is_the_identity():
    x = torch.randn(5, requires_grad=True)
    assert AlphaDropout(0.5).eval()(x) is x
    assert AlphaDropout(0.0)(x) is x


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.3, 1.5)])
def test_the_fixed_point_attracts_through_64_layers(mean, variance):
    g = torch.Generator().manual_seed(0)
    layers = [part for _ in range(64) for part in (nn.Linear(256, 256), SELU())]
    model = lecun_normal_(nn.Sequential(*layers), g)
    x = mean + variance**0.5 * torch.randn(512, 256, generator=g)
    with torch.no_grad():
        y = model(x)
    assert abs(float(y.mean())) < 0.1 and 0.8 < float(y.var()) < 1.5


def test_a_network_becomes_self_normalizing():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)
    )
    done = to_self_normalizing(model, 0.1)
    names = [type(layer).__name__ for layer in model]
    assert names == ["Linear", "Identity", "SELU", "AlphaDropout", "Linear", "SELU", "Linear"]
    assert model[3].p == 0.1 and sum(len(one.changed) for one in done) == 4
    assert not model[4].bias.any()


def test_refusals():
    with pytest.raises(ValueError, match=r"p is 1.0: it must be in \[0, 1\)"):
        AlphaDropout(1.0)
    with pytest.raises(ValueError, match="variance is 0"):
        alpha_dropout(torch.zeros(2), 0.1, variance=0.0)
    with pytest.raises(ValueError, match="not torch.int64"):
        AlphaDropout()(torch.ones(2, dtype=torch.int64))
    with pytest.raises(BadInput, match="ReLU has no linear layer"):
        lecun_normal_(nn.ReLU())
    with pytest.raises(BadInput, match="parametrization computes the weight of 0"):
        lecun_normal_(nn.Sequential(weight_norm(nn.Linear(2, 2))))
    with pytest.raises(BadInput, match="no activation that is a module"):
        to_self_normalizing(nn.Linear(2, 2))
