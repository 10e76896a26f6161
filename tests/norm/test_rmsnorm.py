"""`rmsnorm`: the equations by hand, what is invariant, each option, and the recorded vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.norm import RMSNorm, rms_norm
from laconic.testing import Case, Example

TRAITS = ("gradient:exact", "batch_independent_eval")
EXAMPLES = [
    Example(lambda: RMSNorm(8), kind="Layer", traits=TRAITS, inputs=[(3, 5, 8)], wrong=[(3, 5, 7)]),
    Example(
        lambda: RMSNorm(16, 1e-5, bias=True, p=0.25, eps_inside=True, unit_offset=True),
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 16)],
        wrong=[(3, 15)],
    ),
    Example(lambda: RMSNorm((3, 4), bias=True), kind="Layer", traits=TRAITS, inputs=[(2, 3, 4)], wrong=[(2, 4, 4)]),
]


def run_vector(case: Case):
    """Cases of CRMSNorm belong to the conversion of whole models, which is another method."""
    args = case.args
    if args.get("id", "rmsnorm") != "rmsnorm":
        return NotImplemented
    options = {key: args[key] for key in ("eps", "bias", "p", "eps_inside", "unit_offset") if key in args}
    layer = RMSNorm(args["d"], elementwise_affine="weight" in case, **options)
    assert args.get("leading_features") == layer.leading
    names = [name for name, _ in layer.named_parameters()]
    layer.load_state_dict({name: case.array(name) for name in names})
    found = {"output": [], "grad_input": [], **{f"grad_{name}": [] for name in names}}
    inputs = case.arrays("input")
    for x, grad in zip(inputs, case.arrays("grad_output"), strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        found["output"].append(y)
        found["grad_input"].append(x.grad)
        for name in names:
            found[f"grad_{name}"].append(layer.get_parameter(name).grad)
    if "output_eval" in case:
        found["output_eval"] = layer.eval()(inputs[-1])
    return found


def naive(row, gain, eps, inside, k):
    """The equations for one vector, with numbers."""
    mean_square = sum(v * v for v in row[:k]) / k
    scale = math.sqrt(mean_square + eps) if inside else math.sqrt(mean_square) + eps
    return [g * v / scale for g, v in zip(gain, row, strict=True)]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("p", [None, 0.4, 1.0])
def test_the_equation(inside, p):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = RMSNorm(5, eps=0.3, p=p, eps_inside=inside, dtype=torch.float64)
    nn.init.uniform_(layer.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
    k = 5 if p is None else int(5 * p)
    want = [naive(row, layer.weight.tolist(), 0.3, inside, k) for row in x.tolist()]
    torch.testing.assert_close(layer(x), torch.tensor(want, dtype=torch.float64))


def test_with_eps_inside_it_is_that_of_torch():
    x = torch.randn(3, 4, 6)
    for shape in (6, (4, 6)):
        torch.testing.assert_close(RMSNorm(shape, 1e-5, eps_inside=True)(x), nn.RMSNorm(shape, 1e-5)(x))


def test_scales_are_forgotten_and_shifts_are_not():
    x, layer = torch.randn(3, 16), RMSNorm(16)
    torch.testing.assert_close(layer(1000 * x), layer(x))
    assert not torch.allclose(layer(x + 1), layer(x), atol=0.1)


def test_the_gain_folds_into_the_reader():
    norm, reader, x = RMSNorm(6), nn.Linear(6, 4), torch.randn(3, 6)
    nn.init.uniform_(norm.weight, 0.5, 2)
    folded = nn.functional.linear(rms_norm(x, (6,)), reader.weight * norm.weight, reader.bias)
    torch.testing.assert_close(reader(norm(x)), folded)


def test_a_vector_of_zeros_has_the_gradient_of_the_equation():
    """eps alone divides: dy/dx = g / eps outside the root, g / sqrt(eps) inside."""
    for inside, slope in ((False, 1 / 0.5), (True, 1 / math.sqrt(0.5))):
        x = torch.zeros(3, requires_grad=True)
        RMSNorm(3, 0.5, eps_inside=inside)(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3,), slope))


def test_half_precision_is_computed_in_float32():
    x = (300 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).half()  # squares overflow in float16
    want = rms_norm(x.float(), (64,)).half()
    assert torch.equal(RMSNorm(64, dtype=torch.float16)(x), want)


def test_the_gain_can_be_applied_after_the_cast():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gain = (1 + torch.rand(32, generator=torch.Generator().manual_seed(1))).bfloat16()
    late = rms_norm(x, (32,), gain, gain_after_cast=True)
    assert torch.equal(late, gain * rms_norm(x, (32,)))
    assert not torch.equal(late, rms_norm(x, (32,), gain))


def test_an_offset_of_one_starts_as_the_identity_gain():
    layer = RMSNorm(4, unit_offset=True)
    assert not layer.weight.any()
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), RMSNorm(4)(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1e-5}, "eps is -1e-05"),
        ({"p": 0.0}, r"p is 0.0: it must be in \(0, 1\]"),
        ({"p": 0.1}, "less than one: p must be at least 0.125"),
        ({"bias": True, "elementwise_affine": False}, "elementwise_affine=True"),
        ({"normalized_shape": (2, 4), "p": 0.5}, r"for one dimension, and normalized_shape is \(2, 4\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        RMSNorm(**{"normalized_shape": 8, **options})


def test_it_shows_its_options():
    shown = repr(RMSNorm(16, p=0.25, bias=True, unit_offset=True))
    assert shown == "RMSNorm((16,), eps=1e-08, elementwise_affine=True, bias=True, p=0.25, unit_offset=True)"
