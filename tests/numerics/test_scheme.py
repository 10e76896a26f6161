"""Schemes: what they print, parse and weigh."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from laconic.numerics import (
    NAMED,
    Codebook,
    Float,
    Int,
    NestedScales,
    Scale,
    Scheme,
    affine_params,
    pack,
    quantize,
    words_per_row,
)

SHARES = st.sampled_from(["tensor", "channel", "token"]).map(lambda g: (g, None)) | st.integers(1, 4096).map(
    lambda g: ("group", g)
)
SCHEMES = st.builds(
    Scheme,
    st.integers(2, 8).map(Int),
    st.builds(
        lambda share, dtype, rule, percentile: Scale(*share, dtype, rule, percentile),
        SHARES,
        st.sampled_from(["float32", "float16", "bfloat16"]),
        st.sampled_from(["minmax", "percentile", "mse"]),
        st.floats(50, 100, exclude_min=True),
    ),
    st.sampled_from(["none", "int", "real"]),
    st.sampled_from(["nearest", "stochastic"]),
)


@given(SCHEMES)
def test_round_trip(scheme: Scheme) -> None:
    again = Scheme.parse(str(scheme))
    assert again == scheme and hash(again) == hash(scheme) and str(again) == str(scheme)


def test_the_string_form_is_frozen() -> None:
    scheme = Scheme(Int(4), Scale("group", group=64, dtype="float16", rule="mse"), zero="int")
    assert str(scheme) == "v1/int4/group64/float16/mse/zint/nearest"
    assert str(Scheme()) == "v1/int8/channel/float32/minmax/znone/nearest"
    assert str(Scheme(Int(8), Scale(rule="percentile"))) == "v1/int8/channel/float32/percentile99.9/znone/nearest"


def test_formats_by_name() -> None:
    assert Scheme.parse("mxfp4") == NAMED["mxfp4"] == Scheme(Float("e2m1"), Scale("group", 32, "e8m0", "floor"))
    assert str(NAMED["nf4"]) == "v1/levelsnf4/group64/dynamic8x256/minmax/znone/nearest"
    assert str(Scheme(Codebook(8, 2), Scale("tensor"))) == "v1/codebook8x2/tensor/float32/minmax/znone/nearest"
    words = [*map(str, NAMED.values()), "v1/levelsnf2/group16/linear3x64bfloat16/minmax/znone/nearest"]
    assert all(str(Scheme.parse(word)) == word for word in words)
    assert all(scheme.plain.scale.plain and scheme.plain.plain is scheme.plain for scheme in NAMED.values())


def test_what_is_not_printed_does_not_tell_schemes_apart() -> None:
    assert Scale(percentile=99.0) == Scale()
    assert Scale(rule="percentile", percentile=99.0) != Scale(rule="percentile")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected 7 parts"),
        ("v1/int4/channel/float32/minmax/znone", "got 6"),
        ("v2/int4/channel/float32/minmax/znone/nearest", "version 'v2'"),
        ("v1/int9/channel/float32/minmax/znone/nearest", "2 to 8 bits"),
        ("v1/int1/channel/float32/minmax/znone/nearest", "2 to 8 bits"),
        ("v1/nf4/channel/float32/minmax/znone/nearest", "'nf4' is not known"),
        ("v1/int/channel/float32/minmax/znone/nearest", "'int' is not known"),
        ("v1/int04/channel/float32/minmax/znone/nearest", "spelled 'v1/int4/"),
        ("v1/int4/group/float32/minmax/znone/nearest", "needs a group length"),
        ("v1/int4/group0/float32/minmax/znone/nearest", "at least one"),
        ("v1/int4/group-8/float32/minmax/znone/nearest", "needs a group length"),
        ("v1/int4/row/float32/minmax/znone/nearest", "granularity='row'"),
        ("v1/int4/channel/float64/minmax/znone/nearest", "dtype='float64'"),
        ("v1/levelsnf4/group64/dynamic4x256/minmax/znone/nearest", "dynamic scales cannot have 4 bits"),
        ("v1/levelsnf4/group64/linear4x0/minmax/znone/nearest", "runs of 0 scales"),
        ("v1/levelsnf4/group64/linear4x16int8/minmax/znone/nearest", "type 'int8'"),
        ("v1/floate9m9/group32/e8m0/floor/znone/nearest", "'e9m9' is not known"),
        ("v1/codebookx/group32/float32/minmax/znone/nearest", "'codebookx' is not known"),
        ("v1/int4/group32/e8m0/floor/znone/nearest", "go by 'minmax'"),
        ("v1/int4/channel/float32/percentile/znone/nearest", "needs a number"),
        ("v1/int4/channel/float32/percentilenan/znone/nearest", "percentile=nan"),
        ("v1/int4/channel/float32/percentile50/znone/nearest", "percentile=50"),
        ("v1/int4/channel/float32/best/znone/nearest", "rule='best'"),
        ("v1/int4/channel/float32/minmax/none/nearest", "znone, zint, zreal"),
        ("v1/int4/channel/float32/minmax/zfloat/nearest", "zero='float'"),
        ("v1/int4/channel/float32/minmax/znone/up", "rounding='up'"),
        ("v1/int4/channel/float32/minmax/znone/nearest ", "rounding='nearest '"),
    ],
)
def test_bad_strings(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Scheme.parse(text)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="`group` belongs to"):
        Scale("channel", group=8)
    with pytest.raises(ValueError, match="`group` belongs to"):
        Scale("group")
    with pytest.raises(ValueError, match="2 to 8 bits"):
        Int(4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype float32 are stored so"):
        Scale(outer=NestedScales(), dtype="float16")
    with pytest.raises(ValueError, match="codes have 1 to 8 bits"):
        Codebook(9)
    with pytest.raises(ValueError, match="a group holds whole runs of 4"):
        Scheme(Codebook(8, 4), Scale("group", 6))
    with pytest.raises(ValueError, match="towards zero to floats"):
        Scheme(Int(4), rounding="away")
    with pytest.raises(TypeError, match="one of Int, Float, Levels, Ternary, Binary, Codebook"):
        Scheme("nf4")  # type: ignore[arg-type]


def test_with() -> None:
    scheme = Scheme(Int(4), Scale("group", 64))
    assert scheme.with_(group=32) == Scheme(Int(4), Scale("group", 32))
    assert scheme.with_(granularity="channel", group=None, zero="int") == Scheme(Int(4), Scale(), "int")
    with pytest.raises(TypeError):
        scheme.with_(bits=3)


@given(SCHEMES.filter(lambda s: s.rounding == "nearest"), st.integers(0, 6), st.integers(0, 70))
def test_the_bytes_are_those_of_the_tensors(scheme: Scheme, rows: int, k: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))
    scale, zero = affine_params(x, scheme)
    stored = scheme.tensors(rows, k)
    assert stored["scale"] == (scale.dtype, tuple(scale.shape))
    packed = pack(quantize(x, scale, zero, scheme), scheme.bits)
    assert stored["packed"] == (packed.dtype, tuple(packed.shape))
    tensors = [packed, scale]
    if scheme.zero == "int":
        tensors.append(pack(zero.T.contiguous(), scheme.bits).T)
        assert stored["zero_point"] == (torch.int32, tuple(tensors[-1].shape))
    elif scheme.zero == "real":
        tensors.append(zero)
        assert stored["zero"] == (zero.dtype, tuple(zero.shape))
    assert len(stored) == len(tensors)
    assert scheme.nbytes(rows, k) == sum(t.numel() * t.element_size() for t in tensors)


def test_groups() -> None:
    scheme = Scheme(Int(4), Scale("group", 64))
    assert [scheme.fits(k) for k in (128, 100, 64, 40, 0)] == [True, False, True, True, False]
    assert [scheme.scale.groups(k) for k in (128, 100, 64, 40, 0)] == [2, 2, 1, 1, 1]
    assert Scheme().fits(7)
    assert [words_per_row(k, 3) for k in (0, 1, 10, 11, 32)] == [0, 1, 1, 2, 3]
