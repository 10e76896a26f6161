"""`bn_only`: what stays trainable, first gains, the control, the probe, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput
from laconic.norm import DeadGammaProbe, dead_gamma_report, init_gamma_, train_only, train_random_weights
from laconic.testing import Example


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 2),
    )


def norms():
    return nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(5), nn.GroupNorm(2, 4))


def gammas_in_range(model):
    gammas = torch.cat([norm.weight.detach().float() for norm in model])
    inside = bool(((gammas >= 0) & (gammas <= 1)).all())
    return inside and float(gammas.max() - gammas.min()) > 0.3 and not any(norm.bias.any() for norm in model)


EXAMPLES = [
    Example(lambda: init_gamma_, kind="Init", name="init_gamma_", inputs=lambda g: [norms()], holds=gammas_in_range),
    Example(DeadGammaProbe, kind="Probe", inputs=lambda g: [network()]),
]


def test_norms_alone_are_trained():
    model = network()
    trained = train_only(model)
    assert [id(p) for p in trained] == [id(p) for i in (1, 5) for p in model[i].parameters()]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "1.weight", "1.bias", "5.weight", "5.bias",
    ]  # fmt: skip


def test_the_output_and_exceptions_are_trained_too():
    model = network()
    assert len(train_only(model, output=True)) == 6
    assert model[6].weight.requires_grad and not model[4].weight.requires_grad
    assert len(train_only(model, exceptions=["0.*"])) == 6
    assert len(train_only(model, kinds=("linear",))) == 4


def test_running_statistics_follow_and_frozen_weights_stay():
    model, x = network(), 3 + torch.randn(4, 3, 5, 5)
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(train_only(model), 0.1, weight_decay=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[1].running_mean.any()


@pytest.mark.parametrize(("kind", "low", "beta"), [("fixed", 1, 0), ("oneone", 1, 1), ("positivenegative", -1, 0)])
def test_first_gains_by_name(kind, low, beta):
    norm = init_gamma_(nn.BatchNorm2d(400), kind, torch.Generator().manual_seed(0))
    assert bool((norm.bias == beta).all())
    gammas = norm.weight.detach()
    assert float(gammas.min()) == pytest.approx(low, abs=0.02) and float(gammas.max()) <= 1


def test_the_control_trains_two_weights_of_every_channel():
    model = network()
    trained = train_random_weights(model, generator=torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in trained) == 2 * (8 + 5 + 2)
    first = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(trained, 0.1)
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    changed = (model[0].weight != first).flatten(1).sum(1)
    assert changed.tolist() == [2] * 8
    parametrize.remove_parametrizations(model[0], "weight")
    assert isinstance(model[0].weight, nn.Parameter)


def test_the_probe_counts():
    model = network()
    with torch.no_grad():
        model[1].weight[:4] = torch.tensor([0.0, 0.009, -0.009, 0.011])
    found = dead_gamma_report(model)
    assert [(row["norm"], row["channels"], row["dead"]) for row in found.table] == [
        ("1", 8, 3),
        ("5", 5, 0),
        ("all", 13, 3),
    ]
    assert found.share == 3 / 13
    assert dead_gamma_report(model, 0.02).table[0]["dead"] == 4


def test_refusals():
    with pytest.raises(BadInput, match="no kind 'bn'"):
        train_only(network(), kinds=("bn",))
    with pytest.raises(BadInput, match=r"no parameter's name fits 'head\.\*'"):
        train_only(network(), exceptions=["head.*"])
    with pytest.raises(BadInput, match="no parameters of a norm"):
        train_only(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="no norm with a gain"):
        init_gamma_(nn.BatchNorm1d(3, affine=False))
    with pytest.raises(BadInput, match="no norm with a gain"):
        dead_gamma_report(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="not 'normal'"):
        init_gamma_(nn.BatchNorm1d(3), "normal")
    with pytest.raises(BadInput, match="0 weights to a channel"):
        train_random_weights(network(), 0)
    with pytest.raises(ValueError, match="threshold is 0"):
        DeadGammaProbe(0.0)
