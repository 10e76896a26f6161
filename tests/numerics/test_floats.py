"""Small floats: every code and back, torch's own casts, rounding at ties, saturation, subnormals."""

from __future__ import annotations

import pytest
import torch

from laconic.numerics import FLOATS, float_codes, float_values, mini_float, round_float

NAMES = sorted(FLOATS)
LIMITS = {
    "e2m1": (6.0, 0.5),
    "e2m3": (7.5, 0.125),
    "e3m2": (28.0, 2**-4),
    "e4m3": (448.0, 2**-9),
    "e5m2": (57344.0, 2**-16),
}


def finite(name: str) -> torch.Tensor:
    """All numbers of a float, rising."""
    element = mini_float(name)
    values = float_values(torch.arange(1 << element.bits, dtype=torch.uint8), element)
    kept = values[values.isfinite()].unique()
    return kept[kept.abs() <= element.largest]


@pytest.mark.parametrize("name", NAMES)
def test_every_code_comes_back(name: str) -> None:
    element = mini_float(name)
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = float_values(codes, element)
    usable = values.isfinite() & (values.abs() <= element.largest)
    assert torch.equal(float_codes(values[usable], element), codes[usable])
    assert torch.equal(round_float(values[usable], element), values[usable])


@pytest.mark.parametrize(("name", "limits"), LIMITS.items())
def test_largest_and_least(name: str, limits: tuple[float, float]) -> None:
    values = finite(name)
    assert (float(values.max()), float(values[values > 0].min())) == limits
    assert 2.0 ** mini_float(name).emax <= limits[0] < 2.0 ** (mini_float(name).emax + 1)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_torch_casts_are_the_same(name: str, dtype: torch.dtype) -> None:
    element = mini_float(name)
    spread = torch.logspace(-12, 5, 20000, dtype=torch.float64)
    x = (torch.randn(20000, generator=torch.Generator().manual_seed(0)) * spread).float()
    x = x.clamp(-element.largest, element.largest)
    y, want = round_float(x, element), x.to(dtype)
    assert torch.equal(y, want.float()) and torch.equal(float_codes(y, element), want.view(torch.uint8))
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(float_values(codes, element), codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["even", "away", "zero"])
def test_rounding_against_a_search(name: str, rounding: str) -> None:
    element, values = mini_float(name), finite(name).double()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, torch.linspace(-1.2, 1.2, 999, dtype=torch.float64) * element.largest])
    got = round_float(x, element, rounding)
    for v, y in zip(x.tolist(), got.tolist(), strict=True):
        held = max(-element.largest, min(element.largest, v))
        distance = (values - held).abs()
        nearest = values[distance == distance.min()]
        if rounding == "zero":
            inside = values[values.abs() <= abs(held)]
            want = inside[(inside - held).abs().argmin()].item()
        elif len(nearest) == 1:
            want = nearest.item()
        elif rounding == "away":
            want = max(nearest.tolist(), key=abs)
        else:
            power = int(torch.frexp(torch.tensor(abs(held), dtype=torch.float64)).exponent) - 1
            step = 2.0 ** ((max(element.emin, power) if element.exponent else 0) - element.mantissa)
            want = next(n for n in nearest.tolist() if round(n / step) % 2 == 0)
        assert y == want, (v, rounding)


def test_options() -> None:
    element = mini_float("e2m1")
    x = torch.tensor([0.3, 0.9, 7.0, -9.0, torch.inf, torch.nan])
    torch.testing.assert_close(round_float(x, element), torch.tensor([0.5, 1, 6, -6, 6, torch.nan]), equal_nan=True)
    wide = round_float(x, element, saturate=False)
    torch.testing.assert_close(
        wide, torch.tensor([0.5, 1, torch.inf, -torch.inf, torch.inf, torch.nan]), equal_nan=True
    )
    assert round_float(x[:2], element, subnormals=False).tolist() == [0.0, 0.0]
    assert round_float(torch.tensor([0.3], dtype=torch.bfloat16), element).dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(ValueError, match="float 'e9m9' is not known"):
        mini_float("e9m9")
    with pytest.raises(ValueError, match="one of even, away, zero"):
        round_float(torch.ones(1), mini_float("e2m1"), "up")
    with pytest.raises(ValueError, match="no number of e2m1"):
        float_codes(torch.tensor([0.3]), mini_float("e2m1"))
