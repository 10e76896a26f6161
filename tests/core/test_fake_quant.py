"""Fake quantization: values and gradients element by element, LSQ against its equations, rounding."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.core.fake_quant import (
    ROUNDINGS,
    code_range,
    fake_quant_ste,
    lsq,
    lsq_grad_scale,
    lsq_init,
    pass_through,
    rounded,
    stochastic_round,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("zero", [0, 3])
def test_values_and_straight_through_gradient(clipped, zero):
    x = (4 * numbers(5, 7)).requires_grad_()
    g = numbers(5, 7, seed=1)
    y = fake_quant_ste(x, 0.7, zero, 0 if zero else -4, 7 if zero else 3, clipped=clipped)
    y.backward(g)
    qmin, qmax = (0, 7) if zero else (-4, 3)
    for value, out, weight, grad in zip(*(t.flatten().tolist() for t in (x, y, g, x.grad)), strict=True):
        v = value / 0.7
        assert out == pytest.approx((min(max(round(v) + zero, qmin), qmax) - zero) * 0.7)
        assert grad == (weight if not clipped or qmin <= v + zero <= qmax else 0.0)


@pytest.mark.parametrize("zero", [0, 2])
def test_lsq_against_its_equations(zero):
    x = (3 * numbers(4, 6)).requires_grad_()
    scale = torch.tensor([[0.4], [0.9], [1.5], [0.2]], dtype=torch.float64, requires_grad=True)
    g = numbers(4, 6, seed=1)
    y = lsq(x, scale, -4, 3, zero=zero)
    y.backward(g)
    factor = 1 / math.sqrt(24 * 3)
    for row in range(4):
        s, total = scale[row].item(), 0.0
        for value, out, weight, grad in zip(*(t[row].tolist() for t in (x, y, g, x.grad)), strict=True):
            v = value / s
            q = min(max(round(v) + zero, -4), 3)
            inside = -4 <= v + zero <= 3
            assert out == pytest.approx((q - zero) * s)
            assert grad == (weight if inside else 0.0)
            total += weight * (q - zero - v if inside else q - zero)
        assert scale.grad[row].item() == pytest.approx(factor * total)


def test_lsq_is_the_written_form_of_autograd():
    """s' = (s - s c).detach() + s c, x^ = s' round(clamp(x / s')) with the rounding passed straight through."""
    x, other = (numbers(3, 5).requires_grad_() for _ in range(2))
    s, t = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factor = lsq_grad_scale(15, 3)
    lsq(x, s, -4, 3).square().sum().backward()
    t_ = (t - t * factor).detach() + t * factor
    v = (other / t_).clamp(-4, 3)
    ((v.round() - v).detach() + v).mul(t_).square().sum().backward()
    torch.testing.assert_close(s.grad, t.grad)
    torch.testing.assert_close(x.grad, other.grad)


def test_lsq_learns_the_best_step():
    x = numbers(4096)
    scale = torch.nn.Parameter(lsq_init(x, 3))
    assert scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(3))
    steps = torch.linspace(0.2, 2, 100, dtype=torch.float64)
    errors = [float((fake_quant_ste(x, float(s), 0, -4, 3) - x).square().mean()) for s in steps]
    optimizer = torch.optim.SGD([scale], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (lsq(x, scale, -4, 3, 1.0) - x).square().mean().backward()
        optimizer.step()
    assert float((lsq(x, scale, -4, 3).detach() - x).square().mean()) < min(errors) * 1.01


def test_roundings():
    x = torch.tensor([-1.5, -0.5, -0.4, 0.0, 0.5, 1.5, 2.7, 3.0])
    assert rounded(x).tolist() == [-2, -0.0, -0.0, 0, 0, 2, 3, 3]
    assert rounded(x, "zero").tolist() == [-1, -0.0, -0.0, 0, 0, 1, 2, 3]
    assert rounded(x, "floor").tolist() == [-2, -1, -1, 0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="rounding is 'up'"):
        rounded(x, "up")
    assert not rounded(x.requires_grad_(), "zero").requires_grad
    assert set(ROUNDINGS) == {"nearest", "zero", "floor", "stochastic"}


def test_stochastic_rounding_is_unbiased_bounded_and_seeded():
    x = torch.full((20000,), -1.3)
    first, again = (stochastic_round(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and set(first.tolist()) == {-2.0, -1.0}
    assert first.mean().item() == pytest.approx(-1.3, abs=5 * math.sqrt(0.21 / 20000))
    below_one = torch.full((5000,), 1.0).nextafter(torch.tensor(0.0))
    assert stochastic_round(below_one).max() == 1  # x + u could round to 2
    assert torch.equal(stochastic_round(torch.arange(-3.0, 4)), torch.arange(-3.0, 4))
    y = fake_quant_ste(x, 1.0, 0, -1, 5, rounding="stochastic", generator=torch.Generator().manual_seed(5))
    assert torch.equal(y, first.clamp(min=-1))


def test_pass_through_is_exact():
    x = torch.tensor([1e8, 0.1], requires_grad=True)
    y = pass_through(x, torch.tensor([1.0, 2.0]))
    y.backward(torch.tensor([3.0, 4.0]))
    assert y.tolist() == [1.0, 2.0] and x.grad.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match=r"shape \(2,\) and its value of \(3,\)"):
        pass_through(x, torch.zeros(3))


def test_code_ranges():
    assert [code_range(1, signed=False), code_range(2), code_range(8, narrow=True)] == [(0, 1), (-2, 1), (-127, 127)]
    for wrong in ({"bits": 1}, {"bits": 0, "signed": False}, {"bits": 4, "signed": False, "narrow": True}):
        with pytest.raises(ValueError, match="bits are too few|narrow"):
            code_range(**wrong)


def test_types_empty_and_refusals():
    x = torch.randn(3, 4).bfloat16().requires_grad_()
    scale = torch.tensor([[0.1], [0.2], [0.3]], requires_grad=True)
    y = lsq(x, scale, -8, 7)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and scale.grad.dtype == torch.float32
    assert fake_quant_ste(torch.empty(0, 3), 1.0, 0, -1, 1).shape == (0, 3)
    assert lsq_init(torch.zeros(2, 3), 7, (1,)).tolist() == [[1.0], [1.0]]
    with pytest.raises(ValueError, match=r"scale of shape \(4, 1, 1\) does not broadcast"):
        lsq(torch.zeros(4, 4), torch.ones(4, 1, 1), -1, 1)
    with pytest.raises(ValueError, match=r"zero of shape \(3,\)"):
        fake_quant_ste(torch.zeros(4, 4), 1.0, torch.zeros(3), -1, 1)
    with pytest.raises(ValueError, match="codes from 2 to 1"):
        fake_quant_ste(torch.zeros(4), 1.0, 0, 2, 1)
