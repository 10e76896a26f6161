"""The Walsh-Hadamard transform: QuaRot's values, orthogonal, its own inverse."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import scipy.linalg
import torch
from hypothesis import given

from laconic.numerics import hadamard
from tests.quant import golden

GOLDEN = golden.load("hadamard")
CASES = [case for case in GOLDEN.cases if "output" in case["arrays"]]


def pairs(case: dict[str, Any]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    return list(zip(case["args"]["sizes"], GOLDEN.of(case, "input"), GOLDEN.of(case, "output"), strict=True))


@pytest.mark.vectors
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    """Powers of two against the recorded values; other sizes need base matrices and are refused by name."""
    for n, x, want in pairs(case):
        if n & (n - 1):
            with pytest.raises(ValueError, match=f"length {n} is not a power of two"):
                hadamard(x)
        else:
            GOLDEN.check("output", hadamard(x), want)


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


def test_the_input_is_left_alone_and_need_not_be_contiguous() -> None:
    x = torch.randn(8, 5)
    kept = x.clone()
    torch.testing.assert_close(hadamard(x.T), hadamard(x.T.contiguous()))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("n", [0, 3, 12])
def test_other_lengths_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"length {n} is not a power of two"):
        hadamard(torch.zeros(2, n))
