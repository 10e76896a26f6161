"""`byol_gn_ws`: loss and momentum by hand, what a picture's features depend on, conversion, and refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from laconic.errors import BadInput
from laconic.norm import BYOL, byol_loss, groups_for, momentum_at, to_gn_ws
from laconic.testing import Example


def learner():
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    heads = nn.Linear(8, 4), nn.Linear(4, 4)
    for part in (encoder, *heads):
        if part is encoder:
            to_gn_ws(part, 4)
    return BYOL(encoder, *heads, partial(torch.optim.SGD, lr=0.1, momentum=0.9), steps=6)


def stream(g: torch.Generator):
    return [[(torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)) for _ in range(5)], torch.randn(3, 6)]


EXAMPLES = [Example(learner, kind="Protocol", traits=("order:dependent",), inputs=stream)]


def test_the_loss_by_hand():
    p, t = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[0.0, 2.0]], requires_grad=True)
    loss = byol_loss(p, t)
    assert float(loss.detach()) == pytest.approx(2 - 2 * 0.8)
    loss.backward()
    assert t.grad is None


def test_momentum_goes_to_one():
    assert momentum_at(0, 10, 0.9) == pytest.approx(0.9)
    assert momentum_at(5, 10, 0.9) == pytest.approx(0.95)
    assert momentum_at(10, 10, 0.9) == 1 == momentum_at(12, 10, 0.9)
    assert momentum_at(3, 10, 0.9) == pytest.approx(1 - 0.1 * (math.cos(0.3 * math.pi) + 1) / 2)


def test_a_step_by_hand():
    torch.manual_seed(0)
    one = BYOL(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2), partial(torch.optim.SGD, lr=0.5), steps=4, tau=0.5)
    before = [p.detach().clone() for p in one.online.parameters()]
    v, w = torch.randn(5, 3), torch.randn(5, 3)
    want = byol_loss(one.predictor(one.online(v)), one.target(w)) + byol_loss(
        one.predictor(one.online(w)), one.target(v)
    )
    assert one.update(v, w) == pytest.approx(float(want.detach()))
    for old, new, slow in zip(before, one.online.parameters(), one.target.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.5 * old + 0.5 * new)


def test_groups():
    assert [groups_for(c) for c in (64, 32, 16, 24, 7, 1)] == [16, 16, 8, 12, 1, 1]


def test_a_picture_does_not_depend_on_its_batch():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 6))
    weight = model[1].weight
    nn.init.uniform_(weight)
    to_gn_ws(model)
    assert model[1].weight is weight
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(model.train()(x)[1:2], model(x[1:2]))
    rows = model[4].weight
    torch.testing.assert_close(rows.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(6), atol=0.03, rtol=0)
    want = model(x)
    for layer in (model[0], model[4]):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(x), want)


def test_refusals():
    with pytest.raises(BadInput, match="no batch norm to replace"):
        to_gn_ws(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="computes the weight of 0 already"):
        to_gn_ws(nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2)))
    with pytest.raises(BadInput, match=r"^0: .*single entry"):
        to_gn_ws(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)))
    with pytest.raises(BadInput, match="0 steps"):
        BYOL(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), torch.optim.SGD, steps=0)
    with pytest.raises(ValueError, match="4 and 3 pictures"):
        learner().update(torch.zeros(4, 6), torch.zeros(3, 6))
