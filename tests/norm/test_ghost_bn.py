"""`ghost_bn`: batch norm per chunk as the reference, running statistics in order, the regime, the noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.core.fit import fit
from laconic.errors import BadInput
from laconic.norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    MultiplicativeGradNoise,
    Regime,
    WeightDistance,
    ghost_sizes,
    large_batch_regime,
)
from laconic.testing import Example
from tests.core.training import Points

TRAITS = ("gradient:exact", "batch_independent_eval", "folds")
EXAMPLES = [
    Example(lambda: GhostBatchNorm1d(3, ghost_size=2), kind="Layer", traits=TRAITS, inputs=[(5, 3)], wrong=[(5, 4)]),
    Example(
        lambda: GhostBatchNorm2d(3, ghost_size=2, momentum=None),
        kind="Layer",
        traits=TRAITS,
        inputs=[(4, 3, 2, 2)],
        wrong=[(4, 3, 2)],
    ),
]


@pytest.mark.parametrize("batch", [2, 4, 7, 8, 9, 13])
@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
@pytest.mark.parametrize("places", [(), (3, 2)])
def test_the_equation_is_batch_norm_per_chunk(batch, momentum, places):
    make = GhostBatchNorm2d if places else GhostBatchNorm1d
    norm = make(3, ghost_size=4, momentum=momentum).double()
    bn = (nn.BatchNorm2d if places else nn.BatchNorm1d)(3, momentum=momentum).double()
    for one in (norm, bn):
        nn.init.uniform_(one.weight, 0.5, 2, generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        x = torch.randn(batch, 3, *places, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        want = torch.cat([bn(chunk) for chunk in x.split(ghost_sizes(batch, 4))])
        torch.testing.assert_close(norm(x), want)
    torch.testing.assert_close(norm.state_dict(), bn.state_dict())
    torch.testing.assert_close(norm.eval()(x), bn.eval()(x))
    torch.testing.assert_close(norm.as_affine()(x), bn(x))


def test_sizes():
    assert ghost_sizes(8, 4) == [4, 4]
    assert ghost_sizes(9, 4) == [3, 3, 3]
    assert ghost_sizes(7, 3) == [3, 4]
    assert ghost_sizes(3, 2) == [3]
    assert ghost_sizes(2, 128) == [2]
    assert all(sum(ghost_sizes(b, m)) == b and min(ghost_sizes(b, m)) >= 2 for b in range(2, 40) for m in range(2, 9))


def test_ghosts_differ_from_the_whole():
    x = torch.cat([torch.randn(8, 2), 50 + torch.randn(8, 2)])
    ghosts, whole = (norm(x)[:8].detach().mean().abs().item() for norm in (GhostBatchNorm1d(2, 8), nn.BatchNorm1d(2)))
    assert ghosts < 1e-5 < 0.5 < whole


def test_one_example_is_refused_and_none_is_not_seen():
    with pytest.raises(ValueError, match=r"one value per channel in training mode, from \(1, 2\)"):
        GhostBatchNorm1d(2)(torch.ones(1, 2))
    assert GhostBatchNorm2d(2)(torch.randn(1, 2, 3, 3)).shape == (1, 2, 3, 3)
    with pytest.raises(ValueError, match="training mode"):
        GhostBatchNorm1d(2).as_affine()


def test_the_regime():
    recipe = Regime(0.1, 10, (4, 8))
    assert large_batch_regime(recipe, 512, 128) == Regime(pytest.approx(0.2), 40, (16, 32))
    assert large_batch_regime(recipe, 300, 128, lr="linear", epochs=False) == Regime(
        pytest.approx(0.234375), 10, (4, 8)
    )
    assert large_batch_regime(recipe, 300, 128, lr="same").epochs == 30


def test_noise_has_the_second_moment_of_a_small_batch():
    """Of losses 1, the mean over B with noise varies as that over m would if losses varied by 1: (B / m - 1) / B."""
    noise = MultiplicativeGradNoise(16, torch.Generator().manual_seed(0))
    found = torch.stack([noise(torch.ones(64, dtype=torch.float64)) for _ in range(4000)])
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
    assert float(found.var()) == pytest.approx((64 / 16 - 1) / 64, rel=0.1)
    assert noise(torch.arange(16.0)).item() == 7.5


def test_distances_are_recorded_and_resumed():
    hook, task = WeightDistance(), Points()
    model = task.model(0)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    fit(model, task, torch.optim.SGD(model.parameters(), 0.1), steps=3, hooks=[hook], quiet=True)
    now = nn.utils.parameters_to_vector(model.parameters())
    assert len(hook.distances) == 3 and hook.distances[-1] == pytest.approx(float((now - start).norm()), rel=1e-5)
    other = WeightDistance()
    other.load_state_dict(hook.state_dict())
    assert other.distances == hook.distances and math.isfinite(other.distances[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GhostBatchNorm1d(2, ghost_size=1), ValueError, "ghost_size is 1"),
        (lambda: GhostBatchNorm1d(2)(torch.ones(2, 2, 2, 2)), ValueError, "2 or 3 axes, not 4"),
        (lambda: large_batch_regime(Regime(1.0, 1), 2, 1, lr="cube"), BadInput, "lr is 'cube'"),
        (lambda: large_batch_regime(Regime(1.0, 1), 0, 1), BadInput, "batch=0"),
        (lambda: MultiplicativeGradNoise(0), BadInput, "base_batch is 0"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
