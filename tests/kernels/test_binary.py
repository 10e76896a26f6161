"""Products by counting bits against integer products in torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from laconic.kernels import binary, native
from laconic.numerics import pack, unpack

ISAS = range(native.load().best_isa() + 1) if native.load() is not None else ()
compiled = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")

# (m, n, k): words, vectors, panels and tiles that end early; few rows and many; nothing at all.
SHAPES = [
    (1, 1, 1), (3, 5, 31), (1, 17, 32), (7, 33, 64), (15, 65, 545), (16, 16, 512), (17, 15, 33), (33, 31, 1000),
    (70, 130, 96), (19, 40, 16421), (0, 5, 40), (5, 0, 40), (20, 0, 40), (4, 6, 0), (20, 6, 0),
]  # fmt: skip
RANGES = {
    "bipolar": lambda bits: range(1 - 2**bits, 2**bits, 2),
    "unsigned": lambda bits: range(2**bits),
    "twos": lambda bits: range(-(2 ** (bits - 1)), 2 ** (bits - 1)),
}


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


def integers(rows: int, k: int, bits: int, encoding: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random numbers of an encoding, and their planes."""
    codes = torch.randint(
        0, 2**bits, (rows, k), generator=torch.Generator().manual_seed(seed + rows + k), dtype=torch.uint8
    )
    values = torch.tensor(list(RANGES[encoding](bits)))
    if encoding == "twos":  # codes count from the least number, planes hold two's complement
        return values[codes.long()], binary.pack_planes((codes + 2 ** (bits - 1)) & (2**bits - 1), bits)
    return values[codes.long()], binary.pack_planes(codes, bits)


# --- packing --------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [0, 1, 7, 31, 32, 33, 64, 100, 257])
def test_signs_are_packed_densely(isa: int, k: int) -> None:
    x = noise(5, k)
    x[:, ::3] *= 0
    x[1] *= -1  # -0.0 counts as >= 0
    x[3, ::2] = torch.nan
    x[4] = torch.inf
    assert torch.equal(binary.pack_signs(x, isa=isa), pack((x >= 0).to(torch.uint8), 1))


def test_signs_of_any_float_type_and_strides(road: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = noise(70, 9).to(dtype).t()[::2]
        assert torch.equal(unpack(binary.pack_signs(x), 1, 70), (x >= 0).to(torch.uint8))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_hold_one_bit_of_each_code(road: str, bits: int) -> None:
    for rows, k in ((3, 1), (4, 45), (1, 64), (0, 8), (2, 0)):
        codes = torch.randint(0, 2**bits, (rows, k), dtype=torch.uint8)
        planes = binary.pack_planes(codes, bits)
        assert planes.shape == (bits, rows, -(-k // 32))
        assert torch.equal(sum(unpack(p, 1, k).int() << i for i, p in enumerate(planes)), codes.int())
        signed = codes.to(torch.int8) - 2 ** (bits - 1)
        assert torch.equal(binary.plane_values(binary.pack_planes(signed, bits), k, "twos"), signed.int())


@pytest.mark.parametrize("encoding", binary.ENCODINGS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounding_takes_the_nearest_number(road: str, encoding: str, bits: int) -> None:
    x = noise(6, 75)
    x[2] = 0
    planes, scale = binary.quantize_planes(x, bits, encoding)
    values = binary.plane_values(planes, 75, encoding)
    levels = torch.tensor(list(RANGES[encoding](bits)))
    error = (values * scale[:, None] - x).abs()
    best = (levels * scale[:, None, None] - x[..., None]).abs().amin(-1)
    torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-6)
    if encoding == "bipolar" and bits > 1:
        assert (error <= scale[:, None] * (1 + 1e-5)).all()


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", binary.ENCODINGS)
def test_rounding_has_the_bits_of_the_reference(monkeypatch, isa: int, encoding: str) -> None:
    for bits, k in itertools.product((1, 2, 3, 4), (1, 30, 64, 99)):
        x = noise(3, k) * 4
        x[1] = torch.arange(k) * 0.5 - 4  # ties
        for scale in (None, torch.tensor([0.5]), torch.tensor([0.5, 1.0, 2.0])):
            got = binary.quantize_planes(x, bits, encoding, scale, isa=isa, threads=2)
            with monkeypatch.context() as without:
                without.setattr(native, "load", lambda: None)
                want = binary.quantize_planes(x, bits, encoding, scale)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# --- products -------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_binary_product_is_exact(isa: int, m: int, n: int, k: int) -> None:
    (x, a), (w, b) = integers(m, k, 1, "bipolar"), integers(n, k, 1, "bipolar", seed=1)
    want = (x @ w.t()).int()
    for threads in (1, 2, 3, 4):
        assert torch.equal(binary.bit_product(a, b, k, threads=threads, isa=isa), want)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("p", "q"), list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4))))
def test_products_of_all_widths_and_encodings_are_exact(isa: int, p: int, q: int) -> None:
    for (m, n, k), x_encoding, w_encoding in itertools.product(
        ((3, 18, 70), (17, 5, 257)), binary.ENCODINGS, binary.ENCODINGS
    ):
        (x, a), (w, b) = integers(m, k, p, x_encoding), integers(n, k, q, w_encoding, seed=1)
        got = binary.bit_product(a, b, k, x_encoding, w_encoding, threads=2, isa=isa)
        assert torch.equal(got, (x @ w.t()).int()), (m, n, k, x_encoding, w_encoding)


def test_products_of_the_largest_numbers(road: str) -> None:
    k = 70000
    for encoding, bits in itertools.product(binary.ENCODINGS, (1, 4)):
        levels = RANGES[encoding](bits)
        for value in (levels[0], levels[-1]):
            code = value & 15 if encoding == "twos" else levels.index(value)
            planes = binary.pack_planes(torch.full((1, k), code, dtype=torch.uint8), bits)
            many = planes.expand(bits, 17, -1).contiguous()
            assert (binary.bit_product(many, planes, k, encoding, encoding) == value * value * k).all()


@compiled
def test_rows_in_memory_that_is_aligned_to_words_alone() -> None:
    k = 200
    (x, a), (w, b) = integers(20, k, 2, "unsigned"), integers(9, k, 1, "bipolar", seed=1)
    shifted = [torch.cat([torch.zeros(1, dtype=torch.int32), t.flatten()])[1:].view_as(t) for t in (a, b)]
    assert torch.equal(binary.bit_product(*shifted, k, "unsigned", "bipolar"), (x @ w.t()).int())


# --- the ops --------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 11), (0,)])
def test_linear_layers_have_the_bits_of_the_reference(monkeypatch, isa: int, lead: tuple[int, ...]) -> None:
    n, k, bits = 37, 150, 3
    x, weight, bias = noise(*lead, k), noise(n, k, seed=1), noise(n, seed=2)
    codes = binary.pack_signs(weight)
    planes, scale = binary.quantize_planes(weight, 2, "bipolar")
    own = x.abs().mean(-1)
    calls = [
        lambda **how: binary.binary_linear(x, codes, weight.abs().mean(-1), bias, own, **how),
        lambda **how: binary.binary_linear(x, codes, torch.tensor(0.5), **how),
        lambda **how: binary.bit_serial_linear(x, planes, scale[:, None], bias, bits=bits, x_encoding="twos", **how),
        lambda **how: binary.bit_serial_linear(x, planes, scale, None, torch.tensor([0.1]), bits=bits, **how),
    ]
    for call in calls:
        got = call(isa=isa, threads=2)
        with monkeypatch.context() as without:
            without.setattr(native, "load", lambda: None)
            want = call()
        assert got.shape == (*lead, n) and torch.equal(got, want)


def test_binary_linear_is_the_product_of_signs(road: str) -> None:
    x, weight = noise(4, 90), noise(10, 90, seed=1)
    x[0, :5] = 0
    sign = lambda t: torch.where(t >= 0, 1.0, -1.0)  # noqa: E731
    got = torch.ops.laconic.binary_linear(x, binary.pack_signs(weight), torch.ones(1))
    assert torch.equal(got, sign(x) @ sign(weight).t())


def test_bit_serial_linear_comes_near_the_float_product(road: str) -> None:
    x, weight = noise(20, 512), noise(30, 512, seed=1)
    planes, scale = binary.quantize_planes(weight, 4, "bipolar")
    got = torch.ops.laconic.bit_serial_linear(x, planes, scale, bits=4)
    want = x @ weight.t()
    error = [((got - want).norm() / want.norm()).item()]
    planes, scale = binary.quantize_planes(weight, 2, "bipolar")
    got = torch.ops.laconic.bit_serial_linear(x, planes, scale, bits=2, x_encoding="bipolar")
    error.append(((got - want).norm() / want.norm()).item())
    assert error[0] < 0.2 < error[1] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(road: str, dtype: torch.dtype) -> None:
    x, weight, bias = noise(2, 3, 40).to(dtype), noise(6, 40, seed=1), noise(6, seed=2)
    planes, scale = binary.quantize_planes(weight, 2, "bipolar")
    torch.library.opcheck(torch.ops.laconic.binary_linear.default, (x, binary.pack_signs(weight), scale, bias))
    torch.library.opcheck(torch.ops.laconic.bit_serial_linear.default, (x, planes, scale, bias), {"bits": 3})


@pytest.mark.parametrize(("p", "q"), [(5, 1), (4, 8), (8, 8), (7, 3)])
@pytest.mark.parametrize("a_encoding", binary.ENCODINGS)
@pytest.mark.parametrize("b_encoding", binary.ENCODINGS)
def test_more_planes_than_the_kernel_takes(road: str, p: int, q: int, a_encoding: str, b_encoding: str) -> None:
    for m, n, k in ((1, 1, 1), (3, 5, 70), (0, 2, 33)):
        (va, a), (vb, b) = integers(m, k, p, a_encoding), integers(n, k, q, b_encoding)
        assert torch.equal(binary.plane_values(a, k, a_encoding), va.int())
        got = binary.bit_product(a, b, k, a_encoding, b_encoding)
        assert torch.equal(got, (va.double() @ vb.double().T).int())
    x, weight = noise(4, 37), noise(6, 37, seed=1)
    planes, scale = binary.quantize_planes(weight, q, b_encoding)
    got = binary.bit_serial_linear(x, planes, scale, bits=p, encoding=b_encoding, x_encoding=a_encoding)
    own, x_scale = binary.quantize_planes(x, p, a_encoding)
    stored = binary.plane_values(planes, 37, b_encoding) * scale[:, None]
    want = (binary.plane_values(own, 37, a_encoding) * x_scale[:, None]).double() @ stored.double().T
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(road: str) -> None:
    (_, a), (_, b) = integers(2, 40, 1, "bipolar"), integers(3, 40, 1, "bipolar")
    with pytest.raises(ValueError, match=r"a is torch.int32 of shape \(1, 2, 2\); rows of 70 bits"):
        binary.bit_product(a, b, 70)
    with pytest.raises(ValueError, match="encoding='signed': one of bipolar, unsigned, twos"):
        binary.bit_product(a, b, 40, "signed")
    with pytest.raises(ValueError, match="bits is 9, must be 1 to 8"):
        binary.quantize_planes(noise(1, 4), 9, "bipolar")
    with pytest.raises(ValueError, match=r"codes are a uint8 or int8 matrix, got torch.int32"):
        binary.pack_planes(torch.zeros(2, 2, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), must be one number or one for each of 3 rows"):
        binary.binary_linear(noise(2, 40), b[0], torch.ones(2))
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), must be \(3,\)"):
        binary.binary_linear(noise(2, 40), b[0], torch.ones(3), torch.ones(2))
    if road == "native":
        with pytest.raises(ValueError, match="threads is 0"):
            binary.bit_product(a, b, 40, threads=0)
        with pytest.raises(ValueError, match="isa is 9"):
            binary.bit_product(a, b, 40, isa=9)
