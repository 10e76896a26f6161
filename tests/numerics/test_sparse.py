"""Sparse formats: round trips, the bytes, what is kept, and what is refused by name."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from laconic.numerics import BlockSparse, NotFinite, Sparse24, mask_24, mask_blocks, sparse_from

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def noise(rows: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a value comes back as, element by element."""
    if dtype != torch.int8:
        return x.to(dtype).float()
    scale = x.abs().amax(1, keepdim=True) / 127 if x.shape[1] else torch.ones(len(x), 1)
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round() * scale


def thinned(rows: int, k: int, seed: int) -> Tensor:
    """A 2:4 matrix, of whose fours some have one element or none."""
    x = noise(rows, k, seed)
    return torch.where(x.abs() < 0.5, 0.0, x) * mask_24(x)


# --- two of four ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 20), st.integers(0, 99), st.sampled_from(DTYPES))
def test_24_round_trip(rows: int, fours: int, seed: int, dtype: torch.dtype) -> None:
    x = thinned(rows, 4 * fours, seed)
    sparse = Sparse24.pack(x, dtype)
    assert sparse.shape == (rows, 4 * fours) and sparse.values.dtype == dtype
    assert sparse.positions.shape == (rows, -(-4 * fours // 32)) and sparse.positions.dtype == torch.int32
    torch.testing.assert_close(sparse.unpack(), stored(x, dtype), rtol=1e-6, atol=1e-6)
    sparse.check()
    assert sparse.nbytes == sum(t.nbytes for t in (sparse.values, sparse.positions, sparse.scale) if t is not None)
    again = Sparse24.pack(sparse.unpack(), dtype)
    torch.testing.assert_close(again.unpack(), sparse.unpack(), rtol=1e-6, atol=1e-6)


def test_24_bytes() -> None:
    """Element by element, in the plainest way: bit 2 i of a row's words says where value i stands."""
    x = thinned(3, 52, 1)
    sparse = Sparse24.pack(x)
    for r in range(3):
        stream = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(sparse.positions[r].tolist()))
        row = torch.zeros(52)
        for i, value in enumerate(sparse.values[r].tolist()):
            row[i // 2 * 4 + (stream >> 2 * i & 3)] += value
        assert torch.equal(row, x[r]) and stream >> 2 * 26 == 0


def test_24_fills_up_with_the_first_free_places() -> None:
    x = torch.tensor([[0.0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 6, 0, 7, 8, 0]])
    sparse = Sparse24.pack(x)
    assert sparse.indices().tolist() == [[0, 1, 0, 1, 0, 3, 1, 2]]
    assert sparse.values.tolist() == [[0, 0, 5, 0, 0, 6, 7, 8]]


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 9), st.integers(0, 99))
def test_mask_24_keeps_most_of_the_energy(rows: int, fours: int, seed: int) -> None:
    x = noise(rows, 4 * fours, seed)
    mask = mask_24(x)
    assert bool((mask.view(rows, fours, 4).sum(-1) == 2).all())
    best = x.view(rows, fours, 4).square().sort(-1).values[..., 2:].sum(-1)
    torch.testing.assert_close((x * mask).view(rows, fours, 4).square().sum(-1), best)


def test_mask_24_of_equals_is_the_first() -> None:
    assert mask_24(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


def test_24_refusals() -> None:
    with pytest.raises(ValueError, match=r"fc\.weight: row 1 has 3 nonzero elements from column 4"):
        Sparse24.pack(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1, 1]]), name="fc.weight")
    with pytest.raises(ValueError, match=r"fours of elements, got shape \(2, 6\)"):
        Sparse24.pack(torch.zeros(2, 6))
    with pytest.raises(NotFinite, match="fc: 1 nan"):
        Sparse24.pack(torch.tensor([[torch.nan, 0, 0, 0]]), name="fc")
    with pytest.raises(ValueError, match="does not fit in torch.bfloat16"):
        Sparse24.pack(torch.tensor([[3.4028e38, 0, 0, 0]]), torch.bfloat16)
    with pytest.raises(ValueError, match="its scale is 0"):
        Sparse24.pack(torch.tensor([[1e-45, 0, 0, 0]]), torch.int8)
    with pytest.raises(ValueError, match="not as torch.float16"):
        Sparse24.pack(torch.zeros(2, 4), torch.float16)
    sparse = Sparse24.pack(torch.ones(2, 8) * torch.tensor([1.0, 0, 0, 1] * 2))
    with pytest.raises(ValueError, match="positions: expected torch.int32"):
        dataclasses.replace(sparse, positions=sparse.positions.long())
    with pytest.raises(ValueError, match="a scale belongs to int8"):
        dataclasses.replace(sparse, scale=torch.ones(2, 1))
    with pytest.raises(ValueError, match="no pairs"):
        Sparse24(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="positions do not rise in row 0, columns 0 to 3"):
        dataclasses.replace(sparse, positions=torch.zeros_like(sparse.positions)).check()
    with pytest.raises(NotFinite, match="fc: "):
        dataclasses.replace(sparse, values=sparse.values * torch.inf).check("fc")


# --- blocks -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 6), st.sampled_from([(1, 1), (1, 16), (4, 16), (3, 2)]), st.floats(0, 1),
    st.integers(0, 99), st.sampled_from(DTYPES),
)  # fmt: skip
def test_blocks_round_trip(
    down: int, across: int, block: tuple[int, int], kept: float, seed: int, dtype: torch.dtype
) -> None:
    x = noise(down * block[0], across * block[1], seed)
    mask = mask_blocks(x, block, kept)
    x = x * mask
    sparse = BlockSparse.pack(x, block, dtype)
    assert sparse.shape == x.shape and sparse.block == block and sparse.values.dtype == dtype
    assert len(sparse.values) == round(kept * down * across) == len(sparse.columns)
    torch.testing.assert_close(sparse.unpack(), stored(x, dtype), rtol=1e-6, atol=1e-6)
    sparse.check()
    assert sparse.density == pytest.approx(float(mask.float().mean()) if x.numel() else 0.0)


def test_blocks_in_the_plainest_way() -> None:
    x = noise(12, 40) * mask_blocks(noise(12, 40), (4, 8), 0.5)
    sparse = BlockSparse.pack(x, (4, 8))
    whole = torch.zeros(12, 40)
    for b in range(3):
        for n in range(int(sparse.starts[b]), int(sparse.starts[b + 1])):
            j = int(sparse.columns[n])
            whole[4 * b : 4 * b + 4, 8 * j : 8 * j + 8] = sparse.values[n]
    assert torch.equal(whole, x)
    assert sparse.nbytes == len(sparse.columns) * (4 * 32 + 4) + 4 * 4


def test_mask_blocks_keeps_the_largest() -> None:
    x = torch.tensor([[1.0, 1, 3, 0], [2, 2, 0, 0]])
    assert mask_blocks(x, (1, 2), 0.5).tolist() == [[False, False, True, True], [True, True, False, False]]
    assert not mask_blocks(x, (1, 2), 0.0).any() and mask_blocks(x, (2, 2), 1.0).all()


def test_block_refusals() -> None:
    with pytest.raises(ValueError, match="fc: blocks of 4 x 16 do not divide"):
        BlockSparse.pack(torch.zeros(8, 24), (4, 16), name="fc")
    with pytest.raises(NotFinite, match="fc: 0 nan and 1 inf"):
        BlockSparse.pack(torch.tensor([[torch.inf, 0]]), (1, 2), name="fc")
    with pytest.raises(ValueError, match="a share in"):
        mask_blocks(torch.zeros(2, 2), (1, 1), 1.5)
    sparse = BlockSparse.pack(torch.ones(4, 8), (2, 4))
    for change, match in (
        ({"columns": torch.tensor([0, 2, 0, 1], dtype=torch.int32)}, "outside of 0 to 1"),
        ({"columns": torch.tensor([0, -1, 0, 1], dtype=torch.int32)}, "outside of 0 to 1"),
        ({"columns": torch.tensor([1, 0, 0, 1], dtype=torch.int32)}, "do not rise in block row 0"),
        ({"starts": torch.tensor([0, 3, 2], dtype=torch.int32)}, "starts must rise from 0 to 4"),
        ({"starts": torch.tensor([1, 2, 4], dtype=torch.int32)}, "starts must rise from 0 to 4"),
        ({"starts": torch.tensor([0, 5, 4], dtype=torch.int32)}, "starts must rise from 0 to 4"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(sparse, **change).check()
        if "do not rise" not in match:
            with pytest.raises(ValueError, match=match):
                dataclasses.replace(sparse, **change).unpack()
    with pytest.raises(ValueError, match="do not divide rows of 7"):
        dataclasses.replace(sparse, k=7)
    with pytest.raises(ValueError, match="columns: expected torch.int32"):
        dataclasses.replace(sparse, columns=sparse.columns[:2])


def test_from_tensors() -> None:
    two, some = Sparse24.pack(thinned(3, 16, 0)), BlockSparse.pack(noise(4, 16), (2, 8))
    assert torch.equal(sparse_from(two.values, two.positions, None, None, "2:4", 16).unpack(), two.unpack())
    again = sparse_from(some.values, some.columns, some.starts, None, "block2x8", 16)
    assert torch.equal(again.unpack(), some.unpack())
    for format, starts, match in (
        ("2:4", some.starts, "2:4"),
        ("block2x8", None, "have starts"),
        ("block4x8", some.starts, "blocks of 2 x 8"),
        ("block2x", some.starts, "not known"),
        ("csr", some.starts, "not known"),
    ):
        with pytest.raises(ValueError, match=match):
            values, index = (two.values, two.positions) if format == "2:4" else (some.values, some.columns)
            sparse_from(values, index, starts, None, format, 16)
    with pytest.raises(ValueError, match="does not take 20 columns"):
        sparse_from(two.values, two.positions, None, None, "2:4", 20)
