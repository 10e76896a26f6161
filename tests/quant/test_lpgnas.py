"""`lpgnas`: fixed point written out, gradients, what a choice draws and costs, a search that finds the cheap format."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.quant import FixedPoint, PathChoice, QuantSpace, SearchedFormats, search_formats
from laconic.quant._lpgnas import ScaledSigns
from laconic.testing import Example

EXAMPLES = [
    Example(
        lambda: FixedPoint(3, 4), kind="Layer", inputs=[(3, 5)], wrong=lambda g: [torch.ones(3, 6, dtype=torch.int64)]
    ),
    Example(lambda: FixedPoint(0, 4, signed=False), kind="Layer", inputs=[(3, 5)],
            wrong=lambda g: [torch.ones(3, 6, dtype=torch.int64)]),
    Example(
        lambda **options: PathChoice([FixedPoint(2, 2), FixedPoint(3, 5), ScaledSigns()], **options), kind="Layer",
        inputs=[(3, 5)], wrong=lambda g: [torch.ones(3, 6, dtype=torch.int64)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("i", "f", "signed"), [(2, 2, True), (1, 7, True), (0, 4, False), (4, 0, True), (3, 1, False)])
def test_equation(i: int, f: int, signed: bool) -> None:
    x = torch.linspace(-9, 9, 301)
    got = FixedPoint(i, f, signed=signed)(x)
    low, high = (-(2 ** (i + f - 1)), 2 ** (i + f - 1) - 1) if signed else (0, 2 ** (i + f) - 1)
    want = [min(max(round(v * 2**f), low), high) / 2**f for v in x.tolist()]
    torch.testing.assert_close(got, torch.tensor(want))
    assert FixedPoint(i, f).bits == i + f


def test_gradient() -> None:
    x = torch.tensor([0.3, 1.9, -2.5, -2.0, 1.75], requires_grad=True)
    (FixedPoint(2, 2)(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0, 4.0, 5.0]
    w = torch.tensor([0.1, -1.0, 2.0], requires_grad=True)
    y = ScaledSigns(ternary=True)(w)
    torch.testing.assert_close(y, torch.tensor([0.0, -1.5, 1.5]))
    y.sum().backward()
    assert w.grad.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(ScaledSigns()(w), torch.tensor([3.1, -3.1, 3.1]) / 3)
    assert torch.equal(ScaledSigns(ternary=True)(torch.zeros(3)), torch.zeros(3))


def test_gradient_of_a_choice_is_that_of_the_softmax_at_the_option_that_ran() -> None:
    choice = PathChoice([FixedPoint(2, 1), FixedPoint(2, 6)], noise=0.0)
    with torch.no_grad():
        choice.logits.copy_(torch.tensor([0.2, 0.5]))
    x = torch.randn(4, requires_grad=True)
    y = choice(x)
    assert torch.equal(y.detach(), FixedPoint(2, 6)(x.detach()))
    y.sum().backward()
    p = torch.tensor([0.2, 0.5]).softmax(0)
    want = y.detach().sum() * torch.tensor([-p[1] * p[0], p[1] * (1 - p[1])])
    torch.testing.assert_close(choice.logits.grad, want)
    assert choice.expected_bits().item() == pytest.approx(8 * 4) and choice.elements == 4
    (gradient,) = torch.autograd.grad(choice.eval().expected_bits(), choice.logits)
    assert gradient[0] < 0 < gradient[1]  # fewer bits by more of the first


def test_draws_are_those_of_the_softmax_and_evaluation_draws_nothing() -> None:
    torch.manual_seed(0)
    choice = PathChoice([nn.Identity(), nn.Tanh(), nn.ReLU()])
    with torch.no_grad():
        choice.logits.copy_(torch.tensor([1.0, 0.0, -1.0]))
    counts = torch.zeros(3)
    for _ in range(2000):
        choice(torch.ones(1))
        counts[choice.shares().argmax()] += 1
    torch.testing.assert_close(counts / 2000, choice.logits.detach().softmax(0), rtol=0, atol=0.04)
    x = torch.randn(3)
    assert torch.equal(choice.eval()(x), x) and choice.expected_bits().item() == 0


def regression() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), x, torch.sign(x[:, :1])


def test_a_search_goes_for_fewer_bits_where_they_cost_and_freezes() -> None:
    found = {}
    for beta in (0.0, 200.0):
        model, x, y = regression()
        searched = SearchedFormats(model, QuantSpace(weights=((2, 2), (4, 12)), activations=((3, 3), (4, 12))))
        assert len(searched.choices) == 4 and len(searched.logits()) == 4 and len(searched.weights()) == 4
        history = search_formats(
            searched, lambda m=model, x=x, y=y: (m(x[:40]) - y[:40]).square().mean(),
            lambda m=model, x=x, y=y: (m(x[40:]) - y[40:]).square().mean(), steps=60, beta=beta, every=2,
        )  # fmt: skip
        assert len(history) == 30 and searched.elements() == 24 * 4 + 24 + 24 + 4
        model.eval()(x[40:])
        found[beta] = float(searched.bits()) / searched.elements()
        assert not any(p.requires_grad for p in searched.logits())
        assert torch.equal(model.train()(x), model.eval()(x))
    assert found[200.0] == pytest.approx((28 * 4 + 120 * 6) / 148, rel=0.01) and found[0.0] > found[200.0]
    assert set(searched.chosen().values()) == {"FixedPoint(2, 2, signed=True)", "FixedPoint(3, 3, signed=True)"}


def test_what_is_refused() -> None:
    for bits in ((0, 0), (20, 9), (-1, 4)):
        with pytest.raises(BadInput, match="1 to 24 in all"):
            FixedPoint(*bits)
    with pytest.raises(BadInput, match="at least one option"):
        PathChoice([])
    with pytest.raises(BadInput, match="'fp8' is no format"):
        QuantSpace.modules(["fp8"])
    with pytest.raises(BadInput, match="no linear layer"):
        SearchedFormats(nn.ReLU())
    model, x, _ = regression()
    searched = SearchedFormats(model)
    with pytest.raises(BadInput, match=r"0\.weight is computed by a parametrization"):
        SearchedFormats(model)
    with pytest.raises(BadInput, match="the loss is nan at step 0"):
        search_formats(searched, lambda: model(x * math.nan).mean(), lambda: model(x).mean(), steps=2, beta=1.0)
