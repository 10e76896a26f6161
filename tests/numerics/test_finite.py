"""Counting nan and inf: in every type, chunk and shape, and never where a mere sum overflows."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from laconic.numerics import NotFinite, check_finite, count_not_finite, finite

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPECIAL = {"nan": float("nan"), "+": float("inf"), "-": float("-inf"), "0": 0.0, "1": 1.0}


@given(st.lists(st.sampled_from(list(SPECIAL)), max_size=40), st.sampled_from(FLOATS), st.integers(1, 9))
def test_counts_in_chunks_of_any_size(kinds: list[str], dtype: torch.dtype, chunk: int) -> None:
    x = torch.tensor([SPECIAL[kind] for kind in kinds], dtype=dtype)
    kept, finite.CHUNK = finite.CHUNK, chunk
    try:
        assert count_not_finite(x) == (kinds.count("nan"), kinds.count("+") + kinds.count("-"))
    finally:
        finite.CHUNK = kept


def test_values_whose_sum_overflows_are_finite() -> None:
    assert count_not_finite(torch.full((3, 4), 1e38)) == (0, 0)
    assert count_not_finite(torch.full((3,), 1e300, dtype=torch.float64)) == (0, 0)
    assert count_not_finite(torch.full((3,), 60000.0, dtype=torch.float16)) == (0, 0)


def test_other_types_and_layouts() -> None:
    assert count_not_finite(torch.tensor([1, 2])) == (0, 0)
    assert count_not_finite(torch.zeros(0, 4)) == (0, 0)
    small = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    assert count_not_finite(small.to(torch.float8_e5m2)) == (1, 1)
    turned = torch.zeros(3, 5)
    turned[1, 2] = float("inf")
    assert count_not_finite(turned.t()) == (0, 1)
    assert count_not_finite(turned.requires_grad_()) == (0, 1)


def test_the_name_and_the_counts_are_said() -> None:
    check_finite(torch.ones(2), "w")
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    with pytest.raises(NotFinite, match=r"^head\.weight: 1 nan and 2 inf among 4 values$"):
        check_finite(x, "head.weight")
