"""Blocks of small floats: scales by rule, bytes and back, odd shapes, extreme values, what is refused."""

from __future__ import annotations

import pytest
import torch

from laconic.numerics import (
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    Blocks,
    Int,
    NotFinite,
    Scale,
    ScaleOutOfRange,
    Scheme,
    affine_params,
    dequantize,
    fake_quantize,
    quantize,
    quantize_blocks,
)

ALL = [FP8_E4M3, FP8_E5M2, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8, NVFP4]
ALL += [
    FP8_E4M3.with_(granularity="tensor"),
    FP8_E5M2.with_(granularity="group", group=24, dtype="float16"),
    MXFP4.with_(rule="ceil"),
    MXFP4.with_(group=5, rounding="away"),
    MXFP8_E4M3.with_(granularity="channel", group=None, rounding="zero"),
    NVFP4.with_(granularity="channel", group=None),
]


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(3, 64), (1, 1), (2, 37), (5, 16), (0, 8)])
def test_bytes_come_back(scheme: Scheme, rows: int, k: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k)) * 10
    done = quantize_blocks(x, scheme)
    stored = done.tensors()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == scheme.tensors(rows, k)
    assert sum(t.nbytes for t in stored.values()) == scheme.nbytes(rows, k)
    again = Blocks.of_tensors(stored, scheme, k)
    assert torch.equal(again.codes, done.codes) and torch.equal(again.dequantize(), done.dequantize())
    if rows:
        error = float((done.dequantize() - x).norm() / x.norm())
        assert error < {4: 0.2, 6: 0.1, 8: 0.1}[scheme.bits]
    assert Scheme.parse(str(scheme)) == scheme
    # The same by what all schemes go through.
    scale, zero = affine_params(x, scheme)
    codes = quantize(x, scale, zero, scheme)
    assert torch.equal(codes, done.codes) and torch.equal(dequantize(codes, scale, zero, scheme), done.dequantize())
    assert torch.equal(fake_quantize(x, scheme), done.dequantize())


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_zeros_and_extremes(scheme: Scheme) -> None:
    x = torch.zeros(3, 64)
    assert float(quantize_blocks(x, scheme).dequantize().abs().max()) == 0
    x[1] = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e-30
    x[2] = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 1e30
    if scheme.scale.dtype == "float16":
        with pytest.raises(ScaleOutOfRange, match="w: a scale is below what float16 holds"):
            quantize_blocks(x, scheme, name="w")
        return
    y = quantize_blocks(x, scheme).dequantize()
    assert bool(torch.isfinite(y).all()) and float(y[0].abs().max()) == 0
    if scheme.scale.granularity != "tensor":  # a row has its own scales
        assert float((y[2] - x[2]).double().norm() / x[2].double().norm()) < 0.2


def test_rules_of_powers_of_two() -> None:
    def power(amax: float, rule: str, scheme: Scheme = MXFP4) -> float:
        x = torch.zeros(1, 32)
        x[0, 7] = -amax
        return float(quantize_blocks(x, scheme.with_(rule=rule)).scale[0, 0])

    assert [power(a, "floor") for a in (4.0, 5.0, 6.0, 6.5, 7.9, 8.0)] == [1, 1, 1, 1, 1, 2]
    assert [power(a, "ct_round") for a in (4.0, 6.0, 6.9, 7.0, 7.9, 8.0)] == [1, 1, 1, 2, 2, 2]
    # From 1.75 times a power on, whatever the element is.
    assert [power(a, "ct_round", MXFP8_E4M3) for a in (256.0, 440.0, 447.9, 448.0, 500.0)] == [1, 1, 1, 2, 2]
    assert [power(a, "ceil") for a in (3.0, 3.01, 6.0, 6.01, 12.0, 12.5)] == [0.5, 1, 1, 2, 2, 4]
    assert power(448.0, "floor", MXFP8_E4M3) == 1 and power(256.0, "floor", MXFP8_E4M3) == 1
    assert power(2.0**-140, "floor") == 2.0**-127  # as low as a byte goes


def test_two_levels_written_out() -> None:
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(2)) * 3
    done = quantize_blocks(x, NVFP4)
    g = 448 * 6 / x.abs().max()
    torch.testing.assert_close(done.global_scale, g.view(1))
    amax = x.view(4, 3, 16).abs().amax(-1)
    scale = (g * amax / 6).to(torch.float8_e4m3fn).float()
    assert torch.equal(done.scale, scale)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    v = x * g / scale.repeat_interleave(16, 1)
    nearest = levels[(v.abs()[..., None] - levels).abs().argmin(-1)] * v.sign()
    assert torch.equal(done.values().abs(), nearest.abs())
    fused = quantize_blocks(x, NVFP4, largest=100.0)
    torch.testing.assert_close(fused.global_scale, torch.tensor([26.88]))


def test_options() -> None:
    x = torch.full((2, 32), 1e-40)
    x[1] = torch.linspace(-1, 1, 32)
    plain, flushed = (quantize_blocks(x, MXFP4, flush=flush).dequantize() for flush in (False, True))
    assert torch.equal(plain[1], flushed[1]) and float(flushed[0].abs().max()) == 0
    coarse = quantize_blocks(x[1:], MXFP4, subnormals=False).values()
    assert 0.5 not in coarse.abs() and 0.5 in quantize_blocks(x[1:], MXFP4).values().abs()


def test_stored_codes_lie_low_half_first() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([0.5, 6.0, -1.0, 0.0])
    first = quantize_blocks(x, MXFP4).tensors()["packed"].view(torch.uint8)[0, :2].tolist()
    assert first == [0x71, 0x0A]


def test_refusals() -> None:
    with pytest.raises(NotFinite, match="w: 1 nan"):
        quantize_blocks(torch.tensor([[torch.nan]]), MXFP4, name="w")
    with pytest.raises(ValueError, match="w: blocks are runs of a matrix"):
        quantize_blocks(torch.ones(3), MXFP4, name="w")
    with pytest.raises(ScaleOutOfRange, match="above 2\\^1"):
        quantize_blocks(torch.full((1, 32), 99.0), MXFP4, scale_bits=2)
    with pytest.raises(ScaleOutOfRange, match="too small for a global scale"):
        quantize_blocks(torch.full((1, 16), 1e-38), NVFP4)
    for wrong, match in (
        (dict(rule="minmax"), "go by floor"), (dict(granularity="tensor", group=None), "a single scale"),
        (dict(dtype="float32"), "go by floor"), (dict(rounding="up"), "one of nearest"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            MXFP4.with_(**wrong)
    with pytest.raises(ValueError, match="'e1m1' is not known"):
        Scheme.parse("v1/floate1m1/group32/e8m0/floor/znone/nearest")
    with pytest.raises(ValueError, match="scales in a byte belong to floats"):
        Scheme(Int(4), Scale("group", 16, "e4m3"))
    with pytest.raises(ValueError, match="blocks are of floats, not of int4"):
        quantize_blocks(torch.ones(2, 32), Scheme(Int(4)))
    stored = quantize_blocks(torch.ones(2, 32), MXFP4).tensors()
    with pytest.raises(ValueError, match="packed: .* got"):
        Blocks.of_tensors(stored, MXFP4, 64)
    stored["scale"][0] = 255
    with pytest.raises(ValueError, match="stands for nan"):
        Blocks.of_tensors(stored, MXFP4, 32)
