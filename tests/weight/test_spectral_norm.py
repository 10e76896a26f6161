"""`spectral_norm`: against torch bit for bit, against the decomposition, its gradient, and the recorded vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from laconic.errors import BadInput
from laconic.testing import Case, Example
from laconic.weight import SpectralNorm, spectral_norm

TRAITS = ("gradient:stateful", "right_inverse")
EXAMPLES = [
    Example(lambda weight: SpectralNorm(weight), kind="Weight", traits=TRAITS),
    Example(lambda weight: SpectralNorm(weight, dim=1, mode="clip"), kind="Weight", traits=TRAITS, inputs=[(3, 4, 2)]),
    Example(lambda weight: SpectralNorm(weight), kind="Weight", traits=TRAITS, inputs=[(5,)]),
]

LAYERS = {
    "linear": nn.functional.linear,
    "conv1d": nn.functional.conv1d,
    "conv2d": nn.functional.conv2d,
    "conv3d": nn.functional.conv3d,
    "conv_transpose2d": nn.functional.conv_transpose2d,
}
OPTIONS = ("n_power_iterations", "eps", "dim", "mode")


def run_vector(case: Case):
    args = case.args
    weight = case.array("weight")
    rule = SpectralNorm(weight, **{key: args[key] for key in OPTIONS if key in args})
    if case.what == "forward":
        rule.load_state_dict({"u": case.array("u"), "v": case.array("v")})
        return {"output_weight": rule.train(args["training"])(weight)}
    assert not args["parameter_updates"]
    rule.load_state_dict({"u": case.array("u_init"), "v": case.array("v_init")})
    bias = case.array("bias") if "bias" in case else None
    where = {key: args[key] for key in ("stride", "padding") if args["layer"] != "linear"}
    found = {role: [] for role in ("output", "grad_input", "grad_weight", "u_after", "v_after")}
    for x, grad in zip(case.arrays("input"), case.arrays("grad_output"), strict=True):
        x.requires_grad_()
        weight = weight.detach().requires_grad_()
        y = LAYERS[args["layer"]](x, rule(weight), bias, **where)
        y.backward(grad)
        results = (y, x.grad, weight.grad, rule.u.clone(), rule.v.clone())
        for role, value in zip(found, results, strict=True):
            found[role].append(value)
    return found


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)])
def test_it_is_what_torch_computes(layer):
    ours = spectral_norm(copy.deepcopy(layer), n_power_iterations=2)
    theirs = torch_spectral_norm(layer, n_power_iterations=2)
    state = {name.rpartition(".")[2].lstrip("_"): value for name, value in theirs.state_dict().items()}
    ours.parametrizations.weight[0].load_state_dict({name: state[name] for name in "uv"})
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        assert torch.equal(ours.weight, theirs.weight)
    for module in (ours, theirs):
        module.zero_grad()
        module.weight.sum().backward()
    assert torch.equal(ours.parametrizations.weight.original.grad, theirs.parametrizations.weight.original.grad)


def test_the_largest_singular_value_becomes_one():
    layer = spectral_norm(nn.Conv2d(3, 8, 3), n_power_iterations=100)
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-5)


def test_clip_shrinks_and_never_stretches():
    for scale, want in ((0.1, 0.1), (10.0, 1.0)):
        layer = nn.Linear(6, 6, bias=False)
        nn.init.orthogonal_(layer.weight, gain=scale)
        spectral_norm(layer, mode="clip")
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(want, rel=1e-5)


def test_gradient_is_the_equation():
    """dL/dW = (G - <G, W'> u v^T) / sigma, with the vectors that this call used."""
    rule = SpectralNorm(torch.randn(4, 6, dtype=torch.float64)).double()
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 6, dtype=torch.float64)
    out = rule(weight)
    out.backward(grad)
    sigma = rule.u @ weight.detach() @ rule.v
    want = (grad - (grad * out.detach()).sum() * torch.outer(rule.u, rule.v)) / sigma
    torch.testing.assert_close(weight.grad, want)


def test_two_uses_in_one_step_keep_their_own_vectors():
    """As a discriminator on real and on generated data: the second use must not spoil the first one's backward."""
    layer, x = spectral_norm(nn.Linear(5, 5)), torch.randn(3, 5)
    (layer(x).sum() - layer(2 * x).sum()).backward()
    before = layer.parametrizations.weight[0].u.clone()
    with parametrize.cached():
        layer(x)
        once = layer.parametrizations.weight[0].u.clone()
        layer(x)
    assert not torch.equal(once, before) and torch.equal(layer.parametrizations.weight[0].u, once)


def test_a_generator_fixes_the_first_vectors():
    weight = torch.randn(40, 50)
    first, second = (SpectralNorm(weight, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.u, second.u) and torch.equal(first.v, second.v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_power_iterations": 0}, "n_power_iterations is 0"),
        ({"eps": 0}, "eps is 0"),
        ({"mode": "half"}, "mode is 'half'"),
        ({"dim": 2}, r"\(3, 2\) has no rows along dimension 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralNorm(torch.ones(3, 2), **options)


def test_a_missing_parameter_is_named():
    with pytest.raises(BadInput, match="ReLU has no parameter 'weight'"):
        spectral_norm(nn.ReLU())
