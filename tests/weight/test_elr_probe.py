"""`elr_probe`: exact identities of scale-free weights, settled values against simulated steps, and what it finds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.testing import Example
from laconic.weight import (
    ElrProbe,
    angles,
    effective_lr,
    project_weights,
    rescaled_sgd,
    scale_free_weights,
    settled_angle,
    settled_length,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8, affine=False),
        nn.ReLU(),
        nn.Linear(8, 8, bias=False),
        nn.LayerNorm(8),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )


def batch(generator=None):
    return torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


EXAMPLES = [Example(lambda: ElrProbe(sgd), kind="Probe", inputs=lambda g: [network(), batch(g)])]


def test_it_finds_what_is_scale_free():
    assert scale_free_weights(network(), batch()) == {"0.weight": "rows", "3.weight": "whole", "6.weight": "no"}


def test_it_finds_it_in_convolutions_of_every_layout():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    x = torch.randn(4, 2, 6, 6)
    found = scale_free_weights(model, x, lambda m, x: m(x).mean())
    assert found == {"0.weight": "rows", "2.weight": "rows", "5.weight": "whole", "7.weight": "no"}
    model[5].bias = nn.Parameter(torch.arange(4.0))  # added before a norm over all channels, it does not scale along
    assert scale_free_weights(model, x, lambda m, x: m(x).mean())["5.weight"] == "no"


def test_the_same_training_at_another_scale():
    """(w, lr, lambda) and (2 w, 4 lr, lambda / 4): with no eps to speak of, bit for bit."""
    first = nn.Sequential(
        nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16, eps=1e-30, affine=False), nn.ReLU(), nn.Linear(16, 3)
    ).double()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.mul_(2)
    lr, decay = rescaled_sgd(2, 0.1, 0.02)
    assert (lr, decay) == (0.4, 0.005)
    for model, options in ((first, {"lr": 0.1, "weight_decay": 0.02}), (second, {"lr": lr, "weight_decay": decay})):
        groups = [{"params": model[0].parameters(), **options}, {"params": model[3].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            x, y = torch.randn(16, 6, generator=generator).double(), torch.randint(3, (16,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    x = torch.randn(16, 6).double()
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(("momentum", "adamw"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)], ids=str)
def test_settled_values_are_what_random_steps_settle_at(momentum, adamw):
    """Gradients at random, at right angles to w and of the length that a scale-free weight gives them, 1 / |w|."""
    lr, decay, size = 0.1, 0.1, 500
    w = nn.Parameter(torch.randn(size, dtype=torch.float64))
    if adamw:
        optimizer = torch.optim.AdamW([w], lr=lr, weight_decay=decay, betas=(momentum, 0.99))
    else:
        optimizer = torch.optim.SGD([w], lr=lr, weight_decay=decay, momentum=momentum)
    steps = 1500
    turned, lengths = [], []
    for step in range(steps):
        g, unit = torch.randn(size, dtype=torch.float64), w.detach() / w.detach().norm()
        g -= unit * (g @ unit)
        w.grad = 3 * g / g.norm() / w.detach().norm()
        before = w.detach().clone()
        optimizer.step()
        if step >= steps - 300:
            turned.append(angles(before[None], w.detach()[None]).item())
            lengths.append(w.detach().norm().item())
    measured, length = sum(turned) / len(turned), sum(lengths) / len(lengths)
    assert measured == pytest.approx(settled_angle(lr, decay, momentum, adamw=adamw), rel=0.04)
    if not adamw:
        assert length == pytest.approx(settled_length(lr, decay, length, 3 / length, momentum), rel=0.04)


def test_angles_are_exact_for_small_ones_too():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[5.0, 0.0], [0.0, 2.0], [1.0, 1e-9], [1.0, 0.0]], dtype=torch.float64)
    assert angles(a, b).tolist() == pytest.approx([0, math.pi / 2, 1e-9, 0], rel=1e-12)


def test_the_table_is_the_equations():
    """Against a step taken by hand, of an optimizer that has momentum already."""
    model, data = network(), batch()
    model[5].p = 0.0
    optimizer = sgd(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    rows = {row["name"]: row for row in ElrProbe(optimizer)(model, data).table}
    before = model[0].weight.detach().clone()
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    row = rows["0.weight"]
    assert row["angle"] == pytest.approx(angles(before, model[0].weight.detach()).median().item(), rel=1e-4)
    assert row["length"] == pytest.approx(before.norm(dim=1).median().item(), rel=1e-5)
    assert row["gradient"] == pytest.approx(gradient.norm(dim=1).median().item(), rel=1e-4)
    assert row["elr"] == pytest.approx(0.1 / (1 - 0.9) / row["length"] ** 2)
    assert row["settled_angle"] == pytest.approx(math.sqrt(2 * 0.1 * 0.01 / 1.9))
    assert row["settled_length"] == pytest.approx(settled_length(0.1, 0.01, row["length"], row["gradient"], 0.9))
    assert rows["6.weight"]["elr"] is None and rows["6.weight"]["angle"] > 0


def test_dampening_is_a_smaller_learning_rate():
    damped = ElrProbe(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01))
    plain = ElrProbe(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01))
    model, data = network(), batch()
    first, second = (probe(model, data).table[0] for probe in (damped, plain))
    assert all(first[key] == pytest.approx(second[key]) for key in ("elr", "settled_angle", "settled_length"))


def test_for_adam_the_rate_falls_with_the_length_alone():
    model = network()
    adamw = ElrProbe(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))(model, batch()).table[0]
    assert adamw["elr"] == pytest.approx(effective_lr(0.01, adamw["length"], 1)) == 0.01 / adamw["length"]
    assert adamw["settled_angle"] == pytest.approx(math.sqrt(2 * 0.01 * 0.1 * 0.1 / 1.9))
    coupled = ElrProbe(lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1))(model, batch()).table[0]
    assert coupled["settled_angle"] is None


def test_constraints_of_the_optimizer_do_not_reach_back():
    """Hooks of the real optimizer hold the real parameters: the probe's step must not run them."""
    model = network()
    optimizer = sgd(model.parameters())
    project_weights(model, optimizer)
    with torch.no_grad():
        model[0].weight.mul_(2)
    before = model[0].weight.detach().clone()
    ElrProbe(optimizer)(model, batch())
    assert torch.equal(model[0].weight, before)


def test_refusals():
    model = network()
    with pytest.raises(BadInput, match=r"shape \(2, 2\) that the model has not"):
        ElrProbe(torch.optim.SGD(nn.Linear(2, 2).parameters()))(model, batch())
    with pytest.raises(BadInput, match="a step of Adagrad .* power=2"):
        ElrProbe(torch.optim.Adagrad)(model, batch())
    assert ElrProbe(torch.optim.Adagrad, power=1)(model, batch()).table
    with pytest.raises(BadInput, match="does not call the model"):
        ElrProbe(sgd, lambda model, batch: model[0](batch[0]).sum())(model, batch())
    with pytest.raises(BadInput, match="trains no weight of two dimensions"):
        ElrProbe(torch.optim.SGD([model[6].bias]))(model, batch())
