"""The compiled kernels against a plain bit-by-bit reference in numpy, and against `laconic.numerics`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from laconic.kernels import native
from laconic.numerics import Int, Scale, Scheme, hadamard, pack
from laconic.numerics import dequantize as reference_dequantize
from laconic.numerics import unpack as reference_unpack

MODULE = native.load()
ISAS = list(range(MODULE.best_isa() + 1)) if MODULE is not None else [0]
BITS = list(range(1, 9))
LENGTHS = [0, 1, 2, 7, 31, 32, 33, 63, 95, 128, 257, 2047, 2049, 4133]  # around words, vectors, blocks
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

needs_kernels = pytest.mark.skipif(MODULE is None, reason=f"no compiled kernels: {native.status()['why']}")


def required() -> bool:
    return os.environ.get(native.REQUIRE, "").lower() not in ("", "0", "false", "off", "no")


def test_kernels_are_there_where_they_are_required():
    """CI sets LACONIC_REQUIRE_KERNELS=1: there the skips below would hide a build that failed."""
    assert MODULE is not None or not required(), native.status()["why"]


def make_words(rows: int, bits: int, k: int) -> torch.Tensor:
    """Random words, padding bits included: what lies past code k must not matter."""
    g = torch.Generator().manual_seed(rows * 1000 + bits * 100 + k)
    return torch.randint(-(2**31), 2**31, (rows, -(-k * bits // 32)), generator=g, dtype=torch.int64).int()


def codes_bit_by_bit(words: torch.Tensor, bits: int, k: int) -> np.ndarray:
    stream = words.numpy().astype("<i4").view(np.uint8).reshape(words.shape[0], -1)
    each = np.unpackbits(stream, axis=1, bitorder="little")
    out = np.zeros((words.shape[0], k), np.uint8)
    for i in range(k):
        for b in range(bits):
            out[:, i] |= each[:, i * bits + b] << b
    return out


def make_params(rows: int, groups: int, dtype: torch.dtype, zero: str, bits: int):
    g = torch.Generator().manual_seed(7)
    scale = (torch.rand(rows, groups, generator=g) * 0.1 + 1e-3).to(dtype)
    if zero == "int":
        return scale, torch.randint(0, 2**bits, (rows, groups), generator=g, dtype=torch.uint8)
    return scale, (torch.randn(rows, groups, generator=g) * 3).to(dtype) if zero == "real" else None


def dequantize_plainly(codes: np.ndarray, scale, zero, group: int, bits: int) -> np.ndarray:
    at = np.arange(codes.shape[1]) // group
    z = zero.float().numpy()[:, at] if zero is not None else np.float32(2 ** (bits - 1))
    return (codes.astype(np.float32) - z) * scale.float().numpy()[:, at]


@needs_kernels
class TestUnpack:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("bits", BITS)
    def test_equals_bit_by_bit(self, bits, isa):
        for k in LENGTHS:
            words = make_words(3, bits, k)
            got = native.unpack(words, bits, k, isa=isa)
            assert got.dtype == torch.uint8 and tuple(got.shape) == (3, k)
            assert np.array_equal(got.numpy(), codes_bit_by_bit(words, bits, k)), f"k={k}"

    @pytest.mark.parametrize("bits", BITS)
    def test_equals_the_reference_and_inverts_pack(self, bits):
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(0, 2**bits, (5, 203), dtype=torch.uint8, generator=generator)
        words = pack(codes, bits)
        assert torch.equal(native.unpack(words, bits, 203), codes)
        assert torch.equal(native.unpack(words, bits, 203), reference_unpack(words, bits, 203))

    def test_no_rows(self):
        assert native.unpack(torch.empty((0, 4), dtype=torch.int32), 4, 32).shape == (0, 32)

    def test_last_row_ends_where_memory_ends(self):
        """Words that stop at a page's end, the next page unreadable: one byte too far is a crash."""
        script = """
import ctypes, mmap, numpy as np, torch
from laconic.kernels import native
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), 0) == 0
for bits in range(1, 9):
    for k in (1, 31, 32, 33, 64, 65, 96, 160, 257):
        n = -(-k * bits // 32)
        raw = (ctypes.c_int32 * n).from_address(base + page - 4 * n)
        words = torch.from_numpy(np.ctypeslib.as_array(raw)).view(1, n)
        native.unpack(words, bits, k)
        native.dequantize(words, torch.ones(1, 1), None, None, bits, k)
print("read within the page")
"""
        if sys.platform != "linux":
            pytest.skip("mprotect through ctypes is tried on Linux alone")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "within the page" in done.stdout, done.stderr

    @pytest.mark.parametrize(
        ("words", "bits", "k", "says"),
        [
            (torch.zeros(2, 3, dtype=torch.int32), 4, 32, "3 per row, but 32 codes of 4 bits fill 4"),
            (torch.zeros(2, 4, dtype=torch.int32), 9, 32, "bits is 9, must be 1 to 8"),
            (torch.zeros(2, 4, dtype=torch.int32), 0, 32, "bits is 0, must be 1 to 8"),
            (torch.zeros(2, 4, dtype=torch.int32), 4, -1, "but -1 codes"),
            (torch.zeros(2, 4, dtype=torch.int32), 4, 2**62, "4 per row, but 4611686018427387904 codes"),
            (torch.zeros(2, 4, dtype=torch.int64), 4, 32, "words is torch.int64, must be torch.int32"),
            (torch.zeros(4, dtype=torch.int32), 4, 32, "must have 2 axes"),
            (torch.zeros(4, 2, dtype=torch.int32).T, 4, 32, "not contiguous"),
            (torch.zeros(2, 4, dtype=torch.int32, device="meta"), 4, 32, "on meta"),
        ],
    )
    def test_refuses(self, words, bits, k, says):
        with pytest.raises(ValueError, match=says):
            native.unpack(words, bits, k)


@needs_kernels
class TestDequantize:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("zero", ["none", "int", "real"])
    @pytest.mark.parametrize("bits", BITS)
    def test_bit_equal_to_plain_numpy(self, bits, zero, isa):
        for k in LENGTHS[1:]:
            for group in (1, 32, 50, k, 10 * k):
                dtype = DTYPES[(k + group) % 3]
                words = make_words(3, bits, k)
                scale, z = make_params(3, -(-k // group), dtype, zero, bits)
                got = native.dequantize(words, scale, z, group, bits, k, isa=isa).numpy()
                want = dequantize_plainly(codes_bit_by_bit(words, bits, k), scale, z, group, bits)
                assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), (k, group, dtype)

    @pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
    @pytest.mark.parametrize("zero", ["none", "int", "real"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_bit_equal_to_the_reference(self, granularity, zero, dtype):
        group = 48 if granularity == "group" else None
        scheme = Scheme(Int(3), Scale(granularity, group=group, dtype=dtype), zero=zero)
        rows, k, per = 5, 203, 1 if granularity == "tensor" else 5
        words = make_words(rows, 3, k)
        scale, z = make_params(per, scheme.scale.groups(k) if group else 1, scheme.scale.torch_dtype, zero, 3)
        got = native.dequantize(words, scale, z, group, 3, k)
        assert torch.equal(got, reference_dequantize(reference_unpack(words, 3, k), scale, z, scheme))

    def test_every_half_is_read_exactly(self):
        """Subnormals, zeros, infinities and nans of float16, and all of bfloat16, as a scale of one code."""
        words = torch.full((1, 1), 3, dtype=torch.int32).expand(65536, 1).contiguous()
        for dtype in (torch.float16, torch.bfloat16):
            scale = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
            got = native.dequantize(words, scale, None, None, 2, 1)
            assert torch.equal(got.isnan(), scale.isnan())
            assert torch.equal(got.nan_to_num(0), scale.float().nan_to_num(0))
            assert torch.equal(got.signbit()[~got.isnan()], scale.signbit()[~scale.isnan()])

    def test_rows_shard(self):
        words, (scale, z) = make_words(9, 5, 77), make_params(9, 3, torch.float16, "int", 5)
        whole = native.dequantize(words, scale, z, 32, 5, 77)
        out = torch.full((9, 77), -1.0)
        native.dequantize(words, scale, z, 32, 5, 77, out=out, rows=(2, 4))
        assert torch.equal(out[2:4], whole[2:4]) and (out[:2] == -1).all() and (out[4:] == -1).all()
        for rows in [(0, 2), (4, 9), (9, 9)]:
            assert native.dequantize(words, scale, z, 32, 5, 77, out=out, rows=rows) is out
        assert torch.equal(out, whole)

    def test_same_bits_for_any_number_of_threads(self):
        words, (scale, z) = make_words(77, 4, 999), make_params(77, 16, torch.float16, "int", 4)
        first = native.dequantize(words, scale, z, 64, 4, 999, threads=1)
        for threads in (2, 3, 4):
            assert torch.equal(first, native.dequantize(words, scale, z, 64, 4, 999, threads=threads))

    @pytest.mark.parametrize(("rows", "k"), [(0, 40), (4, 0), (0, 0)])
    def test_empty(self, rows, k):
        scale = torch.ones(rows, max(1, -(-k // 8)))
        got = native.dequantize(make_words(rows, 4, k), scale, None, 8 if k else None, 4, k)
        assert got.dtype == torch.float32 and tuple(got.shape) == (rows, k)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"scale": torch.ones(2, 3)}, "3 groups per row, but 40 codes in groups of 32 make 2"),
            ({"scale": torch.ones(3, 2)}, "scale has 3 rows, words have 2"),
            ({"scale": torch.ones(2, 2, dtype=torch.float64)}, "scale is torch.float64"),
            ({"zero": torch.zeros(2, 1)}, r"zero has shape \(2, 1\), scale \(2, 2\)"),
            ({"zero": torch.zeros(2, 2, dtype=torch.int8)}, "zero is torch.int8"),
            ({"group": 0}, "group is 0, must be at least 1"),
            ({"group": None}, "make 1"),
            ({"bits": 3}, "40 codes of 3 bits fill 4"),
            ({"k": 48}, "48 codes of 4 bits fill 6"),
            ({"out": torch.empty(2, 41)}, r"out has shape \(2, 41\), must be \(2, 40\)"),
            ({"out": torch.empty(40, 2).T}, "not contiguous"),
            ({"rows": (1, 3)}, "rows 1 to 3 do not lie within 0 to 2"),
            ({"rows": (2, 1)}, "rows 2 to 1"),
            ({"rows": (-1, 1)}, "rows -1 to 1"),
            ({"isa": 99}, "isa is 99"),
        ],
    )
    def test_refuses(self, change, says):
        args = {"words": make_words(2, 4, 40), "scale": torch.ones(2, 2), "zero": None}
        args |= {"group": 32, "bits": 4, "k": 40}
        with pytest.raises(ValueError, match=says):
            native.dequantize(**(args | change))


@needs_kernels
class TestHadamard:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("power", range(15))
    def test_bit_equal_to_the_reference(self, power, isa):
        x = torch.randn(3, 2**power, generator=torch.Generator().manual_seed(power))
        want = hadamard(x)
        assert native.hadamard_(x, isa=isa) is x
        assert torch.equal(x, want)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("n", [1, 2, 8, 16, 64, 256, 8192])
    def test_halves_are_rounded_once(self, n, dtype, isa):
        x = torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(dtype)
        want = hadamard(x.float()).to(dtype)
        assert torch.equal(native.hadamard_(x, isa=isa), want)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_for_any_number_of_threads(self, dtype):
        x = torch.randn(301, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        first = native.hadamard_(x.clone(), threads=1)
        assert all(torch.equal(first, native.hadamard_(x.clone(), threads=n)) for n in (2, 3, 4))

    def test_is_the_matrix(self):
        """Against Sylvester's matrix written out, not against another fast transform."""
        h = np.ones((1, 1))
        while len(h) < 64:
            h = np.block([[h, h], [h, -h]])
        got = native.hadamard_(torch.eye(64)).numpy()
        assert np.array_equal(got, (h / 8).astype(np.float32))

    def test_leading_axes_and_no_rows(self):
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
        want = hadamard(x)
        assert torch.equal(native.hadamard_(x), want)
        assert native.hadamard_(torch.empty(0, 8)).shape == (0, 8)

    @pytest.mark.parametrize(
        ("x", "says"),
        [
            (torch.zeros(2, 12), "n is 12, must be a power of two"),
            (torch.zeros(2, 0), "n is 0"),
            (torch.zeros(2, 8, dtype=torch.float64), "x is torch.float64"),
            (torch.zeros(8, 2).T, "not contiguous"),
            (torch.zeros(2, 8, requires_grad=True), "requires grad"),
        ],
    )
    def test_refuses(self, x, says):
        with pytest.raises(ValueError, match=says):
            native.hadamard_(x)


@needs_kernels
class TestTheEdge:
    """The extension itself trusts no caller: addresses with too few elements behind them are refused."""

    words, out = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 32, dtype=torch.uint8)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({1: 7}, r"words: 7 elements given, the shape \(2, 4\) needs 8"),
            ({7: 63}, r"out: 63 elements given, the shape \(2, 32\) needs 64"),
            ({2: -1}, "negative"),
            ({2: 2**61}, "too large to address"),
            ({0: 0}, "words: the address is null"),
            ({0: 2}, "not aligned to 4 bytes"),
            ({9: 3}, "rows 0 to 3"),
            ({4: 0}, "bits is 0, must be 1 to 8"),
            ({5: 2**62}, "k is 4611686018427387904, out of range"),
            ({5: 33}, "words: 4 per row, but 33 codes of 4 bits fill 5"),
        ],
    )
    def test_unpack(self, change, says):
        args = [self.words.data_ptr(), 8, 2, 4, 4, 32, self.out.data_ptr(), 64, 0, 2]
        for at, value in change.items():
            args[at] = value
        with pytest.raises(ValueError, match=says):
            MODULE.unpack(*args)

    def test_dtype_numbers(self):
        at = self.words.data_ptr()
        args = [at, 8, 2, 4, at, 2, MODULE.UINT8, 0, 0, MODULE.NONE, 1, 32, 4, 32, at, 64, 0, 0, 1]
        with pytest.raises(ValueError, match="scale: there is no dtype number 4"):
            MODULE.dequantize(*args)
        args[6], args[9] = MODULE.FLOAT32, 5
        with pytest.raises(ValueError, match="zero: there is no dtype number 5"):
            MODULE.dequantize(*args)
        with pytest.raises(TypeError):
            MODULE.hadamard(at, 8, MODULE.FLOAT32, 2, 4, "1", 1)


class TestStatus:
    def test_says_what_is_there(self):
        status = native.status()
        assert set(status) == {"present", "why", "compiler", "isa", "path"}
        assert status["present"] == (native.load() is not None) == (status["why"] == "")
        if status["present"]:
            assert status["isa"] in ("portable", "avx2", "avx512", "neon") and status["compiler"]

    def test_switched_off(self):
        script = """
import json, torch
from laconic.kernels import native
try:
    native.unpack(torch.zeros(1, 1, dtype=torch.int32), 4, 8)
except RuntimeError as error:
    print(json.dumps([native.load() is None, native.status()["why"], str(error)]))
"""
        env = os.environ | {native.DISABLE: "1"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr
        missing, why, message = json.loads(done.stdout)
        assert missing and why == "switched off by LACONIC_DISABLE_KERNELS=1"
        assert why in message and "laconic.numerics" in message
