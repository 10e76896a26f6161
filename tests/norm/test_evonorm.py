"""`evonorm`: each formula by hand, what it does to batches, what is refused, and the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laconic.norm import EvoNorm2d
from laconic.testing import Case, Example

TRAITS = ("gradient:exact", "batch_independent_eval")
EXAMPLES = [
    Example(
        lambda kind=kind, act=act: EvoNorm2d(6, kind, groups=2, apply_act=act),
        kind="Layer",
        traits=TRAITS,
        inputs=[(2, 6, 3, 2)],
        wrong=[(2, 5, 3, 2)],
    )
    for kind, act in [("B0", True), ("B1", True), ("B2", True), ("S0", True), ("S1", True), ("S2", True), ("S0", False)]
]


def run_vector(case: Case):
    args = case.args
    options = {k: args[k] for k in ("groups", "group_size", "apply_act", "eps", "momentum") if k in args}
    layer = EvoNorm2d(args["num_features"], args["kind"], **options)
    state = [name for name in layer.state_dict() if name in case]
    layer.load_state_dict({name: case.array(name) for name in state})
    names = [name for name, _ in layer.named_parameters()]
    found = {"output": [], "grad_input": [], **{f"grad_{name}": [] for name in names}}
    if "running_var_after" in case:
        found["running_var_after"] = []
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
        if "running_var_after" in case:
            found["running_var_after"].append(layer.running_var.clone())
    if "output_eval" in case:
        found["output_eval"] = layer.eval()(inputs[-1])
    return found


def naive(x, kind, v, eps, groups):
    """The equations, value by value."""
    out, size = torch.empty_like(x), x.shape[1] // groups
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            one, every = x[n, c], x[:, c]
            group = x[n, c // size * size : (c // size + 1) * size]
            of_batch = (((every - every.mean()) ** 2).mean() + eps).sqrt()
            of_one = (((one - one.mean()) ** 2).mean() + eps).sqrt()
            rms = ((one**2).mean() + eps).sqrt()
            of_group = (((group - group.mean()) ** 2).mean() + eps).sqrt()
            out[n, c] = {
                "B0": one / torch.maximum(of_batch, v[c] * one + of_one),
                "B1": one / torch.maximum(of_batch, (one + 1) * rms),
                "B2": one / torch.maximum(of_batch, rms - one),
                "S0": one / (1 + torch.exp(-v[c] * one)) / of_group,
                "S1": one / (1 + torch.exp(-one)) / of_group,
                "S2": one / (1 + torch.exp(-one)) / ((group**2).mean() + eps).sqrt(),
            }[kind]
    return out


@pytest.mark.parametrize("kind", ["B0", "B1", "B2", "S0", "S1", "S2"])
def test_the_equation(kind):
    g = torch.Generator().manual_seed(0)
    layer = EvoNorm2d(6, kind, group_size=3, eps=0.2).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -2, 2, generator=g)
    x = 0.5 + torch.randn(3, 6, 4, 2, generator=g, dtype=torch.float64)
    v = torch.ones(6) if layer.v is None else layer.v
    want = naive(x, kind, v, 0.2, 2) * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), want)


def test_the_running_variance_is_unbiased_and_takes_the_batchs_place():
    layer, x = EvoNorm2d(4, "B1", momentum=0.3), 2 * torch.randn(5, 4, 3, 3)
    layer(x)
    torch.testing.assert_close(layer.running_var, 0.7 + 0.3 * x.var((0, 2, 3)))
    layer.eval().running_var.fill_(1e12)  # larger than anything an example gives: the layer divides by it alone
    torch.testing.assert_close(layer(x), x / 1e6)


def test_recomputed_activations_do_not_move_the_running_variance_twice():
    x = torch.randn(5, 4, 3, 3, requires_grad=True)
    plain, other = EvoNorm2d(4, "B0"), EvoNorm2d(4, "B0")
    plain(x).sum().backward()
    checkpoint(other, x, use_reentrant=False).sum().backward()
    assert torch.equal(other.running_var, plain.running_var)


def test_the_s_series_does_not_look_at_the_batch():
    layer, x = EvoNorm2d(8, groups=4), torch.randn(5, 8, 3, 3)
    torch.testing.assert_close(layer(x)[:2], layer(x[:2]))
    assert not list(layer.buffers())


def test_without_the_activation_it_is_gamma_and_beta():
    layer = EvoNorm2d(4, "B0", apply_act=False)
    nn.init.uniform_(layer.weight)
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(layer(x), x * layer.weight.view(1, -1, 1, 1))
    assert layer.v is None and bool((layer.running_var == 1).all())


def test_half_precision_with_a_large_mean():
    x = (300 + torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))).half()
    for kind in ("S1", "B0"):
        layer = EvoNorm2d(4, kind, groups=2)
        want = layer(x.float())
        torch.testing.assert_close(layer.half()(x).float(), want, rtol=1e-2, atol=1e-2)


def test_constant_features_are_finite():
    x = torch.full((2, 4, 3, 3), 5.0, requires_grad=True)
    for kind in ("B0", "B1", "B2", "S0", "S1", "S2"):
        y = EvoNorm2d(4, kind, groups=2)(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and gradient.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="kind is 'S3'"):
        EvoNorm2d(8, "S3")
    with pytest.raises(ValueError, match="32 groups do not divide 8 channels"):
        EvoNorm2d(8)
    with pytest.raises(ValueError, match="groups of 3 channels do not divide 8"):
        EvoNorm2d(8, group_size=3)
    with pytest.raises(ValueError, match="no variance"):
        EvoNorm2d(8, "B0")(torch.zeros(1, 8, 1, 1))
