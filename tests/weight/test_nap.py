"""`nap`: what is held and what not, that N makes weights scale-free, resuming, and what is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from laconic.core.constraint import Constrain, constrain
from laconic.core.fit import fit
from laconic.errors import BadInput
from laconic.tasks.small import small
from laconic.testing import Example
from laconic.weight import NormProjection, insert_prenorm, project_weights

EXAMPLES = [
    Example(
        lambda: NormProjection(radius=2.0),
        kind="Constraint",
        holds=lambda p: abs(p.double().norm() - 2) <= 2 * 4 * torch.finfo(p.dtype).eps,
    )
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def trained(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()


def test_the_equation():
    p, gain, offset = (nn.Parameter(torch.tensor(v)) for v in ([[3.0, 0.0], [0.0, 4.0]], [3.0], [4.0]))
    rule = NormProjection([p, (gain, offset)])
    with torch.no_grad():
        p.mul_(7)
        gain.copy_(torch.tensor([0.0]))
        offset.copy_(torch.tensor([2.0]))
    for parameter in rule.parameters:
        rule.project_(parameter)
    torch.testing.assert_close(p.detach(), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert (gain.item(), offset.item()) == (0.0, 5.0)


def test_norms_make_weights_scale_free():
    """W -> 3 W changes nothing, and so does not the gradient along W; only the last layer has no norm behind it."""
    for norm, affine in (("layer", True), ("layer", False), ("rms", True), ("rms", False)):
        model = network()
        assert insert_prenorm(model, norm, affine=affine) == ["1", "4"]
        x = torch.randn(5, 64)
        before = model(x)
        model.double()(x.double()).square().sum().backward()
        model.float()
        for layer in (model[0], model[3]):
            assert layer.bias is None
            weight, grad = layer.weight.detach(), layer.weight.grad
            assert abs((weight * grad).sum()) <= 1e-4 * weight.norm() * grad.norm()
            with torch.no_grad():
                layer.weight.mul_(3)
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


def test_the_bias_moves_behind_the_norm():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    bias = model[0].bias.detach().clone()
    insert_prenorm(model)
    assert torch.equal(model[1].bias, bias)


def test_convolutions_nested_and_named_members():
    inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.GELU(), pool=nn.AvgPool2d(2)))
    model = nn.Sequential(inner, nn.Flatten(), nn.Linear(36, 5))
    assert insert_prenorm(model) == ["0.conv_norm"]
    assert list(inner._modules) == ["conv", "conv_norm", "act", "pool"]
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    with torch.no_grad():
        inner.conv.weight.mul_(2)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale_offset", ["project", "free"])
def test_lengths_are_kept_through_a_training(scale_offset):
    model = network()
    insert_prenorm(model)
    lengths = [layer.weight.norm().item() for layer in model if isinstance(layer, nn.Linear)]
    vectors = [torch.cat(list(layer.parameters())).norm().item() for layer in model if isinstance(layer, nn.LayerNorm)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    handle = project_weights(model, optimizer, scale_offset=scale_offset)
    trained(model, optimizer, 20)
    after = [layer.weight.norm().item() for layer in model if isinstance(layer, nn.Linear)]
    held = [torch.cat(list(layer.parameters())).norm().item() for layer in model if isinstance(layer, nn.LayerNorm)]
    assert after == pytest.approx(lengths, rel=1e-5)
    assert (held == pytest.approx(vectors, rel=1e-5)) == (scale_offset == "project")
    handle.remove()
    trained(model, optimizer, 20)
    assert model[0].weight.norm().item() != pytest.approx(lengths[0], rel=1e-3)


def test_every_so_many_steps():
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([p], lr=1.0)
    constrain(optimizer, NormProjection([p], every=3))
    lengths = []
    for _ in range(6):
        p.grad = -p.detach() / p.detach().norm()
        optimizer.step()
        lengths.append(p.detach().norm().item())
    assert lengths == pytest.approx([3, 4, 2, 3, 4, 2])


def test_the_state_goes_on_where_it_was():
    model = network()
    rule = NormProjection.of(model, every=2)
    state = rule.state_dict()
    with torch.no_grad():
        model[0].weight.mul_(5)
    rule.project_(model[0].weight)  # the first of two calls
    late = NormProjection.of(model, every=2)
    late.load_state_dict(state | {"calls": rule.state_dict()["calls"]})
    late.project_(model[0].weight)
    assert model[0].weight.norm().item() == pytest.approx(state["radii"][0].item(), rel=1e-5)
    with pytest.raises(BadInput, match="the state is of 3 parameters in 3 groups, and 1 in 1 are held here"):
        NormProjection([nn.Parameter(torch.ones(2))]).load_state_dict(state)


def test_as_a_hook_of_a_training():
    task, model = small("digits", size=100), network()
    insert_prenorm(model)
    rule = NormProjection.of(model)
    before = copy.deepcopy(rule.state_dict()["radii"])
    held = {id(p) for p in rule.parameters}
    hook = Constrain(rule, lambda name, p: id(p) in held)
    fit(model, task, torch.optim.SGD(model.parameters(), lr=0.5), steps=10, hooks=[hook], quiet=True)
    torch.testing.assert_close(NormProjection.of(model).state_dict()["radii"], before, rtol=1e-5, atol=0)


def test_what_is_not_trained_is_left_out():
    model = network()
    model[0].weight.requires_grad_(False)
    assert id(model[0].weight) not in {id(p) for p in NormProjection.of(model).parameters}


def test_refusals():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(BadInput, match="radius is -1"):
        NormProjection(radius=-1)
    with pytest.raises(BadInput, match="every is 0"):
        NormProjection([p], every=0)
    with pytest.raises(BadInput, match="stands in two groups"):
        NormProjection([p, (p,)])
    with pytest.raises(BadInput, match=r"shape \(3,\) are 0"):
        NormProjection([nn.Parameter(torch.zeros(3))])
    with pytest.raises(BadInput, match=r"shape \(2,\) is in no group"):
        NormProjection().project_(p)
    with pytest.raises(BadInput, match="scale_offset is 'drop'"):
        NormProjection.of(network(), scale_offset="drop")
    with pytest.raises(BadInput, match="computes the weight of 0"):
        NormProjection.of(nn.Sequential(weight_norm(nn.Linear(2, 2))))
    with pytest.raises(BadInput, match="ReLU has no trained weight"):
        NormProjection.of(nn.ReLU())
    with pytest.raises(BadInput, match="norm is 'batch'"):
        insert_prenorm(network(), "batch")
    with pytest.raises(BadInput, match="Linear has no Sequential"):
        insert_prenorm(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="norm='rms'.* 0 "):
        insert_prenorm(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()), "rms")
    shared = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="0 stands in two places"):
        insert_prenorm(nn.Sequential(shared, nn.ReLU(), shared))
