"""Level tables, ternary and binary numbers: nearest levels, best scales, extremes, and what is refused."""

from __future__ import annotations

from statistics import NormalDist

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from laconic.numerics import (
    Binary,
    Codebook,
    Int,
    Levels,
    NotFinite,
    Scale,
    ScaleOutOfRange,
    Scheme,
    Ternary,
    affine_params,
    dequantize,
    fake_quantize,
    k_means,
    pack_codes,
    params_from_range,
    quantize,
    unpack_codes,
)

SHARES = [("tensor", None), ("channel", None), ("group", 4), ("group", 7), ("group", 64)]
ELEMENTS = [Levels("nf4"), Levels("fp4"), Ternary(), Binary()]
KINDS = st.sampled_from([(element, rule) for element in ELEMENTS for rule in element.rules])
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
NF4 = Scheme(Levels("nf4"), Scale("group", group=64))
TERNARY = Scheme(Ternary(), Scale(rule="absmean"))
BINARY = Scheme(Binary(), Scale(rule="absmean"))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    x = x ** draw(st.sampled_from([1, 3])) * draw(st.sampled_from([1e-2, 1.0, 30.0]))
    return torch.where(x.abs() < 1e-3, 0.0, x)  # so that every scale fits in float16


def spread(scale: Tensor, scheme: Scheme, rows: int, k: int) -> Tensor:
    """The scale of every element, in the plainest way."""
    width = scheme.scale.group if scheme.scale.granularity == "group" else k
    return scale.float().expand(rows, -1)[:, torch.arange(k) // width]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_nf4_is_made_of_quantiles_of_a_normal_distribution() -> None:
    """From its definition: half of the levels on either side of an exact zero."""
    quantile, delta = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(delta + i * (0.5 - delta) / 8) for i in range(8)]
    negative = [-quantile(delta + i * (0.5 - delta) / 7) for i in range(7)]
    levels = sorted([*positive, 0.0, *negative])
    torch.testing.assert_close(
        torch.tensor(Levels("nf4").table), torch.tensor([level / max(levels) for level in levels]), atol=1e-6, rtol=0
    )


def test_fp4_codes_are_bit_patterns_of_e2m1() -> None:
    for code, level in enumerate(Levels("fp4").table):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert level == pytest.approx((-1) ** sign * value / 6, abs=1e-7)


@pytest.mark.parametrize("element", ELEMENTS[:3], ids=str)
def test_levels_are_their_own_codes(element: Levels | Ternary) -> None:
    """Whatever the scale, each level comes back as itself; of two codes for zero the first one is used."""
    x = 0.375 * torch.tensor([element.table])
    codes = quantize(x, torch.tensor([[0.375]]), None, Scheme(element))
    expected = list(range(element.levels))
    if element == Levels("fp4"):
        expected[8] = 0
    assert codes.tolist() == [expected]
    assert torch.equal(dequantize(codes, torch.tensor([[0.375]]), None, Scheme(element)), x)


def test_ties() -> None:
    one = torch.ones(1, 1)
    assert quantize(torch.tensor([[-1.5, -0.5, 0.5, 0.75, 1.5]]), one, None, TERNARY).tolist() == [[0, 1, 1, 2, 2]]
    assert quantize(torch.tensor([[0.0, -0.0, -1e-30]]), one, None, BINARY).tolist() == [[1, 1, 0]]
    middle = (Levels("nf4").table[8] + Levels("nf4").table[9]) / 2
    near = torch.tensor([[middle - 1e-4, middle + 1e-4, 2.0, -2.0]])
    assert quantize(near, one, None, NF4.with_(granularity="channel", group=None)).tolist() == [[8, 9, 15, 0]]


# --- rounding ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(matrices(), KINDS, st.sampled_from(SHARES), DTYPES)
def test_codes_are_the_nearest_and_survive_packing(x: Tensor, kind: tuple, share: tuple, dtype: str) -> None:
    element, rule = kind
    scheme = Scheme(element, Scale(*share, dtype, rule))
    scale, zero = affine_params(x, scheme)
    stored = scheme.tensors(*x.shape)
    assert zero is None and stored["scale"] == (scale.dtype, tuple(scale.shape)) and set(stored) == {"packed", "scale"}
    codes = quantize(x, scale, None, scheme)
    assert int(codes.max()) < element.levels
    words = pack_codes(codes, element)
    assert stored["packed"] == (torch.int32, tuple(words.shape))
    assert torch.equal(unpack_codes(words, element, x.shape[1]), codes)
    assert scheme.nbytes(*x.shape) == words.nbytes + scale.nbytes
    got = dequantize(codes, scale, None, scheme)
    s = spread(scale, scheme, *x.shape)
    grid = s[..., None] * torch.tensor(element.table)
    nearest = (grid - x[..., None]).abs().amin(-1)
    assert bool(((got - x).abs() <= nearest + 1e-5 * (x.abs().amax() + s)).all())


@settings(deadline=None)
@given(matrices(), st.sampled_from([Levels("nf4"), Levels("fp4"), Ternary()]), st.sampled_from(SHARES))
def test_minmax_reaches_the_largest(x: Tensor, element: Levels | Ternary, share: tuple) -> None:
    """No value is beyond the outer levels, so the error is at most half of the widest gap between levels."""
    scheme = Scheme(element, Scale(*share))
    scale, _ = affine_params(x, scheme)
    levels = torch.tensor(sorted(element.table))
    gap = (levels[1:] - levels[:-1]).max() / 2
    s = spread(scale, scheme, *x.shape)
    assert bool((x.abs() <= s * (1 + 1e-6)).all())
    assert bool(((fake_quantize(x, scheme) - x).abs() <= gap * s * (1 + 1e-4) + 1e-6).all())


@settings(deadline=None)
@given(matrices(), st.sampled_from(SHARES))
def test_absmean(x: Tensor, share: tuple) -> None:
    for element in (Ternary(), Binary()):
        scheme = Scheme(element, Scale(*share, rule="absmean"))
        scale, _ = affine_params(x, scheme)
        flat = x.reshape(1, -1) if share[0] == "tensor" else x
        k = flat.shape[1]
        runs = flat.split(min(share[1] or k, k), dim=1)
        mean = torch.stack([run.double().abs().mean(1) for run in runs], dim=1)
        expected = torch.where(mean == 0, 0.0 if element == Binary() else 1.0, mean)
        torch.testing.assert_close(scale, expected.float())


@settings(deadline=None, max_examples=30)
@given(matrices(), st.sampled_from(["channel", "tensor"]))
def test_no_scale_of_ternary_or_binary_numbers_has_less_squared_error(x: Tensor, share: str) -> None:
    """Against every scale of a grid; the rounding of each is to nearest."""
    for scheme in (Scheme(Ternary(), Scale(share, rule="mse")), Scheme(Binary(), Scale(share, rule="absmean"))):
        scale, _ = affine_params(x, scheme)

        def error(s: Tensor, scheme: Scheme = scheme) -> Tensor:
            e = (dequantize(quantize(x, s, None, scheme), s, None, scheme) - x).square()
            return e.sum(1, keepdim=True) if share == "channel" else e.sum().view(1, 1)

        found = error(scale)
        for factor in torch.linspace(0.02, 1.1, 40):
            assert bool(
                (
                    found <= error(torch.full_like(scale, float(factor)) * x.abs().max() + 1e-9) + 1e-4 * found + 1e-9
                ).all()
            )


@settings(deadline=None, max_examples=30)
@given(matrices(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(SHARES))
def test_searched_scales_are_no_worse(x: Tensor, name: str, share: tuple) -> None:
    errors = [
        (fake_quantize(x, Scheme(Levels(name), Scale(*share, rule=rule))) - x).abs().pow(2.4).sum().item()
        for rule in ("mse", "minmax")
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_a_searched_scale_is_the_best_of_the_grid() -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) ** 3
    scheme = NF4.with_(rule="mse")
    scale, _ = affine_params(x, scheme)
    tried = x.abs().max() * (1 - torch.arange(0, 80) / 100)
    errors = [
        (dequantize(quantize(x, s.view(1, 1), None, scheme), s.view(1, 1), None, scheme) - x).abs().pow(2.4).sum()
        for s in tried
    ]
    assert float(scale) == pytest.approx(float(tried[int(torch.stack(errors).argmin())]), rel=1e-6)
    assert float(scale) < float(x.abs().max())


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    x = torch.cat([torch.full((2, 8), 4.0), torch.full((2, 3), -0.5)], dim=1)
    for scheme in (TERNARY, BINARY, NF4.with_(rule="mse"), NF4, Scheme(Ternary(), Scale(rule="mse"))):
        grouped = scheme.with_(granularity="group", group=8)
        assert torch.equal(affine_params(x, grouped)[0], torch.tensor([[4.0, 0.5]] * 2))
        assert torch.equal(fake_quantize(x, grouped), x)


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize("share", SHARES, ids=str)
def test_zeros_are_exact(element, share: tuple) -> None:
    for rule in element.rules:
        scheme = Scheme(element, Scale(*share, "float16", rule))
        assert not fake_quantize(torch.zeros(3, 21), scheme).any()
    x = torch.ones(3, 21)
    x[1] = 0
    scheme = Scheme(element, Scale("channel", rule=element.rules[0]))
    assert torch.equal(fake_quantize(x, scheme), x)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize("share", SHARES, ids=str)
def test_empty(element, share: tuple, shape: tuple[int, int]) -> None:
    for rule in element.rules:
        scheme = Scheme(element, Scale(*share, rule=rule))
        if rule == "percentile" and 0 in shape and share[0] != "tensor":
            continue  # as for integers: an empty row has no quantiles
        scale, _ = affine_params(torch.zeros(shape), scheme)
        assert tuple(scale.shape) == scheme.tensors(*shape)["scale"][1]
        assert dequantize(quantize(torch.zeros(shape), scale, None, scheme), scale, None, scheme).shape == shape


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_extremes(element) -> None:
    """The largest and the smallest numbers of float32: values come back, or are refused by name."""
    for rule in element.rules:
        scheme = Scheme(element, Scale(rule=rule))
        for size in (3e38, 1e-30):
            x = torch.tensor([[size, -size, size, -size]])
            torch.testing.assert_close(fake_quantize(x, scheme), x)
        with pytest.raises(ScaleOutOfRange, match="encoder.fc: scales from .* float16"):
            affine_params(torch.full((2, 4), 1e6), scheme.with_(dtype="float16"), "encoder.fc")
        with pytest.raises(ScaleOutOfRange, match="encoder.fc"):
            affine_params(torch.full((2, 4), 1e-9), scheme.with_(dtype="float16"), "encoder.fc")
        for bad in (torch.inf, -torch.inf, torch.nan):
            with pytest.raises(NotFinite, match="encoder.fc"):
                affine_params(torch.tensor([[1.0, bad]]), scheme, "encoder.fc")


def test_a_mean_below_float32_is_not_taken_for_zero() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 1e-45
    for scheme in (TERNARY, BINARY):
        with pytest.raises(ScaleOutOfRange):
            affine_params(x, scheme)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for scheme in (NF4, TERNARY, BINARY, NF4.with_(rule="mse"), TERNARY.with_(rule="mse")):
        scale, _ = affine_params(x, scheme)
        torch.testing.assert_close(scale, affine_params(x.float(), scheme)[0])
        codes = quantize(x, scale, None, scheme)
        assert torch.equal(codes, quantize(x.float(), scale, None, scheme))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic.numerics import affine

    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    for scheme in (NF4.with_(group=5, rule="mse"), TERNARY, BINARY.with_(granularity="tensor")):
        monkeypatch.undo()
        whole = fake_quantize(x, scheme)
        monkeypatch.setattr(affine, "CHUNK", 40)
        monkeypatch.setattr(affine, "SEARCH", 20)
        assert torch.equal(fake_quantize(x, scheme), whole)


# --- schemes ----------------------------------------------------------------------------------------------------------


def test_schemes_print_and_parse() -> None:
    for text, bits in (
        ("v1/levelsnf4/group64/float16/minmax/znone/nearest", 4.25),
        ("v1/levelsfp4/group32/bfloat16/mse/znone/nearest", 4.5),
        ("v1/ternary/group640/float16/absmean/znone/nearest", 1.625),
        ("v1/binary/group128/float16/absmean/znone/nearest", 1.125),
    ):
        scheme = Scheme.parse(text)
        assert str(scheme) == text and Scheme.parse(str(scheme)) == scheme
        assert scheme.bits_per_weight(16, 3840) == pytest.approx(bits)
        assert scheme.symmetric


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("v1/levelsnf5/channel/float32/minmax/znone/nearest", "nf4, fp4"),
        ("v1/levels/channel/float32/minmax/znone/nearest", "name=''"),
        ("v1/ternary2/channel/float32/minmax/znone/nearest", "'ternary2' is not known"),
        ("v1/binary/channel/float32/minmax/znone/nearest", "scales of binary go by 'absmean'"),
        ("v1/int4/channel/float32/absmean/znone/nearest", "scales of int4 go by 'minmax'"),
        ("v1/levelsnf4/channel/float32/absmean/znone/nearest", "scales of levelsnf4 go by"),
        ("v1/ternary/channel/float32/absmean/zint/nearest", "belong to integers"),
        ("v1/levelsnf4/channel/float32/minmax/znone/stochastic", "belong to integers"),
    ],
)
def test_bad_schemes(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Scheme.parse(text)


def test_ranges() -> None:
    low, high = torch.tensor([[-3.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    for scheme in (NF4, TERNARY):
        scale, zero = params_from_range(low, high, scheme)
        assert scale.tolist() == [[3.0, 1.0]] and zero is None
    with pytest.raises(ValueError, match="follows from no range"):
        params_from_range(low, high, BINARY)
    assert Scheme(Int(4)).element.bits == 4


# --- tables of the tensor's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dim"), [(4, 1), (3, 2), (8, 4), (1, 1)])
@pytest.mark.parametrize(("rows", "k"), [(5, 24), (1, 8), (0, 8), (3, 0)])
def test_a_table_of_its_own(width: int, dim: int, rows: int, k: int) -> None:
    scheme = Scheme(Codebook(width, dim), Scale("group", 8, "float16"))
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))
    scale, table = affine_params(x, scheme)
    codes = quantize(x, scale, table, scheme)
    assert table.shape == (1 << width, dim) and table.dtype == torch.float16 and codes.shape == (rows, k // dim)
    assert torch.equal(unpack_codes(pack_codes(codes, scheme.element), scheme.element, k), codes)
    stored = scheme.tensors(rows, k)
    words = -(-k // dim * width // 32)
    assert stored["codebook"] == (torch.float16, (1 << width, dim)) and stored["packed"][1] == (rows, words)
    value = dequantize(codes, scale, table, scheme)
    spread = scale.float().repeat_interleave(8, 1)[:, :k]
    left = (x / spread).view(-1, 1, dim) if x.numel() else x.new_zeros(0, 1, dim)
    nearest = ((left - table.float()) ** 2).sum(-1)
    chosen = nearest.gather(1, codes.view(-1, 1).long())[:, 0]
    torch.testing.assert_close(chosen, nearest.amin(1) if len(nearest) else chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, table.float()[codes.long()].view(rows, k) * spread)


def test_tables_found_are_better_than_levels() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).pow(3)
    plain = Scheme(Int(4), Scale("channel"), "int")
    words = ("codebook4", "codebook8x2")
    errors = [
        float((fake_quantize(x, s) - x).norm())
        for s in (plain, *(Scheme.parse(f"v1/{word}/channel/float32/minmax/znone/nearest") for word in words))
    ]
    assert errors[1] < errors[0] and errors[2] < errors[1]
    three = torch.tensor([[1.0, 2.0, -3.0, 1.0], [-3.0, 2.0, 2.0, 1.0]])
    assert torch.equal(fake_quantize(three, Scheme(Codebook(2), Scale("tensor"))), three)
    with pytest.raises(ValueError, match="w: its rows of 7 are no whole runs of 2"):
        affine_params(torch.ones(2, 7), Scheme(Codebook(4, 2)), "w")


def test_k_means_of_vectors() -> None:
    generator = torch.Generator().manual_seed(3)
    middles = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = (middles[:, None] + 0.1 * torch.randn(3, 40, 2, generator=generator)).view(-1, 2)
    found = k_means(points, None, 3)
    assert torch.cdist(found.float(), middles).amin(0).max() < 0.1
    assert torch.equal(found, k_means(points, None, 3))
    heavy = torch.ones(120)
    heavy[:40] = 1e6
    assert torch.cdist(k_means(points, heavy, 1).float(), middles[:1]).item() < 0.1
    assert k_means(points[:2], None, 4).shape == (4, 2)
