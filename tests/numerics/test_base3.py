"""The base-3 layout: every byte, whatever the length of a row, and what is refused."""

from __future__ import annotations

import math
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from laconic.numerics import Binary, Levels, Ternary, layout_of, pack_base3, pack_codes, unpack_base3, unpack_codes


def test_every_byte() -> None:
    """Digits, the first one leading, as a fraction of 256 rounded up; each differs from all others."""
    codes = torch.tensor(list(product((0, 1, 2), repeat=5)), dtype=torch.uint8)
    words = pack_base3(codes)
    rows = words.view(torch.uint8).tolist()
    for row, digits in zip(rows, codes.tolist(), strict=True):
        value = int("".join(map(str, digits)), 3)
        assert row == [math.ceil(256 * value / 243), 128, 128, 128]
    assert len({row[0] for row in rows}) == 243
    assert torch.equal(unpack_base3(words, 5), codes)


@given(st.integers(0, 4), st.integers(0, 90), st.integers(0, 99))
def test_round_trip(rows: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (rows, k), generator=generator, dtype=torch.uint8)
    words = pack_base3(codes)
    assert words.shape == (rows, Ternary().words(k)) and words.dtype == torch.int32
    assert torch.equal(unpack_base3(words, k), codes)
    assert torch.equal(pack_base3(codes.T.contiguous().T), words)
    # What stands behind the end of a row is zeros: code 1.
    assert bool((unpack_base3(words, Ternary().words(k) * 20)[:, k:] == 1).all())


def test_a_word_that_is_known() -> None:
    """t = +1 -1 0 +1 +1 | 0: v = 2 * 81 + 0 + 1 * 9 + 2 * 3 + 2 = 179, byte ceil(256 * 179 / 243) = 189."""
    codes = torch.tensor([[2, 0, 1, 2, 2, 1]], dtype=torch.uint8)
    assert pack_base3(codes).view(torch.uint8).tolist() == [[189, 128, 128, 128]]


def test_views() -> None:
    words = pack_base3(torch.full((6, 45), 2, dtype=torch.uint8))
    assert bool((unpack_base3(words[::2], 45) == 2).all())
    assert bool((unpack_base3(words.T.contiguous().T, 45) == 2).all())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="code 3 is none of 0, 1, 2"):
        pack_base3(torch.tensor([[3]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack_base3(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(rows, 2\)"):
        unpack_base3(torch.zeros((2, 1), dtype=torch.int32), 21)
    with pytest.raises(ValueError, match="int64"):
        unpack_base3(torch.zeros((2, 2), dtype=torch.int64), 21)


@pytest.mark.parametrize("element", [Levels("nf4"), Levels("fp4"), Binary()], ids=str)
def test_all_others_are_dense(element: Levels | Binary) -> None:
    codes = torch.randint(0, element.levels, (3, 37), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = pack_codes(codes, element)
    assert layout_of(element).name == "dense" and words.shape == (3, element.words(37))
    assert torch.equal(unpack_codes(words, element, 37), codes)
    first = sum(int(code) << element.bits * i for i, code in enumerate(codes[0, : 32 // element.bits].tolist()))
    assert int(words[0, 0]) & 0xFFFFFFFF == first


def test_ternary_layout() -> None:
    assert layout_of(Ternary()).name == "base3" and layout_of(Ternary()).shape(3, 41, 2) == (3, 3)
    assert [Ternary().words(k) for k in (0, 1, 20, 21, 4096)] == [0, 1, 1, 2, 205]
