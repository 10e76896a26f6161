"""`norm_loss`: the equations by hand, where it leads, the decoupled form, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.core.fit import fit
from laconic.errors import BadInput
from laconic.tasks.small import small
from laconic.testing import Example
from laconic.weight import NormLoss, decay_norms, norm_loss

EXAMPLES = [
    Example(
        lambda: NormLoss(0.5),
        kind="Loss",
        traits=("gradient:exact", "regulariser"),
        inputs=lambda g: [[torch.randn(4, 3, generator=g), torch.randn(2, 3, 2, 2, generator=g)]],
    ),
    Example(
        lambda: NormLoss(0.1, target=0.5, average=True),
        kind="Loss",
        traits=("gradient:exact", "regulariser"),
        inputs=lambda g: [nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Linear(3, 2, bias=False))],
    ),
]


def test_the_equation():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 3, generator=generator), torch.randn(2, 3, 2, generator=generator)]
    lengths = [math.sqrt(sum(v * v for v in row)) for w in weights for row in w.flatten(1).tolist()]
    want = sum((0.7 - length) ** 2 for length in lengths)
    assert norm_loss(weights, 0.7).item() == pytest.approx(want, rel=1e-5)
    assert norm_loss(weights, 0.7, average=True).item() == pytest.approx(want / 6, rel=1e-5)


def test_the_gradient_decays_long_rows_and_grows_short_ones():
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    norm_loss([weight]).backward()
    want = torch.tensor([[2 * 0.8 * 3, 2 * 0.8 * 4], [-2 * 0.3, -2 * 0.4], [0.0, 0.0]])  # 2 (1 - 1 / |w|) w
    torch.testing.assert_close(weight.grad, want)


def test_a_target_of_zero_is_weight_decay():
    weights = [torch.randn(3, 4)]
    torch.testing.assert_close(norm_loss(weights, 0.0), weights[0].square().sum())


def test_a_module_gives_the_rows_of_its_layers_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(3, 2))
    transposed = model[2].weight.view(2, 2, 3, 2, 2).transpose(1, 2).reshape(6, 8)
    weights = [model[0].weight, transposed, model[3].weight]
    torch.testing.assert_close(norm_loss(model), norm_loss(weights))
    model.append(nn.Linear(2, 3))
    model[4].weight = nn.Parameter(torch.zeros(3, 2))
    torch.testing.assert_close(norm_loss(model), norm_loss(weights) + 3)


def test_a_shared_weight_counts_once():
    layer = nn.Linear(3, 3)
    assert torch.equal(norm_loss(nn.Sequential(layer, nn.ReLU(), layer)), norm_loss(layer))


def test_rows_reach_length_one_in_a_training():
    """At a strength of 0.1 rows concentrate: their lengths deviate by less than 0.05."""
    task = small("digits", size=300)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, task, optimizer, steps=200, hooks=[NormLoss(0.1)], quiet=True)
    lengths = model[0].weight.detach().norm(dim=1)
    assert lengths.std() < 0.05 and abs(lengths.mean() - 1) < 0.05


def test_decoupled_is_the_equation_for_every_layout():
    for layer in (nn.Linear(3, 4), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        before = layer.weight.detach().clone()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        handle = decay_norms(optimizer, layer, strength=0.2, target=0.5)
        optimizer.step()  # no gradients: the decay alone moves the weights
        slow = nn.Parameter(before.clone())
        layer.weight.data, kept = slow.data, layer.weight.detach().clone()
        norm_loss(layer, 0.5).backward()
        torch.testing.assert_close(kept, before - 0.1 * 0.2 * layer.weight.grad)
        layer.zero_grad()
        handle.remove()
        after = layer.weight.detach().clone()
        optimizer.step()
        assert torch.equal(layer.weight, after)


def test_a_dead_row_stays_and_does_no_harm():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    decay_norms(optimizer, layer, strength=1.0)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_refusals():
    with pytest.raises(BadInput, match="there are no weights"):
        norm_loss(nn.ReLU())
    with pytest.raises(BadInput, match=r"shape \(3,\) has no rows"):
        norm_loss([torch.ones(3)])
    with pytest.raises(BadInput, match="strength is -1"):
        NormLoss(-1)
    with pytest.raises(BadInput, match="target is -1"):
        norm_loss([torch.ones(2, 2)], -1)
    layer = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="trains no linear layer or convolution of Linear"):
        decay_norms(torch.optim.SGD([layer.bias], lr=0.1), layer)
