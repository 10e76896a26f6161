"""Hadamard transforms: QuaRot's values and base matrices, orthogonal, every construction, and what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings

from laconic.numerics import (
    base_matrix,
    base_order,
    hadamard,
    hadamard_block,
    hadamard_matrix,
    random_hadamard,
    random_orthogonal,
)
from laconic.numerics.hadamard import ORDERS


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 4), st.sampled_from([torch.float32, torch.float64]))
def test_orthogonal_and_its_own_inverse(power: int, rows: int, dtype: torch.dtype) -> None:
    n = 1 << power
    x = torch.randn(rows, 2, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = hadamard(x)
    assert y.shape == x.shape and y.dtype == dtype
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(y), x)


@pytest.mark.parametrize("n", [1, 2, 4, 32, 256])
def test_it_is_sylvesters_matrix(n: int) -> None:
    want = torch.from_numpy(scipy.linalg.hadamard(n)).double() / n**0.5
    torch.testing.assert_close(hadamard(torch.eye(n, dtype=torch.float64)), want)


@pytest.mark.parametrize("order", sorted({*ORDERS, 1, 44, 68, 76, 84, 124}))
def test_base_matrices_are_hadamard_matrices(order: int) -> None:
    matrix = base_matrix(order).long()
    assert set(matrix.unique().tolist()) <= {-1, 1}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("n", [12, 20, 24, 36, 40, 56, 80, 88, 104, 120, 152])
def test_other_lengths(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    y = hadamard(x)
    torch.testing.assert_close(hadamard(y, transpose=True), x)
    torch.testing.assert_close(x @ hadamard_matrix(n), y)
    k = base_order(n)
    want = (
        torch.kron(base_matrix(k).T.contiguous().double(), torch.from_numpy(scipy.linalg.hadamard(n // k)).double())
        / n**0.5
    )
    torch.testing.assert_close(hadamard_matrix(n), want)


@pytest.mark.parametrize(
    ("order", "first"),
    [(148, "++-+-+----++--+--++++--+--++----+-+-+"), (156, "+++--+-+-----+--++--"), (172, "+---++--++++-+-+++-++-")],
)
def test_orders_that_quip_has_of_williamson(order: int, first: str) -> None:
    row = base_matrix(order)[0].tolist()
    assert "".join("+" if v > 0 else "-" for v in row[: len(first)]) == first


def test_which_base_is_taken() -> None:
    assert [base_order(n) for n in (64, 12, 24, 48, 40, 80, 20, 56, 11008, 13824, 14336, 88)] == [
        1, 12, 12, 48, 40, 40, 20, 28, 172, 108, 28, 44,
    ]  # fmt: skip
    x = torch.randn(2, 80)
    assert not torch.allclose(hadamard(x, order=20), hadamard(x))
    torch.testing.assert_close(hadamard(hadamard(x, order=20), order=20, transpose=True), x)


@pytest.mark.parametrize("n", [8, 12, 52])
def test_random_rotations(n: int) -> None:
    for make in (random_hadamard, random_orthogonal):
        q, again = (make(n, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(q, again) and q.dtype == torch.float64
        torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64))
        assert not torch.equal(q, make(n, torch.Generator().manual_seed(4)))


def test_blocks_where_there_is_no_matrix() -> None:
    assert [hadamard_block(n) for n in (1, 6, 7, 92, 100, 64, 576, 896)] == [1, 2, 1, 4, 20, 64, 576, 896]


def test_the_input_is_left_alone_and_need_not_be_contiguous() -> None:
    for n in (8, 12):
        x = torch.randn(n, 5)
        kept = x.clone()
        torch.testing.assert_close(hadamard(x.T), hadamard(x.T.contiguous()))
        assert torch.equal(x, kept)


@pytest.mark.parametrize("n", [0, 3, 92])
def test_lengths_without_a_matrix_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {n} is known"):
        hadamard(torch.zeros(2, n))


def test_wrong_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="length 24 is not 20 times a power of two"):
        hadamard(torch.zeros(2, 24), order=20)
    with pytest.raises(ValueError, match="no base matrix of order 92"):
        base_matrix(92)
