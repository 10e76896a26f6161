"""Scales in 8 bits: the recorded values of bitsandbytes, the map written out, short runs, what is refused."""

from __future__ import annotations

import pytest
import torch

from laconic.numerics import NotFinite, dynamic_map, nest
from tests.quant import golden

GOLDEN = golden.load("formats")
CASES = [case for case in GOLDEN.cases if case["args"].get("double_quant")]


@pytest.mark.vectors
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_vectors(case: dict) -> None:
    (absmax,) = GOLDEN.of(case, "absmax")
    done = nest(absmax, case["args"]["nested_blocksize"], grid=65535)
    GOLDEN.check("absmax_code", done.codes, GOLDEN.of(case, "absmax_code")[0].view(-1))
    GOLDEN.check("offset", done.offset, GOLDEN.of(case, "offset")[0])
    GOLDEN.check("nested_absmax", done.absmax, GOLDEN.of(case, "nested_absmax")[0])
    GOLDEN.check("nested_code", dynamic_map(), GOLDEN.of(case, "nested_code")[0])


def test_the_map() -> None:
    levels = dynamic_map()
    assert len(levels) == 256 and bool((levels.diff() > 0).all()) and float(levels[127]) == 0 and float(levels[-1]) == 1
    torch.testing.assert_close(levels[:127], -levels[128:-1].flip(0))
    top = levels[levels > 0.1][:-1]
    assert len(top) == 64
    torch.testing.assert_close(top.diff(), torch.full((63,), 0.9 / 64), rtol=1e-4, atol=0)
    assert len(dynamic_map(signed=False).unique()) == 256
    assert len(dynamic_map(bits=4, exponents=2)) == 16


@pytest.mark.parametrize("n", [0, 1, 255, 256, 300])
def test_the_nearest_level(n: int) -> None:
    scale = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5
    done = nest(scale)
    assert done.codes.shape == (n,) and done.nbytes == n + 4 * -(-n // 256) + 4
    back = done.scales()
    for begin in range(0, n, 256):
        part = slice(begin, begin + 256)
        relative = (scale[part] - scale.mean()) / done.absmax[begin // 256].clamp(min=1e-30)
        best = (relative[:, None] - dynamic_map()).abs().amin(1) * done.absmax[begin // 256]
        torch.testing.assert_close((back[part] - scale[part]).abs(), best, rtol=0, atol=1e-6)


def test_levels_by_way_of_a_grid() -> None:
    scale = torch.rand(4096, generator=torch.Generator().manual_seed(7))
    plain, grid = nest(scale).codes.int(), nest(scale, grid=65535).codes.int()
    assert 0 < int((plain != grid).sum()) < 20 and int((plain - grid).abs().max()) == 1
    assert nest(torch.full((5,), 3.0), grid=65535).codes.tolist() == [0] * 5


def test_constant_scales_come_back() -> None:
    torch.testing.assert_close(nest(torch.full((5, 2), 0.7)).scales(), torch.full((10,), 0.7))


def test_refusals() -> None:
    with pytest.raises(NotFinite, match="w: 1 nan"):
        nest(torch.tensor([torch.nan]), name="w")
    with pytest.raises(ValueError, match="w: .* at least one"):
        nest(torch.ones(3), 0, name="w")
    with pytest.raises(ValueError, match="fewer than bits"):
        dynamic_map(bits=4, exponents=4)
