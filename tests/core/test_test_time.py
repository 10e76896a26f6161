"""Attaching, detaching, resetting: the batch norms that a model came with are untouched, whatever happens meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from laconic.core.test_time import AdaptedNorm, attach
from laconic.errors import BadInput


class Shifted(AdaptedNorm):
    """Normalizes by the source's statistics, and moves a buffer of its own."""

    def take_source(self, norm):
        self.register_buffer("seen", torch.zeros(()))

    def statistics(self, x):
        self.seen += len(x)
        return self.per_channel(self.running_mean, x), self.per_channel(self.running_var, x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 1), norm, nn.Flatten(), nn.LazyLinear(2))
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6) + 1)
    return model.eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_original_comes_back_bit_for_bit():
    model = network()
    before, want, norm = state(model), model(X), model[1]
    keys = list(before)
    attached = attach(model, Shifted.from_batchnorm)
    assert model[1] is model[4] and isinstance(model[1], Shifted)  # held twice, replaced once
    assert set(keys) - {"1.num_batches_tracked", "4.num_batches_tracked"} <= set(model.state_dict())
    torch.testing.assert_close(model(X), want)
    with torch.no_grad():
        model[1].weight.mul_(3)
        model[1].running_mean.add_(1)
    assert attached.detach() is model
    assert model[1] is norm and model[4] is norm and torch.equal(model(X), want)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_as_a_context_it_detaches_also_after_an_error():
    model = network()
    norm = model[1]
    with pytest.raises(KeyError), attach(model, Shifted.from_batchnorm):
        raise KeyError
    assert model[1] is norm


def test_reset_is_the_start_and_predict_changes_nothing():
    model = network()
    with attach(model, Shifted.from_batchnorm) as attached:
        start = copy.deepcopy(attached.state_dict())
        first = attached.update(X)
        with torch.no_grad():
            model[1].bias.add_(1)
        held = attached.state_dict()
        attached.predict(X)
        assert torch.equal(attached.state_dict()["1"]["seen"], held["1"]["seen"]) and held["1"]["seen"] > 0
        attached.reset()
        assert all(torch.equal(value, start["1"][name]) for name, value in attached.state_dict()["1"].items())
        assert torch.equal(attached.update(X), first)


def test_modes_and_what_is_trained_are_taken_over():
    model = network().train()
    model[1].weight.requires_grad_(False)
    with attach(model, Shifted.from_batchnorm):
        assert model[1].training and not model[1].weight.requires_grad and model[1].bias.requires_grad


def test_refusals():
    model = network()
    with attach(model, Shifted.from_batchnorm) as attached:
        with pytest.raises(BadInput, match="1 is a Shifted already: detach"):
            attach(model, Shifted.from_batchnorm)
        with pytest.raises(BadInput, match="those here are at"):
            attached.load_state_dict({})
        model[1] = nn.Identity()
        with pytest.raises(BadInput, match="1 is a Identity that was put there"):
            attached.detach()
        model[1] = model[4]
    with pytest.raises(BadInput, match="were detached"):
        attached.reset()
    with pytest.raises(BadInput, match="it has no batch norm"):
        attach(nn.Sequential(nn.Linear(2, 2)), Shifted.from_batchnorm)
    with pytest.raises(BadInput, match="0: it keeps no running statistics"):
        attach(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), Shifted.from_batchnorm)
    with pytest.raises(BadInput, match="put it into another"):
        attach(nn.BatchNorm1d(2), Shifted.from_batchnorm)


def test_what_is_left_alone_is_said():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.BatchNorm2d(3), Own(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    with attach(model, Shifted.from_batchnorm) as attached:
        assert list(attached.layers) == ["0"] and set(attached.left) == {"1", "2"}
        assert "a forward of its own" in attached.left["1"] and "no running statistics" in attached.left["2"]


def test_nothing_is_changed_where_one_layer_cannot_be_made():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4)).eval()

    def make(norm):
        if norm.num_features == 4:
            raise ValueError("four")
        return Shifted.from_batchnorm(norm)

    with pytest.raises(ValueError, match="four"):
        attach(model, make)
    assert type(model[0]) is nn.BatchNorm2d
