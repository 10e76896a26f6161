"""Bias correction: the mean output comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.numerics import Int, Scale, Scheme, fake_quantize
from laconic.quant import BiasCorrection, Hessian, bias_correction
from laconic.testing import Example


def _two_layers(g):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    for p in model.parameters():
        nn.init.normal_(p, generator=g)
    return [model.eval(), torch.randn(16, 8, generator=g) + 1]


def _rounded(model, structure, arguments):
    hessians, values, x = {}, {}, arguments[0]
    for path, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            hessians[path] = Hessian(layer.in_features)
            hessians[path].add(x)
            before = layer.weight.detach()
            values[f"{path}.weight"] = (before, (before * 8).round() / 8)
        x = layer(x).detach()
    return {"hessians": hessians, "values": values}


def _no_bias():
    return nn.Sequential(nn.Linear(8, 6, bias=False)).eval(), [torch.randn(4, 8)], "0"


EXAMPLES = [
    Example(
        lambda: BiasCorrection(),
        kind="Pass",
        inputs=_two_layers,
        stated={"context": _rounded, "bound": 0.2, "refused": _no_bias},
    )
]


SCHEME = Scheme(Int(3), Scale("channel"))


def test_mean_output_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 6), torch.rand(500, 20)
    W = layer.weight.detach()
    W_hat = fake_quantize(W, SCHEME)
    bias = bias_correction(x.mean(0), W, W_hat, layer.bias)
    want = layer(x).mean(0)
    torch.testing.assert_close((x @ W_hat.T + bias).mean(0), want)
    assert (x @ W_hat.T + layer.bias - want).mean(0).abs().max() > 1e-3
    without = bias_correction(x.mean(0), W, W_hat, None)
    torch.testing.assert_close(without + layer.bias, bias)
    assert torch.equal(bias_correction(x.mean(0), W, W, layer.bias), layer.bias)
    assert bias_correction(x.mean(0), W.bfloat16(), W_hat, layer.bias.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2])
def test_mean_output_of_a_convolution(groups: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, padding=1, groups=groups), torch.rand(5, 4, 8, 8)
    hessian = Hessian.of(conv)
    hessian.add_conv(x, conv)
    want = conv(x).mean((0, 2, 3))
    W = conv.weight.detach().flatten(1)
    W_hat = fake_quantize(W, SCHEME)
    with torch.no_grad():
        conv.bias.copy_(bias_correction(hessian.mean, W, W_hat, conv.bias))
        conv.weight.copy_(W_hat.view_as(conv.weight))
    torch.testing.assert_close(conv(x).mean((0, 2, 3)), want, rtol=1e-4, atol=1e-5)


def test_shapes_are_checked() -> None:
    W = torch.zeros(4, 6)
    for mean, other in ((torch.zeros(5), W), (torch.zeros(6), torch.zeros(4, 5)), (torch.zeros(3, 6), W)):
        with pytest.raises(ValueError, match=r"bias_correction: weights \(4, 6\)"):
            bias_correction(mean, W, other, None)
