"""Constraints hold after every step, whoever calls it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from laconic.core.constraint import Constrain, constrain
from laconic.core.fit import fit
from laconic.errors import BadInput
from tests.core.training import Points, weights


class UnitRows:
    """|p_i| = 1 for every row."""

    def __init__(self):
        self.projections = 0

    def project_(self, p):
        assert not torch.is_grad_enabled()
        self.projections += 1
        p /= p.norm(dim=-1, keepdim=True)

    def state_dict(self):
        return {"projections": self.projections}

    def load_state_dict(self, state):
        self.projections = state["projections"]


class Sphere(UnitRows):
    def tangent(self, p, x):
        return x - (p * x).sum(-1, keepdim=True) * p


def rows(p):
    return p.detach().norm(dim=-1)


def test_holds_after_a_step_and_not_after_removal():
    p, free = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))
    optimizer = torch.optim.SGD([p, free], lr=0.1)
    handle = constrain(optimizer, UnitRows(), [p])
    before = free.detach().clone()
    for _ in range(3):
        (p.sum() + free.sum()).backward()
        optimizer.step()
        torch.testing.assert_close(rows(p), torch.ones(3))
    assert not torch.equal(free, before) and rows(free) != 1
    handle.remove()
    optimizer.step()
    assert (rows(p) - 1).abs().max() > 1e-3


def test_the_gradient_is_taken_onto_the_tangent():
    p = nn.Parameter(torch.nn.functional.normalize(torch.randn(3, 5), dim=-1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    constrain(optimizer, Sphere())
    start = p.detach().clone()
    (p * 2).pow(3).sum().backward()
    optimizer.step()
    torch.testing.assert_close((p.grad * start).sum(-1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows(p), torch.ones(3))


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.3), partial(torch.optim.LBFGS, lr=0.1, max_iter=2)]
)
def test_as_a_hook_of_a_training(optimizer):
    task, rule = Points(), Sphere()
    model = task.model(0)
    fit(model, task, optimizer, steps=7, hooks=[Constrain(rule, lambda name, p: name == "0.weight")])
    torch.testing.assert_close(rows(model[0].weight), torch.ones(16))
    assert rule.projections == 7 and (rows(model[2].weight) - 1).abs().max() > 1e-3


def test_the_rules_state_is_in_the_checkpoint(tmp_path):
    def run(steps, resume):
        task, rule = Points(), UnitRows()
        model = task.model(0)
        hooks = [Constrain(rule, lambda name, p: p.ndim == 2)]
        fit(model, task, torch.optim.Adam, steps=steps, hooks=hooks, out=tmp_path, resume=resume)
        return rule.projections, weights(model)

    assert run(3, False)[0] == 6
    assert run(5, True)[0] == 10


def test_what_cannot_be_constrained():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([p])
    with pytest.raises(BadInput, match="object is no constraint"):
        constrain(optimizer, object())
    with pytest.raises(BadInput, match="the optimizer has it not"):
        constrain(optimizer, UnitRows(), [nn.Parameter(torch.ones(2))])
    task = Points()
    with pytest.raises(BadInput, match="constrains nothing"):
        fit(task.model(0), task, torch.optim.Adam, steps=1, hooks=[Constrain(UnitRows(), lambda n, p: False)])
