"""Block types of ggml: bytes against the recorded ones of llama.cpp's reference, and both ways to our packed form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from laconic.interop.ggml_blocks import BLOCKS, as_blocks, decode, encode, read_matrix
from laconic.interop.matrix import QuantizedMatrix
from laconic.numerics import Int, Levels, Scale, Scheme, affine_params, quantize
from laconic.testing.vectors import folder

WHERE = folder(Path(__file__).parents[2])
CASES = [
    case for case in json.loads((WHERE / "formats.json").read_text())["cases"] if case["args"].get("format") in BLOCKS
]
EXACT = [name for name in BLOCKS if name not in ("Q4_1", "Q5_1")]


def drawn(rows: int, k: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    x[0] = 0
    x[1, :32] = 0.75
    return x


def packed(scheme: Scheme, x: np.ndarray) -> QuantizedMatrix:
    values = torch.from_numpy(x)
    scale, zero = affine_params(values, scheme)
    return QuantizedMatrix(scheme, quantize(values, scale, zero, scheme), scale, zero)


@pytest.mark.vectors
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_bytes_are_those_of_the_reference(case):
    arrays = np.load(WHERE / "formats.npz")
    given = {role: arrays[name] for role, name in case["arrays"].items()}
    raw = encode(given["input"].astype(np.float32), case["args"]["format"])
    assert np.array_equal(raw, given["packed"].view(np.uint8).reshape(raw.shape))
    assert np.array_equal(decode(raw, case["args"]["format"]), given["output"])


@pytest.mark.parametrize("name", EXACT)
def test_in_our_numbers_they_have_the_same_values_and_the_way_back_the_same_bytes(name):
    raw = encode(drawn(5, 512), name)
    matrix = read_matrix(raw, name)
    assert torch.equal(matrix.values(), torch.from_numpy(decode(raw, name)))
    if name == "TQ1_0":
        assert np.array_equal(decode(as_blocks(matrix)[1], "TQ2_0"), decode(raw, name))
    else:
        kind, back, same = as_blocks(matrix, exact=True)
        assert same and kind == name and np.array_equal(back, raw)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_minima_become_real_zero_points(name):
    raw = encode(drawn(5, 96), name)
    matrix, there = read_matrix(raw, name), torch.from_numpy(decode(raw, name))
    assert torch.allclose(matrix.values(), there, rtol=0, atol=float(there.abs().max()) * 3e-7)
    kind, back, _ = as_blocks(matrix)
    assert kind == name and np.array_equal(decode(back, name), there.numpy())


@pytest.mark.parametrize(
    ("scheme", "k", "kind"),
    [
        ("v1/int4/group64/float16/minmax/znone/nearest", 128, "Q4_0"),
        ("v1/int4/group32/float16/minmax/znone/nearest", 96, "Q4_0"),
        ("v1/int2/group32/float16/minmax/zint/nearest", 96, "Q4_0"),
        ("v1/int3/channel/float16/minmax/zint/nearest", 64, "Q4_0"),
        ("v1/int5/channel/float16/minmax/znone/nearest", 64, "Q5_0"),
        ("v1/int4/group32/float16/minmax/zint/nearest", 96, "Q5_0"),
        ("v1/int6/group64/float16/minmax/zint/nearest", 128, "Q8_0"),
        ("v1/int8/tensor/float16/minmax/znone/nearest", 64, "Q8_0"),
        ("v1/ternary/channel/float16/absmean/znone/nearest", 512, "TQ2_0"),
        ("v1/ternary/group32/float16/absmean/znone/nearest", 256, "Q4_0"),
        ("v1/binary/channel/float16/absmean/znone/nearest", 256, "TQ2_0"),
    ],
)
def test_what_we_pack_is_written_without_a_change(scheme, k, kind):
    matrix = packed(Scheme.parse(scheme), drawn(4, k) + 0.01)
    name, raw, same = as_blocks(matrix, exact=True)
    assert same and name == kind
    assert np.array_equal(decode(raw, name), matrix.values().numpy())


def test_a_zero_point_becomes_a_minimum_unless_values_must_stay():
    matrix = packed(Scheme(Int(4), Scale("group", 32, "float16"), "int"), drawn(4, 96))
    name, raw, _ = as_blocks(matrix)
    step = float(matrix.scale.float().max())
    assert name == "Q4_1" and np.abs(decode(raw, name) - matrix.values().numpy()).max() < 0.01 * step


@pytest.mark.parametrize(
    "matrix",
    [
        packed(Scheme(Int(4), Scale("group", 32, "float16")), drawn(4, 48)),
        packed(Scheme(Int(4), Scale("group", 48, "float16")), drawn(4, 96)),
        packed(Scheme(Levels("nf4"), Scale("group", 32)), drawn(4, 64)),
        packed(Scheme(Int(8), Scale("channel", dtype="float16"), "int"), drawn(4, 64)),
    ],
    ids=["row", "group", "levels", "wide"],
)
def test_what_fits_no_type(matrix):
    assert as_blocks(matrix, exact=True) is None


def test_scales_that_float16_lacks_are_rounded_only_if_that_is_allowed():
    matrix = packed(Scheme(Int(4), Scale("group", 32, "float32")), drawn(4, 64))
    assert as_blocks(matrix, exact=True) is None
    name, raw, same = as_blocks(matrix)
    assert name == "Q4_0" and not same
    assert np.allclose(decode(raw, name), matrix.values().numpy(), rtol=1e-3, atol=0)


def test_a_row_that_blocks_do_not_divide():
    with pytest.raises(ValueError, match="no multiple"):
        encode(np.zeros((2, 48), np.float32), "Q4_0")
