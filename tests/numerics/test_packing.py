"""Packing: the bytes of compressed-tensors and GPTQ, and back, for every width."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from laconic.numerics import pack, unpack, words_per_row
from tests.quant import golden

GOLDEN = golden.load("formats")
CASES = [case for case in GOLDEN.cases if case["what"] == "pack"]


def codes_of(bits: int, rows: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, k), generator=generator, dtype=torch.uint8)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 200), st.integers(0, 99))
def test_round_trip(bits: int, rows: int, k: int, seed: int) -> None:
    codes = codes_of(bits, rows, k, seed)
    words = pack(codes, bits)
    assert words.shape == (rows, words_per_row(k, bits)) and words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, k), codes)
    assert torch.equal(pack(codes.T.contiguous().T, bits), words)


@given(st.integers(1, 8), st.integers(1, 70))
def test_it_is_one_stream_of_bits(bits: int, k: int) -> None:
    """Against Python's integers: code i stands at bit i * bits, and what follows the last is zero."""
    codes = codes_of(bits, 2, k)
    for row, words in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in words] == [
            stream >> 32 * i & 0xFFFFFFFF for i in range(len(words))
        ]


@pytest.mark.parametrize("bits", range(1, 9))
def test_extremes(bits: int) -> None:
    for value in (0, (1 << bits) - 1):
        codes = torch.full((3, 37), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 37), codes)


@pytest.mark.vectors
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["args"]["format"] == "pack-quantized"], ids=lambda c: c["name"]
)
def test_compressed_tensors_vectors(case: dict[str, Any]) -> None:
    bits = case["args"]["bits"]
    (signed,), (packed,), (packed0,) = (GOLDEN.of(case, role) for role in ("codes", "packed", "packed_dim0"))
    codes = (signed.int() + case["args"]["stored_offset"]).to(torch.uint8)
    GOLDEN.check("packed", pack(codes, bits), packed)
    GOLDEN.check("codes", unpack(packed.int(), bits, codes.shape[1]), codes)
    GOLDEN.check("packed_dim0", pack(codes.T.contiguous(), bits).T, packed0)


@pytest.mark.vectors
@pytest.mark.parametrize("case", [c for c in CASES if c["args"]["format"] == "gptq"], ids=lambda c: c["name"])
def test_gptq_vectors(case: dict[str, Any]) -> None:
    (codes,), (packed,) = GOLDEN.of(case, "codes"), GOLDEN.of(case, "packed")
    GOLDEN.check("packed", pack(codes.to(torch.uint8), case["args"]["bits"]).T, packed)


@pytest.mark.vectors
def test_every_packing_case_is_tested() -> None:
    assert {case["args"]["format"] for case in CASES} == {"pack-quantized", "gptq"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(torch.tensor([[7, 8]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(2, 3, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"\(rows, 2\)"):
        unpack(torch.zeros((2, 1), dtype=torch.int32), 4, 9)
    with pytest.raises(ValueError, match="int32"):
        unpack(torch.zeros((2, 2), dtype=torch.int64), 4, 9)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_do_not_alias_words(bits: int) -> None:
    words = pack(codes_of(bits, 2, 32), bits)
    kept = words.clone()
    unpack(words, bits, 32).zero_()
    assert torch.equal(words, kept)
