"""`l1_norm`: the equations and the gradient by hand, conversion and folding, rounding, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laconic.norm import L1BatchNorm1d, L1BatchNorm2d, L1LayerNorm
from laconic.testing import Example

PLAIN = ("gradient:exact", "batch_independent_eval")
FOLDS = (*PLAIN, "folds")
EXAMPLES = [
    Example(lambda: L1BatchNorm2d(4), kind="Layer", traits=FOLDS, inputs=[(3, 4, 2, 3)], wrong=[(3, 5, 2, 3)]),
    Example(
        lambda: L1BatchNorm2d(4, momentum=None, affine=False, gaussian_scale=True),
        kind="Layer",
        traits=FOLDS,
        inputs=[(3, 4, 2, 3)],
        wrong=[(3, 5, 2, 3)],
    ),
    Example(lambda: L1BatchNorm1d(4), kind="Layer", traits=FOLDS, inputs=[(5, 4)], wrong=[(5, 3)]),
    Example(lambda: L1LayerNorm((2, 4)), kind="Layer", traits=PLAIN, inputs=[(3, 2, 4)], wrong=[(3, 2, 5)]),
]


def round_to(step):
    return lambda x: torch.round(x / step) * step


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_equation(gaussian):
    layer = L1BatchNorm2d(3, eps=0.2, gaussian_scale=gaussian).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    y, k = layer(x), math.sqrt(math.pi / 2) if gaussian else 1
    for c in range(3):
        off = x[:, c] - x[:, c].mean()
        want = layer.weight[c] * off / (k * off.abs().mean() + 0.2) + layer.bias[c]
        torch.testing.assert_close(y[:, c], want)


def test_gradient_as_the_docstring_has_it():
    layer = L1LayerNorm(6, eps=0.1).double()
    nn.init.uniform_(layer.weight)
    x, dy = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    layer(x).backward(dy)
    g, c = layer.weight.detach() * dy, (x - x.mean()).detach()
    t = c.abs().mean() + 0.1
    dc = g / t - c.sign() * (g * c).sum() / (6 * t**2)
    torch.testing.assert_close(x.grad, dc - dc.mean())


def test_normal_inputs_get_deviation_1_with_the_gaussian_scale():
    x = 4 + 3 * torch.randn(64, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    y = L1BatchNorm2d(2, gaussian_scale=True)(x)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(2), atol=0.01, rtol=0)


def test_running_values():
    layer, x = L1BatchNorm1d(3, momentum=0.3), torch.randn(7, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.3 * x.mean(0))
    torch.testing.assert_close(layer.running_magnitude, 0.7 + 0.3 * (x - x.mean(0)).abs().mean(0))
    again = L1BatchNorm1d(3, momentum=0.3)
    checkpoint(again, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert torch.equal(again.running_mean, layer.running_mean)


def test_a_converted_batch_norm_is_the_same_function_at_inference():
    old = nn.BatchNorm2d(4)
    for _ in range(20):
        old(2 + 3 * torch.randn(8, 4, 5, 5))
    nn.init.uniform_(old.weight)
    new, x = L1BatchNorm2d.from_batchnorm(old.eval()), torch.randn(2, 4, 5, 5)
    assert not new.training
    torch.testing.assert_close(new(x), old(x))
    with pytest.raises(ValueError, match="no running statistics"):
        L1BatchNorm2d.from_batchnorm(nn.BatchNorm2d(4, track_running_stats=False))


def test_the_quantizer_rounds_forward_and_backward():
    layer = L1LayerNorm(8, quantizer=round_to(0.25))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = round_to(0.25)(x.detach())
    c = rounded - rounded.mean(1, keepdim=True)
    s = round_to(0.25)(c.abs().mean(1, keepdim=True))
    y = layer(x)
    torch.testing.assert_close(y.detach(), c / (s + 1e-5))
    # A gradient below half a step is rounded away.
    y.backward(torch.full((5, 8), 0.1))
    assert not x.grad.any() and not layer.bias.grad.any()


def test_constant_features_and_half_precision():
    assert not L1LayerNorm(4)(torch.full((2, 4), 7.0)).any()
    x = (1000 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))).half()
    want = L1LayerNorm(64)(x.float())
    torch.testing.assert_close(L1LayerNorm(64, dtype=torch.float16)(x).float(), want, rtol=2e-3, atol=2e-3)


def test_refusals():
    with pytest.raises(ValueError, match="eps is -1"):
        L1LayerNorm(4, -1.0)
    with pytest.raises(ValueError, match="train on 2 values to a channel"):
        L1BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        L1BatchNorm2d(4).as_affine()
