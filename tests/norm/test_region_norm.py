"""`region_norm`: the paper's fill and batch norm by hand, what the regions know of each other, and the vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.norm import RegionNormB, RegionNormL, region_normalize
from laconic.testing import Case, Example

TRAITS = ("gradient:exact",)


def masked(generator: torch.Generator):
    hole = torch.zeros(3, 1, 8, 6, dtype=torch.bool)  # a mask has no gradient
    hole[:2, :, 2:5, 2:4] = True
    return [torch.randn(3, 2, 4, 3, generator=generator), hole]


def unmatched(generator: torch.Generator):
    return [torch.randn(3, 5, 4, 3, generator=generator), torch.zeros(3, 1, 8, 6, dtype=torch.bool)]


EXAMPLES = [
    Example(lambda: RegionNormB(2), kind="Layer", traits=TRAITS, inputs=masked, wrong=unmatched),
    Example(
        lambda: RegionNormB(2, masked_bias=True, per_image=True),
        kind="Layer",
        traits=TRAITS,
        inputs=masked,
        wrong=unmatched,
    ),
    Example(lambda: RegionNormL(2, 0.5, 3), kind="Layer", traits=TRAITS, inputs=[(3, 2, 4, 3)], wrong=[(3, 5, 4, 3)]),
]


def run_vector(case: Case):
    args = case.args
    if case.name.startswith("rn_b"):
        layer = RegionNormB(args["num_features"], args["masked_bias"], eps=args["bn_eps"])
    else:
        layer = RegionNormL(args["num_features"], args["threshold"], args["kernel_size"], eps=args["bn_eps"])
    layer.load_state_dict(case.named("param."))
    names = [name for name, _ in layer.named_parameters()]
    inputs = case.arrays("input")
    more = [(mask,) for mask in case.arrays("mask")] if "mask" in case else [()] * len(inputs)
    found = {"output": [], "grad_input": [], **{f"grad.{name}": [] for name in names}}
    for x, grad, extra in zip(inputs, case.arrays("grad_output"), more, strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x, *extra)
        y.backward(grad)
        found["output"].append(y)
        found["grad_input"].append(x.grad)
        for name in names:
            found[f"grad.{name}"].append(layer.get_parameter(name).grad)
    if "output_eval" in case:
        found["output_eval"] = layer.eval()(inputs[-1], *more[-1])
    return found


def paper(x, hole, eps):
    """The paper's code in words: fill the outside with the region's mean, batch norm, times the root of the share."""
    out = torch.zeros_like(x)
    for region in (hole, ~hole):
        m = region.expand(x.shape).to(x.dtype)
        count = m.sum((0, 2, 3), keepdim=True)
        count = torch.where(count == 0, torch.ones_like(count), count)
        mean = (x * m).sum((0, 2, 3), keepdim=True) / count
        filled = F.batch_norm(x * m + (1 - m) * mean, None, None, training=True, eps=eps)
        out = out + filled * (count / (x.numel() / x.shape[1])).sqrt()
    return out


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_equation(share):
    g = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64)
    hole = torch.rand(2, 1, 5, 4, generator=g) < share
    layer = RegionNormB(3, eps=0.1).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, generator=g)
    r, m = paper(x, hole, 0.1), hole.double()
    gf, bf, gb, bb = (p.view(1, -1, 1, 1) for p in layer.parameters())
    torch.testing.assert_close(layer(x, m), r * m * (1 + gf) + bf + r * (1 - m) * (1 + gb) + bb)
    layer.masked_bias = True
    torch.testing.assert_close(layer(x, m), (r * (1 + gf) + bf) * m + (r * (1 + gb) + bb) * (1 - m))


def test_the_known_region_does_not_see_the_hole():
    x, hole = torch.randn(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    hole[:, :, 2:6, 2:6] = 1
    other = torch.where(hole.bool(), torch.full_like(x, 1e4), x)
    known = hole.expand(x.shape) == 0
    layer = RegionNormB(3)
    assert torch.equal(layer(other, hole)[known], layer(x, hole)[known])


def test_each_region_has_mean_0_and_variance_1():
    x, hole = 5 + 3 * torch.randn(4, 2, 16, 16), torch.rand(4, 1, 16, 16) < 0.3
    y = region_normalize(x, hole)
    inside = y.transpose(0, 1)[:, hole[:, 0]]
    torch.testing.assert_close(inside.mean(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(inside.var(1, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert not y.masked_select(~hole).any()


def test_per_image_an_image_does_not_depend_on_its_batch():
    x, hole = torch.randn(4, 2, 8, 8), (torch.rand(4, 1, 8, 8) < 0.4).float()
    layer = RegionNormB(2, per_image=True)
    torch.testing.assert_close(layer(x, hole)[1:2], layer(x[1:2], hole[1:2]))
    found = RegionNormL(2, 0.5, per_image=True)
    torch.testing.assert_close(found(x)[1:2], found(x[1:2]))


def test_half_precision_with_a_large_mean():
    x = (500 + torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))).half()
    hole = torch.zeros(2, 1, 8, 8)
    hole[..., :4] = 1
    want = RegionNormB(2)(x.float(), hole)
    torch.testing.assert_close(RegionNormB(2).half()(x, hole).float(), want, rtol=1e-2, atol=1e-2)


def test_the_first_convolution_learns_through_gamma_and_beta_alone():
    layer, x = RegionNormL(3, 0.5, 3), torch.randn(2, 3, 6, 6)
    nn.init.zeros_(layer.gamma_conv.weight)
    nn.init.zeros_(layer.beta_conv.weight)
    layer(x).square().sum().backward()
    assert not layer.conv1.weight.grad.any()


def test_refusals():
    with pytest.raises(ValueError, match="kernel_size is 4"):
        RegionNormL(3, kernel_size=4)
    with pytest.raises(ValueError, match=r"a mask of \(2, 3, 4, 4\): it must be \(2, 1, H, W\)"):
        RegionNormB(3)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
