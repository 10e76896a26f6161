"""Power iteration and Newton-Schulz, against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from laconic.core.spectral import (
    QUINTIC,
    as_matrix,
    largest_singular_value,
    newton_schulz,
    power_iteration,
    rayleigh,
    start_vectors,
)


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (1, 4), (4, 1)])
def test_power_iteration_finds_the_first_singular_vectors(shape):
    w = matrix(*shape)
    u, v = start_vectors(w, 300, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(w)
    torch.testing.assert_close(rayleigh(w, u, v), values[0])
    torch.testing.assert_close(torch.outer(u, v), torch.outer(left[:, 0], right[0]))
    torch.testing.assert_close(largest_singular_value(w), values[0])


def test_the_estimate_never_exceeds_the_largest_value():
    for seed in range(20):
        w = matrix(6, 4, seed=seed)
        u, v = start_vectors(w, seed % 4, generator=torch.Generator().manual_seed(seed))
        assert rayleigh(w, u, v) <= largest_singular_value(w) + 1e-12


def test_no_steps_leave_the_vectors():
    w, u, v = matrix(3, 2), matrix(3), matrix(2)
    after = power_iteration(w, u, v, 0)
    assert after[0] is u and after[1] is v


def test_a_matrix_of_zeros_gives_finite_vectors():
    u, v = start_vectors(torch.zeros(3, 2))
    assert torch.isfinite(u).all() and torch.isfinite(v).all()


def test_as_matrix_puts_one_axis_first():
    w = torch.arange(24).view(2, 3, 4)
    assert torch.equal(as_matrix(w), w.view(2, 12))
    assert torch.equal(as_matrix(w, 1)[2], w[:, 2].flatten())
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) has no dimension 3"):
        as_matrix(w, 3)


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (2, 5, 3)])
def test_newton_schulz_maps_singular_values_by_its_polynomial(shape):
    w = matrix(*shape)
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    s = values / (values.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for a, b, c in (QUINTIC,) * 5:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(w, dtype=None), left @ torch.diag_embed(s) @ right)


def test_newton_schulz_orthogonalizes_roughly():
    values = torch.linalg.svdvals(newton_schulz(matrix(32, 16)).double())
    assert newton_schulz(matrix(32, 16)).dtype == torch.bfloat16
    assert values.min() > 0.6 and values.max() < 1.3


def test_newton_schulz_takes_other_coefficients_for_each_step():
    w = matrix(3, 3)
    once = newton_schulz(w, [(1.5, -0.5, 0.0)], dtype=None)
    unit = w / (torch.linalg.matrix_norm(w) + 1e-7)
    torch.testing.assert_close(once, 1.5 * unit - 0.5 * unit @ unit.T @ unit)
    torch.testing.assert_close(newton_schulz(w, [], dtype=None), unit)
