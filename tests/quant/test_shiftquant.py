"""`shiftquant`: codes channel by channel, products of integers against floats, gradients on average, and training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import L1BatchNorm2d
from laconic.quant import IntConv2d, IntLinear, IntRounding, int_codes, shift_codes, to_integer_
from laconic.testing import Example

EXAMPLES = [
    Example(
        lambda: IntLinear(6, 4, bits=(5, 6, 6)), kind="Layer", traits=("gradient:surrogate",), inputs=[(3, 2, 6)],
        wrong=[(3, 2, 5)], stated={"output": (3, 2, 4)},
    ),
    Example(
        lambda: IntConv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        kind="Layer", traits=("gradient:surrogate",), inputs=[(2, 4, 6, 5)], wrong=[(2, 3, 6, 5)],
        stated={"output": (2, 6, 3, 3)},
    ),
]  # fmt: skip


def uneven(rows: int = 64, seed: int = 0) -> torch.Tensor:
    """Channels of very different sizes, and one of zeros."""
    g = torch.randn(rows, 9, generator=torch.Generator().manual_seed(seed))
    return g * torch.tensor([8.0, 4.1, 3.9, 2.0, 1.0, 0.5, 0.1, 0.01, 0.0])


@pytest.mark.parametrize("groups", [1, 4, 6])
def test_the_codes_channel_by_channel(groups):
    g = uneven()
    found = shift_codes(g, 5, groups, "nearest")
    largest = float(g.abs().max())
    assert float(found.scale) == pytest.approx(largest / 15)
    for c in range(9):
        r = float(g[:, c].abs().max())
        k = groups - 1 if r == 0 else min(max(math.floor(math.log2(largest / r)), 0), groups - 1)
        assert int(found.shifts[c]) == k
        want = [round(v * 2**k / float(found.scale)) for v in g[:, c].tolist()]
        assert (found.codes[:, c] - torch.tensor(want)).abs().max() <= 0 and max(map(abs, want)) <= 15
        back = found.codes[:, c] * found.scale / 2**k
        torch.testing.assert_close(found.dequantize()[:, c], back)
    shifted = found.shifted()
    assert torch.equal(shifted, shifted.round()) and shifted.abs().max() <= 15 * 2 ** (groups - 1)


def test_powers_of_two_at_the_border():
    g = torch.tensor([[8.0, 4.0, 2.0, 1.0, 3.9999998]])
    assert shift_codes(g, 8, 8).shifts.tolist() == [0, 1, 2, 3, 1]
    assert shift_codes(torch.zeros(3, 2), 4, 3).shifts.tolist() == [2, 2]
    assert not shift_codes(torch.zeros(3, 2), 4, 3).dequantize().any()
    assert shift_codes(torch.zeros(0, 2), 4, 3).codes.shape == (0, 2)


def test_gradients_are_unbiased_and_nearer_with_more_groups():
    g = uneven(32)
    errors = {}
    for groups in (1, 4, 8):
        draws = torch.stack(
            [shift_codes(g, 4, groups, generator=torch.Generator().manual_seed(i)).dequantize() for i in range(400)]
        )
        found = shift_codes(g, 4, groups)
        step = found.scale / 2.0**found.shifts
        up = (g / step).frac().abs()  # the probability of the integer that is farther from 0
        assert ((draws.mean(0) - g).abs() <= 5 * step * (up * (1 - up) / 400).sqrt() + 1e-6).all()
        errors[groups] = float((draws - g).square().mean())
    assert errors[8] <= errors[4] < 0.5 * errors[1]


def test_the_forward_pass_is_a_product_of_integers():
    torch.manual_seed(0)
    layer, x = IntLinear(12, 5, bits=(4, 6, 8)), torch.randn(7, 12)
    wq, ws = int_codes(layer.weight, 4)
    xq, xs = int_codes(x, 6)
    assert wq.abs().max() == 7 and xq.abs().max() == 31
    want = (xq.long() @ wq.long().t()).double() * float(ws) * float(xs) + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradients", ["shift", "channel", "float"])
def test_the_backward_products(gradients):
    """With nearest rounding they are those of the rounded factors; the convolution's, too."""
    torch.manual_seed(0)
    layer = IntLinear(6, 9, bits=(4, 5, 6), gradients=gradients, rounding="nearest")
    conv = IntConv2d(4, 9, 3, padding=1, stride=2, bits=(4, 5, 6), gradients=gradients, rounding="nearest", bias=False)
    for module, x in ((layer, torch.randn(64, 6)), (conv, torch.randn(4, 4, 8, 8))):
        x.requires_grad_()
        y = module(x)
        g = uneven(y.numel() // 9).view(*y.movedim(1, -1).shape).movedim(-1, 1)
        y.backward(g)
        flat = g.movedim(1, -1).reshape(-1, 9)
        if gradients == "float":
            hat = flat
        elif gradients == "shift":
            hat = shift_codes(flat, 6, 4, "nearest").dequantize()
        else:
            hat = torch.stack([codes * scale for codes, scale in (int_codes(c, 6) for c in flat.t())], 1)
        hat = hat.view(*g.movedim(1, -1).shape).movedim(-1, 1)
        (wq, ws), (xq, xs) = int_codes(module.weight, 4), int_codes(x, 5)
        w, x_ = (wq * ws).detach().requires_grad_(), (xq * xs).detach().requires_grad_()
        plain = x_ @ w.t() if module is layer else nn.functional.conv2d(x_, w, None, 2, 1)
        plain.backward(hat)
        torch.testing.assert_close(x.grad, x_.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.weight.grad, w.grad, rtol=1e-4, atol=1e-4)
        assert module.bias is None or torch.allclose(module.bias.grad, g.sum(0), atol=1e-4)


def test_sums_that_float32_does_not_hold_are_exact():
    layer = IntLinear(4096, 1, bits=(12, 12, 8), bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.ones(1, 4096)
    x[0, 0] = -1.0
    assert layer(x).item() == pytest.approx(4094, abs=1e-3)


def test_a_model_in_integers_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16),
        nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip
    model[1] = L1BatchNorm2d(8, quantizer=IntRounding(8))
    weights = model[4].weight
    report = to_integer_(model, (4, 4, 4))
    assert [change.after for change in report.changed] == ["IntConv2d", "IntLinear", "IntLinear"]
    assert model[4].weight is weights and model[4].bits == (4, 4, 4) and model[0].bits == model[6].bits == (8, 8, 8)
    x = torch.randn(64, 1, 4, 4)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_refusals():
    with pytest.raises(ValueError, match="2 to 16 bits, not 1, 4, 4"):
        IntLinear(2, 2, bits=(1, 4, 4))
    with pytest.raises(ValueError, match="shift_groups=0"):
        IntConv2d(2, 2, 1, shift_groups=0)
    with pytest.raises(ValueError, match="gradients='group'"):
        IntLinear(2, 2, gradients="group")
    with pytest.raises(BadInput, match="ReLU has no linear layer or convolution"):
        to_integer_(nn.ReLU())
    with pytest.raises(BadInput, match="2 to 16 bits"):
        to_integer_(nn.Sequential(nn.Linear(2, 2)), (4, 4, 99))
