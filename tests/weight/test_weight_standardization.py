"""`weight_standardization`: the equations by hand, both conventions, what is refused, and the recorded vectors."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput
from laconic.testing import Case, Example
from laconic.weight import CONVENTIONS, Standardize, standardize, standardize_

EXAMPLES = [
    Example(lambda: Standardize(), kind="Weight"),
    Example(lambda: Standardize(**CONVENTIONS["timm"]), kind="Weight", inputs=[(4, 3, 2, 2)]),
    Example(lambda: Standardize(1e-3, unbiased=False, dim=1), kind="Weight", inputs=[(3, 4, 2)]),
]


def run_vector(case: Case):
    """Cases with a gain and a fan-in belong to the scaled form, which is another method."""
    args = case.args
    if args["scaled"]:
        return NotImplemented
    assert args["layout"] == "OIHW" and args["gamma"] == 1.0 and not args["gain"]
    weight = case.array("weight").requires_grad_()
    assert weight[0].numel() == args["fan_in"]
    out = Standardize(args["eps"], unbiased=args["unbiased"], eps_in=args["eps_in"])(weight)
    out.backward(case.array("grad_output"))
    return {"output": out, "grad_weight": weight.grad}


@pytest.mark.parametrize("eps_in", ["std", "sqrt"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_equation(eps_in, unbiased):
    weight = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = standardize(weight, 0.1, unbiased=unbiased, eps_in=eps_in).flatten(1).tolist()
    for row, out in zip(weight.flatten(1).tolist(), got, strict=True):
        variance = statistics.variance(row) if unbiased else statistics.pvariance(row)
        scale = variance**0.5 + 0.1 if eps_in == "std" else (variance + 0.1) ** 0.5
        assert out == pytest.approx([(w - statistics.mean(row)) / scale for w in row])


def test_the_official_convention_is_the_default():
    weight = torch.randn(4, 3, 3, 3)
    assert torch.equal(standardize(weight), standardize(weight, **CONVENTIONS["official"]))


def test_scale_and_shift_of_a_row_are_forgotten():
    weight = torch.randn(4, 6, dtype=torch.float64)
    other = weight * torch.tensor([[1.0], [3.0], [10.0], [0.5]]) + torch.arange(4.0).view(4, 1)
    torch.testing.assert_close(standardize(other, 1e-12), standardize(weight, 1e-12))


def test_a_constant_row_becomes_zero_and_has_a_finite_gradient():
    for convention in CONVENTIONS.values():
        weight = torch.ones(2, 5, requires_grad=True)
        out = standardize(weight, **convention)
        out.backward(torch.randn(2, 5))
        assert not out.any() and torch.isfinite(weight.grad).all()


def test_half_precision_is_computed_in_float32():
    weight = (200 * torch.randn(2, 3, 3, 3)).half()
    assert torch.equal(standardize(weight), standardize(weight.float()).half())


def test_baked_it_is_the_same_function():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    standardize_(model, convention="timm")
    x = torch.randn(2, 3, 6, 6)
    before = model(x)
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=True)
    assert torch.equal(model(x), before) and not parametrize.is_parametrized(model)


def test_which_layers_are_changed():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(36, 5)
    )
    assert standardize_(model, lambda path, module: path != "4", convs_only=False) == ["0", "1", "2"]
    rows = model[2].weight.transpose(0, 1).flatten(1)  # a transposed convolution has its outputs second
    torch.testing.assert_close(rows.mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert standardize_(other) == ["0"]


def test_refusals():
    with pytest.raises(ValueError, match="eps_in is 'var'"):
        Standardize(eps_in="var")
    with pytest.raises(ValueError, match="eps is 0"):
        Standardize(0)
    with pytest.raises(ValueError, match=r"\(4, 1, 1, 1\) has no rows of two entries"):
        standardize(torch.ones(4, 1, 1, 1))
    with pytest.raises(BadInput, match="no convention 'jax'"):
        standardize_(nn.Conv2d(2, 2, 3), convention="jax")
    with pytest.raises(BadInput, match="Linear has no layer to standardize"):
        standardize_(nn.Linear(3, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(BadInput, match="1: .*no rows of two entries"):
        standardize_(model, lambda path, module: True)
    assert not parametrize.is_parametrized(model[0]), "nothing is changed where something is refused"
