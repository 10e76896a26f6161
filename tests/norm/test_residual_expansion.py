"""`residual_expansion`: the second-order term by hand, its error, scales, Fixup, the probe, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.core.placement import Placement, Residual
from laconic.errors import BadInput
from laconic.norm import (
    GeometricComplexity,
    Shift,
    SkipInit,
    fixup_,
    geometric_complexity,
    residual_expansion,
    scale_residuals,
)
from laconic.testing import Example


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


EXAMPLES = [
    Example(
        SkipInit,
        kind="Layer",
        traits=("gradient:exact", "batch_independent_eval"),
        inputs=[(3, 4)],
        wrong=[torch.ones(3, 4, dtype=torch.int64)],
        expected_failures={
            "check_layer_refuses_wrong_shape": "it takes every shape; integers are refused by their type"
        },
    ),
    Example(
        GeometricComplexity, kind="Probe", inputs=lambda g: [small(), [torch.randn(n, 4, generator=g) for n in (5, 3)]]
    ),
]


def branches(count=8):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double() for _ in range(count)]


def network(blocks, x, lam):
    for block in blocks:
        x = x + lam * block(x)
    return x


def test_the_equation_of_the_second_order():
    blocks, x, lam = branches(4), torch.randn(5, dtype=torch.float64), 0.3
    first = sum(block(x) for block in blocks)
    second = torch.zeros(5, dtype=torch.float64)
    for j in range(4):
        slope = torch.autograd.functional.jacobian(blocks[j], x)
        for i in range(j):
            second = second + slope @ blocks[i](x)
    torch.testing.assert_close(residual_expansion(blocks, x, lam), x + lam * first + lam**2 * second)
    torch.testing.assert_close(residual_expansion(blocks, x, lam, order=1), x + lam * first)
    assert torch.equal(residual_expansion(blocks, x, lam, order=0), x)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_falls_with_the_next_power_of_lambda(order):
    blocks, x = branches(), torch.randn(7, 5, dtype=torch.float64)
    off = [
        float((network(blocks, x, lam) - residual_expansion(blocks, x, lam, order)).norm().detach())
        for lam in (2e-3, 1e-3)
    ]
    assert off[0] / off[1] == pytest.approx(2 ** (order + 1), rel=0.05)


def stack(blocks=4, placement=None):
    torch.manual_seed(0)

    def branch():
        return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6))

    one = placement or Placement(norm_out=True)
    layers = [Residual(branch(), one, lambda: nn.LayerNorm(6), activation=nn.ReLU()) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3))


@pytest.mark.parametrize(("rule", "want"), [("1/sqrt(n)", 0.5), ("1/n", 0.25), (0.7, 0.7)])
@pytest.mark.parametrize("learnable", [False, True])
def test_scales_of_residual_blocks(rule, want, learnable):
    model, x = stack(), torch.randn(2, 6)
    assert scale_residuals(model, rule, learnable) == want
    block = model[1]
    h = block.norm_out(block.branch(x))
    torch.testing.assert_close(block(x), torch.relu(x + want * h))
    assert (block.scale is not None) == learnable


def test_scales_of_a_transformers_model():
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    layer, x = model.h[0], torch.randn(1, 3, 8)
    ids = torch.arange(3)[None]
    before = model(ids).last_hidden_state
    assert scale_residuals(model, 1.0) == 1.0
    torch.testing.assert_close(model(ids).last_hidden_state, before)
    assert isinstance(layer.mlp(x), torch.Tensor)
    other = GPT2Model(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert scale_residuals(other, "1/sqrt(n)") == 0.5
    assert not torch.allclose(other(ids).last_hidden_state, before)


def test_fixup_starts_as_the_shortcut_with_a_zero_classifier():
    model, x = stack(), torch.randn(2, 6)
    first = model[1].branch[0].weight.detach().clone()
    fixup_(model)
    kinds = [type(part).__name__ for part in model[1].branch]
    assert kinds == ["Shift", "Linear", "Shift", "ReLU", "Shift", "Linear", "SkipInit"]
    torch.testing.assert_close(model[1].branch[1].weight, first * 4 ** (-1 / 2))
    torch.testing.assert_close(model[1](x), torch.relu(x))
    assert not model(torch.randn(2, 4)).any() and not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    model(torch.randn(2, 4)).sum().backward()
    assert model[-1].weight.grad.any()


def test_skip_init_and_shift_start_at_zero():
    x = torch.randn(3)
    assert not SkipInit()(x).any() and torch.equal(Shift()(x), x)


def test_complexity_of_a_linear_map_is_its_squared_norm():
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    want = float(layer.weight.detach().double().square().sum())
    assert geometric_complexity(layer, x, samples=None) == pytest.approx(want, rel=1e-5)
    assert geometric_complexity(layer, x, samples=2000) == pytest.approx(want, rel=0.1)


def test_complexity_grows_with_lambda():
    x = torch.randn(6, 5, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self, lam):
            super().__init__()
            self.blocks, self.lam = nn.ModuleList(branches()), lam

        def forward(self, x):
            return network(self.blocks, x, self.lam)

    values = [geometric_complexity(Net(lam), x, samples=None) for lam in (0.0, 1 / 8, 1 / math.sqrt(8), 1.0)]
    assert values[0] == pytest.approx(5) and values == sorted(values)


def test_refusals():
    with pytest.raises(ValueError, match="the order is -1"):
        residual_expansion([], torch.zeros(2), 0.1, -1)
    with pytest.raises(BadInput, match="the rule is '1/n2'"):
        scale_residuals(stack(), "1/n2")
    with pytest.raises(BadInput, match="no residual block that is known"):
        fixup_(small())
    with pytest.raises(BadInput, match="the norm of 1 stands before an activation"):
        fixup_(stack(placement=Placement(norm_in=True)))
    with pytest.raises(BadInput, match="there is no example"):
        geometric_complexity(small(), torch.zeros(0, 4))
    with pytest.raises(BadInput, match="have no derivative"):
        geometric_complexity(small(), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="0 samples"):
        GeometricComplexity(0)
