"""`bcn`: the equations by hand, estimates around the old mean, what folds, the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from laconic.core.affine import as_affine
from laconic.norm import BatchChannelNorm, EstimatedBatchNorm, fold, set_rate
from laconic.testing import Case, Example

TRAITS = ("gradient:surrogate", "batch_independent_eval")
EXAMPLES = [
    Example(lambda: BatchChannelNorm(4, 2), kind="Layer", traits=TRAITS, inputs=[(3, 4, 2, 2)], wrong=[(3, 5, 2, 2)]),
    Example(
        lambda: BatchChannelNorm(4, 2, estimate=True), kind="Layer", traits=TRAITS, inputs=[(3, 4, 6)], wrong=[(4,)]
    ),
    Example(
        lambda: EstimatedBatchNorm(4, rate=0.3),
        kind="Layer",
        traits=(*TRAITS, "folds"),
        inputs=[(3, 4, 2, 2)],
        wrong=[(3, 5, 2, 2)],
    ),
]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "rate")


def run_vector(case: Case):
    args = case.args
    options = {
        ours: args[theirs] for theirs, ours in (("bn_eps", "bn_eps"), ("bn_momentum", "momentum")) if theirs in args
    }
    layer = BatchChannelNorm(
        args["num_features"], args["num_groups"], args["eps"], args["estimate"], args.get("rate", 0.0), **options
    )
    assert args.get("running_var_unbiased", True)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(case.array(name.replace(".", "_")))
        for name in BUFFERS:
            if name in case:
                getattr(layer.bn, name).copy_(case.array(name))
    if not args["training"]:
        return {"output": layer.eval()(case.array("input"))}
    found: dict[str, list] = {role: [] for role in case.roles if role == "output" or role.endswith("_after")}
    found |= {role: [] for role in case.roles if role.startswith("grad_") and role != "grad_output"}
    for x, grad in zip(case.arrays("input"), case.arrays("grad_output"), strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        found["output"].append(y)
        found["grad_input"].append(x.grad)
        for name, parameter in layer.named_parameters():
            found[f"grad_{name.replace('.', '_')}"].append(parameter.grad)
        for name in BUFFERS:
            if f"{name}_after" in found:
                found[f"{name}_after"].append(getattr(layer.bn, name).clone())
    return found


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_equation_of_estimates():
    norm = EstimatedBatchNorm(3, eps=1e-3, rate=0.3).double()
    mu, var, r = torch.zeros(3).double(), torch.ones(3).double(), float(norm.rate)
    for seed in range(4):
        x = 2 + drawn(5, 3, seed=seed)
        m, q = x.mean(0), ((x - mu) ** 2).mean(0)
        mu, var = (1 - r) * mu + r * m, (1 - r) * var + r * q
        y = norm(x)
        torch.testing.assert_close(y, (x - mu) / (var + 1e-3).sqrt())
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mu, var))
    torch.testing.assert_close(norm.eval()(x), y)


def test_the_equation_of_both():
    norm, x = BatchChannelNorm(4, 2).double(), drawn(3, 4, 5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    inner = functional.batch_norm(x, None, None, training=True)
    want = functional.group_norm(
        inner, 2, norm.weight.view(2).repeat_interleave(2), norm.bias.view(2).repeat_interleave(2)
    )
    torch.testing.assert_close(norm(x), want)


def test_gradient_takes_statistics_as_constants():
    norm, x = EstimatedBatchNorm(3, rate=0.5).double(), drawn(6, 3).requires_grad_()
    y = norm(x)
    y.backward(drawn(6, 3, seed=1))
    scale = as_affine(norm.eval()).scale
    torch.testing.assert_close(x.grad, drawn(6, 3, seed=1) * scale)
    fixed = EstimatedBatchNorm(3, rate=0.0).double()
    assert torch.autograd.gradcheck(fixed, (x,))
    assert not fixed.running_mean.any()


def test_two_calls_before_a_backward_keep_their_own_estimates():
    norm, x = EstimatedBatchNorm(3, rate=0.5).double(), drawn(6, 3)
    first = norm(x)
    gain = torch.autograd.grad(first.sum(), norm.weight, retain_graph=True)[0]
    norm(10 * x)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), norm.weight)[0], gain)


def test_recomputed_activations_are_not_counted():
    norm, other, x = (
        EstimatedBatchNorm(3, rate=0.5),
        EstimatedBatchNorm(3, rate=0.5),
        torch.randn(6, 3, requires_grad=True),
    )
    checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    other(x).square().sum().backward()
    torch.testing.assert_close(norm.state_dict(), other.state_dict())
    torch.testing.assert_close(norm.weight.grad, other.weight.grad)


def test_the_batch_part_folds_and_the_group_part_stays():
    for estimate in (False, True):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), BatchChannelNorm(4, 2, estimate=estimate, rate=0.5))
        x = torch.randn(3, 2, 6, 6)
        model(x)
        want = model.eval()(x)
        assert fold(model, ((x,), {})).folded == {"1.bn": ("0",)}
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_one_image_and_masks():
    norm = BatchChannelNorm(4, 2, estimate=True)
    assert bool(norm(torch.randn(1, 4, 1)).isfinite().all())
    part, whole = EstimatedBatchNorm(2, rate=0.5), EstimatedBatchNorm(2, rate=0.5)
    x, mask = torch.randn(2, 2, 3), torch.tensor([[True, True, False], [True, False, False]])
    part(x, mask), whole(x.transpose(1, 2)[mask])
    torch.testing.assert_close(part.state_dict(), whole.state_dict())
    before = part.running_var.clone()
    part(x, torch.zeros_like(mask))
    assert torch.equal(part.running_var, before)


def test_the_rate_is_set_for_a_model():
    model = nn.Sequential(BatchChannelNorm(4, 2, estimate=True), BatchChannelNorm(4, 2))
    assert set_rate(model, 0.25) == 1 and model[0].bn.rate.tolist() == [0.25]
    with pytest.raises(ValueError, match="rate is 2"):
        set_rate(model, 2)
    with pytest.raises(ValueError, match="4 channels do not make 3 groups"):
        BatchChannelNorm(4, 3)
    with pytest.raises(ValueError, match="training mode"):
        as_affine(model[0].bn)
