"""Moments against numbers by hand, what is left out, extreme values; running values against torch's batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laconic.core.statistics import RunningStat, column_sums, moments, pooled, recomputing


def by_hand(values, weights, centred, power):
    """Mean and spread of a list of numbers."""
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total if centred else 0.0
    return mean, sum(w * abs(v - mean) ** power for w, v in zip(weights, values, strict=True)) / total


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("how", ["plain", "mask", "weights", "both"])
def test_the_definition(centred, power, how):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 4, 1, generator=g) > 0.4 if how in ("mask", "both") else None
    weights = torch.rand(3, 1, 5, generator=g, dtype=torch.float64) if how in ("weights", "both") else None
    share = (torch.ones_like(x) if weights is None else weights) * (torch.ones_like(x) if mask is None else mask)
    share = share.expand(x.shape)
    mean, spread = moments(x, (0, 1), centred=centred, power=power, mask=mask, weights=weights)
    assert (mean is None) is not centred
    assert spread.shape == (1, 1, 5)
    flat, _ = moments(x, (0, -2), power=power, mask=mask, weights=weights, keepdim=False)
    assert flat.shape == (5,)
    for channel in range(5):
        want = by_hand(x[..., channel].flatten().tolist(), share[..., channel].flatten().tolist(), centred, power)
        assert spread[0, 0, channel].item() == pytest.approx(want[1])
        if centred:
            assert mean[0, 0, channel].item() == pytest.approx(want[0])
            assert flat[channel].item() == pytest.approx(want[0])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_the_gradient(centred, power):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[True], [True], [False], [True]])

    def both(x):
        return tuple(
            t for m in (None, mask) for t in moments(x, 0, centred=centred, power=power, mask=m) if t is not None
        )

    assert torch.autograd.gradcheck(both, (x,))


def test_nothing_left_gives_zeros_and_no_nan():
    x = torch.full((2, 3), float("nan"), requires_grad=True)
    mean, spread = moments(x, 0, mask=torch.zeros(2, 1, dtype=torch.bool))
    assert not mean.any() and not spread.any()
    (mean + spread).sum().backward()
    assert not x.grad.any()
    mean, spread = moments(torch.empty(0, 3), 0)
    assert mean.tolist() == spread.tolist() == [[0.0, 0.0, 0.0]]


def test_what_is_masked_may_be_anything():
    x = torch.tensor([[1.0], [3.0], [float("inf")], [float("nan")]])
    mask = torch.tensor([[True], [True], [False], [False]])
    for options in ({"mask": mask}, {"weights": mask.float()}):
        mean, spread = moments(x, 0, **options)
        assert (mean.item(), spread.item()) == (2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_that_is_large_costs_no_digits(dtype, masked):
    """E[x^2] - E[x]^2 in float32 would give anything but 0.25 here; the squares overflow in float16."""
    x = (1024.0 + torch.tensor([0.0, 1.0]).repeat(500)).to(torch.float32)
    if dtype is torch.float32:
        x = 64 * x
    if dtype is torch.bfloat16:
        x = (128.0 + torch.tensor([0.0, 1.0]).repeat(500)).to(torch.float32)
    mask = torch.ones(1000, dtype=torch.bool) if masked else None
    mean, spread = moments(x.to(dtype), 0, mask=mask)
    want = x.double()
    assert mean.dtype == spread.dtype == torch.float32
    torch.testing.assert_close(mean.double(), want.mean(0, keepdim=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(spread.double(), want.var(0, correction=0, keepdim=True), rtol=1e-3, atol=0)


def test_constant_features_have_spread_zero():
    for power in (1, 2):
        mean, spread = moments(torch.full((8, 3), 7.5), 0, power=power)
        assert mean.tolist() == [[7.5] * 3] and not spread.any()


def test_strides_do_not_matter():
    x = torch.randn(2, 3, 4, 5)
    want, other = moments(x, (0, 2, 3)), moments(x.to(memory_format=torch.channels_last), (0, 2, 3))
    for a, b in zip(want, other, strict=True):
        torch.testing.assert_close(a, b)


def test_how_many_are_pooled():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert pooled(torch.empty(2, 3, 4), (0, 1)) == 6
    assert pooled(torch.empty(2, 3), (1,), mask).tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 3}, "power is 3"),
        ({"dims": ()}, "dims is empty"),
        ({"mask": torch.ones(3, 1)}, r"mask \(3, 1\) does not broadcast against \(2, 4\)"),
        ({"weights": torch.ones(5)}, r"weights \(5,\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        moments(torch.ones(2, 4), **{"dims": 0, **options})


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_values_are_those_of_torch(momentum):
    want, stat = nn.BatchNorm1d(3, momentum=momentum), RunningStat(momentum)
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for seed in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        want(x)
        assert stat.update_moments(mean, var, *moments(x, 0), 5, count)
    torch.testing.assert_close(mean, want.running_mean)
    torch.testing.assert_close(var, want.running_var)
    assert count.item() == 4


def test_biased_values_and_a_count_per_channel():
    x, mask = torch.randn(6, 2), torch.tensor([[True, True]] * 4 + [[True, False]] * 2)
    mean, spread = moments(x, 0, mask=mask)
    assert torch.equal(RunningStat(unbiased=False).corrected(spread, 4), spread)
    found = RunningStat().corrected(spread, pooled(x, 0, mask))
    torch.testing.assert_close(found[0, 1], x[:4, 1].var())
    torch.testing.assert_close(found[0, 0], x[:, 0].var())
    assert RunningStat().corrected(torch.zeros(1), 1).tolist() == [0.0]


def test_micro_batches_count_once_when_asked():
    stat, running, count = RunningStat(0.5, accumulate=2), torch.zeros(1), torch.tensor(0)
    changed = [stat.update([running], [torch.tensor([value])], count) for value in (2.0, 4.0, 1.0, 3.0)]
    assert changed == [False, True, False, True]
    assert running.item() == 0.5 * (0.5 * 3) + 0.5 * 2
    assert count.item() == 2


def test_low_precision_buffers_move():
    running = torch.full((1,), 100.0, dtype=torch.bfloat16)
    RunningStat(0.5).update([running], [torch.full((1,), 110.0)])
    assert running.item() == 105.0


class Counting(nn.Module):
    """A layer that keeps the mean of what it saw."""

    def __init__(self):
        super().__init__()
        self.stat, self.weight = RunningStat(0.5), nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        self.stat.update([self.mean], [moments(x, 0)[0]])
        return (self.weight * x).square()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_not_counted_again(reentrant):
    x = torch.ones(3, 2, requires_grad=True)
    layer = Counting()
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert layer.forwards == 2
    assert layer.mean.tolist() == [0.5, 0.5]
    assert not recomputing()
    layer(x).sum().backward()
    assert layer.mean.tolist() == [0.75, 0.75]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunningStat(1.5), "momentum is 1.5"),
        (lambda: RunningStat(accumulate=0), "accumulate is 0"),
        (lambda: RunningStat(None).update([torch.zeros(1)], [torch.zeros(1)]), "needs the count of batches"),
    ],
)
def test_refused_running_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_shows_its_options():
    assert repr(RunningStat()) == "RunningStat(momentum=0.1, unbiased=True)"
    assert repr(RunningStat(None, unbiased=False, accumulate=4)).endswith("unbiased=False, accumulate=4)")


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_column_sums_are_those_of_float64(rows, dtype):
    x = (torch.randn(rows, 7, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    found = column_sums(x)
    assert found.dtype == torch.float64
    assert torch.allclose(found, x.double().sum(0), rtol=1e-6, atol=0)
