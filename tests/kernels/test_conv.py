"""Convolutions of bits and bytes against float convolutions of the same integers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import conv, native

ISAS = range(native.load().best_isa() + 1) if native.load() is not None else ()
compiled = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")

# images, channels, out, (height, width), kernel, stride, padding, dilation, groups
SHAPES = [
    (1, 1, 1, (1, 1), (1, 1), 1, 0, 1, 1),
    (2, 3, 5, (7, 9), (3, 3), 1, 1, 1, 1),
    (1, 64, 70, (14, 14), (3, 3), 1, 1, 1, 1),
    (2, 40, 16, (11, 8), (3, 3), 2, 1, 1, 1),
    (1, 33, 9, (10, 23), (1, 1), 1, 0, 1, 1),
    (1, 8, 12, (9, 9), (3, 2), (2, 1), (0, 3), (2, 1), 4),
    (3, 6, 6, (8, 8), (3, 3), 1, 2, 2, 6),
    (1, 66, 66, (5, 6), (3, 3), 1, 4, 1, 2),
    (1, 130, 3, (20, 20), (5, 5), 3, 2, 1, 1),
    (0, 4, 4, (6, 6), (3, 3), 1, 1, 1, 1),
]


@pytest.fixture(params=["native", "reference"])
def road(request, monkeypatch):
    """Each test runs with the compiled kernel and without."""
    if request.param == "reference":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip(f"no compiled kernels: {native.status()['why']}")
    return request.param


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


def case(shape: tuple) -> tuple[Tensor, Tensor, Tensor, dict]:
    n, channels, out, size, kernel, stride, padding, dilation, groups = shape
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return noise(n, channels, *size), noise(out, channels // groups, *kernel, seed=1), noise(out, seed=2), how


def padded(x: Tensor, how: dict, value: float) -> tuple[Tensor, dict]:
    high, wide = how["padding"] if isinstance(how["padding"], tuple) else (how["padding"],) * 2
    return F.pad(x, (wide, wide, high, high), value=value), {**how, "padding": 0}


def codes_of(weight: Tensor) -> Tensor:
    return (weight * 60).round().clamp(-128, 127).to(torch.int8)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_binary_convolution_is_exact(shape: tuple, isa: int) -> None:
    x, weight, bias, how = case(shape)
    scale = weight.abs().mean((1, 2, 3))
    x[..., ::2, :1] = 0
    for pad in (-1, 0, 1):
        outer, inner = padded(sign(x), how, float(pad))
        want = F.conv2d(outer, sign(weight), None, **inner).float() * scale[:, None, None] + bias[:, None, None]
        for threads in (1, 2, 3, 4):
            packed = conv.pack_binary_weight(weight)
            got = conv.binary_conv2d(x, packed, scale, bias, pad_value=pad, threads=threads, isa=isa, **how)
            assert torch.equal(got, want), (pad, threads)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_convolution_is_exact(shape: tuple, isa: int) -> None:
    x, weight, bias, how = case(shape)
    codes = codes_of(weight)
    scale = torch.rand(weight.shape[0]) + 0.5
    static = (torch.tensor(0.03), torch.tensor(77))
    for x_scale, x_zero, signed in ((None, None, False), (None, None, True), (*static, False), (static[0], None, True)):
        step, zero = conv.quantize_input(x, x_scale, x_zero, signed)
        q = ((x * (1 / step)).round() + zero).clamp(0, 255).double() - zero
        want = F.conv2d(q, codes.double(), None, **how).float() * (scale * step)[:, None, None] + bias[:, None, None]
        for threads in (1, 2, 3, 4):
            got = conv.int8_conv2d(
                x, conv.pack_int8_weight(codes), scale, bias, x_scale, x_zero, signed=signed, threads=threads, isa=isa, **how
            )  # fmt: skip
            assert torch.equal(got, want), (signed, threads)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_largest_bytes(isa: int) -> None:
    x = torch.full((1, 3640, 3, 3), 10.0)
    for code, signed in ((-128, False), (127, False), (-128, True)):
        weight = conv.pack_int8_weight(torch.full((17, 3640, 3, 3), code, dtype=torch.int8))
        got = conv.int8_conv2d(x, weight, torch.ones(1), None, torch.tensor(0.01), signed=signed, isa=isa)
        assert (got == torch.tensor(float(9 * 3640 * code * (127 if signed else 255))) * torch.tensor(0.01)).all()


def test_int8_convolution_comes_near_the_float_one(road: str) -> None:
    x, weight = noise(2, 24, 10, 10), noise(8, 24, 3, 3)
    scale = weight.abs().amax((1, 2, 3)) / 127
    packed = conv.pack_int8_weight((weight / scale[:, None, None, None]).round().to(torch.int8))
    for activations, signed in ((x, False), (x, True), (x.relu(), False), (x * 0, False)):
        got = torch.ops.laconic.int8_conv2d(activations, packed, scale, padding=1, signed=signed)
        want = F.conv2d(activations, weight, padding=1)
        assert (got - want).norm() <= 0.02 * want.norm()


def test_scales_of_images(road: str) -> None:
    x, weight, bias = noise(3, 20, 6, 5), noise(7, 20, 3, 3), noise(7)
    own = x.abs().mean((1, 2, 3))
    got = conv.binary_conv2d(x, conv.pack_binary_weight(weight), torch.full((7,), 0.5), bias, own, padding=1)
    want = F.conv2d(sign(x), sign(weight), padding=1).float() * (0.5 * own)[:, None, None, None] + bias[:, None, None]
    assert torch.equal(got, want)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(road: str, act: str) -> None:
    x, weight = noise(1, 20, 6, 5), noise(7, 20, 3, 3)
    packed = conv.pack_binary_weight(weight)
    plain = conv.binary_conv2d(x, packed, torch.tensor(0.1))
    got = conv.binary_conv2d(x, packed, torch.tensor(0.1), act=act)
    torch.testing.assert_close(got, conv.ACTIVATIONS[act](plain), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_float_type_and_strides(road: str, dtype: torch.dtype) -> None:
    x, weight = noise(2, 6, 8, 10).to(dtype).transpose(2, 3), noise(5, 6, 3, 3)
    got = conv.binary_conv2d(x, conv.pack_binary_weight(weight), torch.ones(1))
    assert got.dtype == dtype
    assert torch.equal(got, F.conv2d(sign(x), sign(weight)).to(dtype))


def test_opcheck(road: str) -> None:
    x, weight, bias = noise(2, 12, 6, 7), noise(8, 6, 3, 3), noise(8)
    how = {"stride": [2, 1], "padding": [1, 1], "groups": 2}
    bits, codes = conv.pack_binary_weight(weight), conv.pack_int8_weight(codes_of(weight))
    torch.library.opcheck(torch.ops.laconic.binary_conv2d.default, (x, bits, torch.ones(8), bias), how)
    torch.library.opcheck(torch.ops.laconic.int8_conv2d.default, (x, codes, torch.ones(8), bias), how)


def test_what_does_not_fit_is_refused(road: str) -> None:
    x, weight = noise(1, 6, 5, 5), noise(4, 6, 3, 3)
    bits, codes = conv.pack_binary_weight(weight), conv.pack_int8_weight(codes_of(weight))
    one = torch.ones(1)
    with pytest.raises(ValueError, match="groups is 4, must divide 6 channels and 4 of the output"):
        conv.binary_conv2d(x, bits, one, groups=4)
    with pytest.raises(ValueError, match="weight has 1 words, 40 channels fill 2"):
        conv.binary_conv2d(noise(1, 40, 5, 5), bits, one)
    with pytest.raises(ValueError, match="weight has 8 bytes, 12 channels fill 12"):
        conv.int8_conv2d(noise(1, 12, 5, 5), codes, one)
    with pytest.raises(ValueError, match="pad_value is 2"):
        conv.binary_conv2d(x, bits, one, pad_value=2)
    with pytest.raises(ValueError, match="act='tanh': one of"):
        conv.binary_conv2d(x, bits, one, act="tanh")
    with pytest.raises(ValueError, match="x_zero with signed codes"):
        conv.int8_conv2d(x, codes, one, None, one, one, signed=True)
    with pytest.raises(ValueError, match="x_zero without x_scale"):
        conv.int8_conv2d(x, codes, one, None, None, one)
    with pytest.raises(ValueError, match=r"torch.int8 \(out, kh, kw, words\); got"):
        conv.int8_conv2d(x, bits, one)
    if road == "native":
        with pytest.raises(ValueError, match="isa is 9"):
            conv.binary_conv2d(x, bits, one, isa=9)
