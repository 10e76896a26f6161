"""The affine map: bounds, extremes, what is exact, and what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from laconic.numerics import (
    Int,
    NotFinite,
    Scale,
    ScaleOutOfRange,
    Scheme,
    affine,
    affine_params,
    dequantize,
    fake_quantize,
    quantize,
)

SHARES = [("tensor", None), ("channel", None), ("token", None), ("group", 4), ("group", 7), ("group", 64)]
BITS = st.integers(2, 8)
ZEROS = st.sampled_from(["none", "int", "real"])
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(rows, k, generator=generator) ** draw(st.sampled_from([1, 3]))
    x = x * draw(st.sampled_from([1e-2, 1.0, 30.0])) + draw(st.sampled_from([0.0, 0.5, -2.0]))
    return torch.where(x.abs() < 1e-3, 0.0, x)  # so that every scale fits in float16


def spread(scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scale and zero of every element, in the plainest way."""
    rows, k = shape
    width = {"tensor": k, "group": scheme.scale.group or k}.get(scheme.scale.granularity, k)
    group = torch.arange(k) // width
    half = torch.full_like(scale, scheme.element.levels // 2, dtype=torch.float32)
    z = half if zero is None else zero.float()
    return scale.float().expand(rows, -1)[:, group], z.expand(rows, -1)[:, group]


# --- rounding -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(matrices(), BITS, st.sampled_from(SHARES), DTYPES, ZEROS)
def test_codes_are_the_nearest(x: Tensor, bits: int, share: tuple, dtype: str, zero: str) -> None:
    scheme = Scheme(Int(bits), Scale(*share, dtype), zero)
    scale, z = affine_params(x, scheme)
    codes = quantize(x, scale, z, scheme)
    got = dequantize(codes, scale, z, scheme)
    s, offset = spread(scale, z, scheme, tuple(x.shape))
    levels = torch.arange(scheme.element.levels, dtype=torch.float32)
    grid = s[..., None] * (levels - offset[..., None])
    nearest = (grid - x[..., None]).abs().amin(-1)
    size = x.abs().amax() + grid.abs().amax()
    assert bool(((got - x).abs() <= nearest + 1e-5 * size).all())
    assert int(codes.max()) < scheme.element.levels
    # Inside the grid's range the error is at most half a step; outside, what is cut off.
    low, high = grid.amin(-1), grid.amax(-1)
    bound = s / 2 + (low - x).clamp(min=0) + (x - high).clamp(min=0)
    assert bool(((got - x).abs() <= bound + 1e-5 * size).all())


@settings(deadline=None)
@given(matrices(), BITS, st.sampled_from(SHARES), ZEROS)
def test_minmax_covers_the_range(x: Tensor, bits: int, share: tuple, zero: str) -> None:
    """With min-max scales kept in float32 only rounding an integer zero point cuts off: half a step."""
    scheme = Scheme(Int(bits), Scale(*share), zero)
    scale, z = affine_params(x, scheme)
    s, _ = spread(scale, z, scheme, tuple(x.shape))
    error = (fake_quantize(x, scheme) - x).abs()
    assert bool((error <= (1.0 if zero == "int" else 0.5) * s * (1 + 1e-4) + 1e-6).all())


@settings(deadline=None)
@given(matrices(), BITS, st.sampled_from(SHARES), DTYPES, st.sampled_from(["none", "int"]))
def test_zero_is_exact(x: Tensor, bits: int, share: tuple, dtype: str, zero: str) -> None:
    scheme = Scheme(Int(bits), Scale(*share, dtype), zero)
    x[:, ::2] = 0
    assert bool((fake_quantize(x, scheme)[:, ::2] == 0).all())


@settings(deadline=None)
@given(st.sampled_from(SHARES), BITS, DTYPES, ZEROS, st.sampled_from(["minmax", "percentile", "mse"]))
def test_all_zero_groups(share: tuple, bits: int, dtype: str, zero: str, rule: str) -> None:
    scheme = Scheme(Int(bits), Scale(*share, dtype, rule), zero)
    x = torch.zeros(3, 10)
    scale, _ = affine_params(x, scheme)
    assert bool((scale == 1).all())
    assert torch.equal(fake_quantize(x, scheme), x)


def test_the_conventions_by_hand() -> None:
    x = torch.tensor([[-7.5, 0.0, 3.0, 7.5]])
    symmetric = Scheme(Int(4))
    scale, zero = affine_params(x, symmetric)
    assert (scale.tolist(), zero) == ([[1.0]], None)
    assert quantize(x, scale, zero, symmetric).tolist() == [[0, 8, 11, 15]]  # -7.5 to even: -8; 7.5: clamped
    positive = torch.tensor([[1.0, 2.0, 3.0]])
    scale, zero = affine_params(positive, Scheme(Int(2), zero="int"))
    assert (scale.tolist(), zero.tolist(), zero.dtype) == ([[1.0]], [[0]], torch.uint8)  # 0 joins the range
    scale, zero = affine_params(positive, Scheme(Int(2), zero="real"))
    assert scale.item() == pytest.approx(2 / 3) and zero.item() == pytest.approx(-1.5)  # and here it does not
    constant = torch.full((1, 3), 5.25)
    assert torch.equal(fake_quantize(constant, Scheme(Int(2), zero="real")), constant)


def test_the_zero_point_is_added_after_rounding() -> None:
    scheme = Scheme(Int(4), zero="int")
    scale, zero = torch.tensor([[1.0]]), torch.tensor([[3]], dtype=torch.uint8)
    assert quantize(torch.tensor([[0.5, 1.5, -0.5]]), scale, zero, scheme).tolist() == [[3, 5, 3]]


def test_scales_are_rounded_before_codes_are_computed() -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(Int(8), Scale(dtype="bfloat16"), "int")
    scale, zero = affine_params(x, scheme)
    assert scale.dtype == torch.bfloat16
    full = (x.clamp(min=0).amax(1) - x.clamp(max=0).amin(1)) / 255
    assert torch.equal(scale[:, 0], full.bfloat16())
    want = (x / scale.float()).round().add(zero.float()).clamp(0, 255)
    assert torch.equal(quantize(x, scale, zero, scheme).float(), want)


def test_a_short_last_group_is_a_group_like_any_other() -> None:
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    for rule in ("minmax", "percentile", "mse"):
        scheme = Scheme(Int(3), Scale("group", 8, rule=rule, percentile=90), "int")
        row = Scheme(Int(3), Scale(rule=rule, percentile=90), "int")
        scale, zero = affine_params(x, scheme)
        for g, part in enumerate((x[:, :8], x[:, 8:])):
            s, z = affine_params(part, row)
            assert torch.equal(scale[:, g : g + 1], s) and torch.equal(zero[:, g : g + 1], z)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
def test_odd_shapes(shape: tuple[int, int], share: tuple, rule: str) -> None:
    scheme = Scheme(Int(4), Scale(*share, "float16", rule), "int")
    x = torch.ones(shape)
    torch.testing.assert_close(fake_quantize(x, scheme), x, rtol=1e-3, atol=0)
    assert affine_params(x, scheme)[0].shape == scheme.tensors(*shape)["scale"][1]


# --- scale rules --------------------------------------------------------------------------------------


def test_percentile_is_the_interpolated_quantile() -> None:
    x = torch.randn(3, 101, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(Int(8), Scale(rule="percentile", percentile=97.3), "int")
    low, high = torch.quantile(x, 0.027, dim=1), torch.quantile(x, 0.973, dim=1)
    torch.testing.assert_close(affine_params(x, scheme)[0][:, 0], (high - low) / 255)


@settings(deadline=None)
@given(matrices(), st.integers(2, 4), st.sampled_from(SHARES), ZEROS)
def test_mse_is_never_worse_than_minmax(x: Tensor, bits: int, share: tuple, zero: str) -> None:
    plain = Scheme(Int(bits), Scale(*share), zero)
    errors = [
        (fake_quantize(x, scheme) - x).abs().pow(affine.MSE_NORM).sum().item()
        for scheme in (plain.with_(rule="mse"), plain)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-9


def test_no_group_depends_on_its_neighbours() -> None:
    """A group whose shrunken scales underflow must not end the search of the others."""
    scheme = Scheme(Int(2), Scale("channel", dtype="float16", rule="mse"), "int")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-7 / x[1].abs().max()
    alone = affine_params(x[:1], scheme)[0]
    assert torch.equal(affine_params(x, scheme)[0][:1], alone)


# --- stochastic rounding ------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["none", "int", "real"])
def test_stochastic_rounding_is_unbiased_and_seeded(zero: str) -> None:
    scheme = Scheme(Int(4), zero=zero, rounding="stochastic")
    x = torch.linspace(-1, 1.3, 8)[None].repeat(4000, 1)
    scale, z = affine_params(x, scheme)

    def drawn(seed: int) -> Tensor:
        return dequantize(quantize(x, scale, z, scheme, torch.Generator().manual_seed(seed)), scale, z, scheme)

    got = drawn(0)
    step = float(scale[0, 0])
    assert torch.equal(got, drawn(0)) and not torch.equal(got, drawn(1))
    assert (got - x).abs().max() <= step * 1.001
    inside = x[0].abs() < 1  # the ends of the range cannot be rounded outwards
    deviation = (got.mean(0) - x[0]).abs()[inside]
    assert deviation.max() < 5 * step * 0.5 / 4000**0.5


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inf_and_nan_are_refused_by_name(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 4, dtype=dtype)
    x[0, 1], x[2, 3], x[1, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(NotFinite, match=r"layers\.0\.weight: 1 nan and 2 inf among 12 values"):
        affine_params(x, Scheme(), "layers.0.weight")


def test_large_finite_values_are_no_inf() -> None:
    x = torch.full((2, 4), 1e38)  # their sum overflows
    assert torch.allclose(fake_quantize(x, Scheme(Int(8))), x, rtol=1e-2)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_scales_that_do_not_fit_are_refused_by_name(size: float) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * size
    with pytest.raises(ScaleOutOfRange, match=r"head\.weight: scales from .* do not fit in float16"):
        affine_params(x, Scheme(Int(4), Scale(dtype="float16")), "head.weight")
    assert torch.isfinite(fake_quantize(x, Scheme(Int(4)))).all()
    with pytest.raises(ScaleOutOfRange, match="do not fit in float32"):
        affine_params(torch.tensor([[-3e38, 3e38]]), Scheme(Int(4)))


def test_a_real_zero_point_that_does_not_fit_is_refused_by_name() -> None:
    x = 1000 + torch.rand(1, 8, generator=torch.Generator().manual_seed(0)) * 1e-2
    with pytest.raises(ScaleOutOfRange, match=r"gate: a real zero point does not fit in float16"):
        affine_params(x, Scheme(Int(8), Scale(dtype="float16"), "real"), "gate")


@settings(deadline=None)
@given(matrices(), st.sampled_from(SHARES), ZEROS)
def test_chunks_change_nothing(x: Tensor, share: tuple, zero: str) -> None:
    scheme = Scheme(Int(3), Scale(*share), zero)
    whole = fake_quantize(x, scheme)
    kept, affine.CHUNK = affine.CHUNK, 8
    try:
        assert torch.equal(fake_quantize(x, scheme), whole)
    finally:
        affine.CHUNK = kept


@settings(deadline=None)
@given(
    matrices(),
    st.integers(2, 4),
    st.sampled_from(SHARES),
    DTYPES,
    ZEROS,
    st.sampled_from([1.0, 2.0, 2.4, 3.5]),
    st.booleans(),
)
def test_mse_search_is_that_of_every_range(
    x: Tensor, bits: int, share: tuple, dtype: str, zero: str, norm: float, split: bool
) -> None:
    """Leaving out powers that cannot be the least changes nothing: against all of them, one range after the other."""
    scheme = Scheme(Int(bits), Scale(*share, dtype), zero)
    groups = affine.grouped(x, scheme)
    if share[0] == "group" and x.shape[1] % share[1]:
        return  # short groups are searched apart
    low, high = groups.amin(-1), groups.amax(-1)
    flat = groups.reshape(-1, groups.shape[-1])
    per_row = scheme.with_(granularity="channel", group=None)
    errors = []
    for i in range(80):
        p = torch.tensor(1 - i / 100)
        _, s, z = affine._params(p * low.reshape(-1, 1), p * high.reshape(-1, 1), scheme)
        e = dequantize(quantize(flat, s, z, per_row), s, z, per_row) - flat
        errors.append(torch.where((s != 0)[:, 0], e.abs().double().pow(norm).sum(1), torch.inf))
    least = torch.stack(errors).amin(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "MSE_NORM", norm)
        patch.setattr(affine, "SEARCH", 8 if split else affine.SEARCH)
        s, z = affine_params(x, scheme.with_(rule="mse"))
    s, z = s.reshape(-1, 1), None if z is None else z.reshape(-1, 1)
    e = dequantize(quantize(flat, s, z, per_row), s, z, per_row) - flat
    got = e.abs().double().pow(norm).sum(1)
    assert bool((got <= least * (1 + 1e-3) + 1e-12).all())
