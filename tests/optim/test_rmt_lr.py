"""`rmt_lr`: the eigenvalue formulas against random matrices, the rules, and the schedule that follows a batch size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.optim import BatchSizeLR, batch_eigenvalue, scale_lr
from laconic.testing import Example


def size_at(step: int) -> int:
    """The batch size of the example below, step by step."""
    return 8 if step < 3 else 32 if step < 10 else 128


def linear(step: int, base: float) -> float:
    return base * (1 / 8 * 40 + 1 - 40 / 1000) / (40 / size_at(step) + 1 - 40 / 1000)


EXAMPLES = [
    Example(
        lambda optimizer: BatchSizeLR(optimizer, {10: 128, 3: 32}, base=8, critical=40, examples=1000),
        kind="Schedule",
        reference=linear,
    ),
    Example(
        lambda optimizer: BatchSizeLR(optimizer, {0: 8, 3: 32, 10: 128}, base=8, rule="sqrt"),
        kind="Schedule",
        reference=lambda step, base: base * math.sqrt(size_at(step) / 8),
    ),
]


@pytest.mark.parametrize("batch", [4, 20, 100, 1000])
def test_the_equation_of_the_hessian_against_a_random_matrix(batch):
    size, largest, deviation = 600, 1.5, 0.25
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    noise = (draw + draw.T) / math.sqrt(2) * deviation / math.sqrt(batch)
    noise[0, 0] += largest
    found = torch.linalg.eigvalsh(noise)[-1].item()
    assert found == pytest.approx(batch_eigenvalue(largest, deviation, size, batch), rel=0.05)


@pytest.mark.parametrize("batch", [30, 300, 3000])
def test_the_equation_of_gauss_newton_against_a_random_matrix(batch):
    size, largest, deviation = 400, 6.0, 0.9
    rows = deviation * torch.randn(batch, size, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    rows[:, 0] *= math.sqrt(largest) / deviation
    found = torch.linalg.svdvals(rows)[0].item() ** 2 / batch
    assert found == pytest.approx(batch_eigenvalue(largest, deviation, size, batch, "gauss_newton"), rel=0.15)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_the_eigenvalue_falls_with_the_batch_and_has_no_jump(matrix):
    batches = [1.05**k for k in range(1, 200)]
    found = [batch_eigenvalue(2.0, 0.5, 200, b, matrix) for b in batches]
    assert all(a > b for a, b in zip(found, found[1:], strict=False))
    assert all(a / b < 1.06 for a, b in zip(found, found[1:], strict=False))
    assert found[-1] == pytest.approx(2.0, rel=0.02)


def test_the_hessian_formula_has_no_linear_regime_and_gauss_newton_has():
    def slope(matrix, batch):
        pair = [batch_eigenvalue(2.0, 0.5, 10_000, b, matrix) for b in (batch, 1.01 * batch)]
        return math.log(pair[0] / pair[1]) / math.log(1.01)

    grid = [10**k for k in (0, 1, 2, 3, 4)]
    assert max(slope("hessian", b) for b in grid) <= 0.5 + 1e-9
    assert slope("gauss_newton", 1) > 0.95


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
def test_rules(rule, power):
    assert scale_lr(0.1, 32, 256, rule) == pytest.approx(0.1 * 8**power)
    assert scale_lr(0.1, 32, 256, rule, critical=0.0) == 0.1
    # Far below the critical size the rule is the power, far above it a constant.
    assert scale_lr(0.1, 32, 256, rule, critical=1e9) == pytest.approx(0.1 * 8**power, rel=1e-5)
    assert scale_lr(0.1, 3200, 25600, rule, critical=0.01) == pytest.approx(0.1, rel=1e-5)
    there = scale_lr(0.1, 32, 256, rule, critical=100, examples=1000)
    assert scale_lr(there, 256, 32, rule, critical=100, examples=1000) == pytest.approx(0.1)


def test_all_of_the_data_has_no_noise():
    # kappa(N) = 1, so the ratio is kappa(B) itself.
    assert scale_lr(1.0, 10, 100, critical=50, examples=100) == pytest.approx(1 + 50 * (1 / 10 - 1 / 100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": 0, "base": 8}, "a batch of 0 examples"),
        ({"batch_sizes": 8, "base": 8, "rule": "cubic"}, "rule is 'cubic': choose linear or sqrt"),
        ({"batch_sizes": 8, "base": 8, "critical": -1.0}, "critical is -1.0"),
        ({"batch_sizes": 80, "base": 8, "examples": 50}, "a batch of 80 examples of 50"),
        ({"batch_sizes": {-1: 8}, "base": 8}, "changes at step -1"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(BadInput, match=message):
        BatchSizeLR(optimizer, **options)


def test_an_eigenvalue_needs_positive_numbers_and_a_known_matrix():
    with pytest.raises(BadInput, match="batch=0"):
        batch_eigenvalue(1.0, 1.0, 10, 0)
    with pytest.raises(BadInput, match="choose hessian or gauss_newton"):
        batch_eigenvalue(1.0, 1.0, 10, 4, "fisher")
