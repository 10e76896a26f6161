"""Linear layers that count bits: ops `laconic::binary_linear` and `laconic::bit_serial_linear`, and packing for them.

A matrix of b-bit numbers is b planes of bits x_i, dense int32 words (b, rows, ceil(k/32)), LSB first. Plane i stands for
2 x_i - 1 = +-1, the matrix for v = sum_i c_i (2 x_i - 1), and a product of two planes is k - 2 popcount(x xor w):

    encoding   number              c_i
    bipolar    v                   2^i                           odd, no zero; 1 bit: +-1 (arXiv 2409.17870)
    unsigned   (v + 2^b - 1) / 2   2^i
    twos       (v - 1) / 2         2^i, -2^(b-1) of the top      two's complement

The work grows with the product of both numbers of bits: from about four pairs of planes on, 8-bit products are no
slower where the CPU has instructions for them. Integers are exact, and the float32 results of the compiled kernel have
the bits of the reference here, in plain torch: (integer * x_scale) * scale + bias, each operation rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from laconic.kernels import native, ops
from laconic.numerics import pack, unpack

__all__ = [
    "ENCODINGS", "KERNEL_BITS", "MAX_BITS", "bit_product", "pack_planes", "pack_signs", "plane_values", "quantize_planes",
]  # fmt: skip

ENCODINGS = {"bipolar": 0, "unsigned": 1, "twos": 2}
MAX_BITS = 8
KERNEL_BITS = 4  # planes of a product in the compiled kernel; more are several products of as many

_library = torch.library.Library("laconic", "FRAGMENT")
_library.define(
    "binary_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias=None, Tensor? x_scale=None) -> Tensor"
)
_library.define(
    "bit_serial_linear(Tensor x, Tensor planes, Tensor scale, Tensor? bias=None, Tensor? x_scale=None, *, int bits, "
    "str encoding='bipolar', str x_encoding='bipolar') -> Tensor"
)


# --- packing --------------------------------------------------------------------------------------------------------


def pack_signs(x: Tensor, *, threads: int | None = None, isa: int = -1) -> Tensor:
    """Dense words (rows, ceil(k/32)) int32 of a float matrix (rows, k): bit 1 where x >= 0 (so in -0.0; not in a nan)."""
    if x.ndim != 2:
        raise ValueError(f"pack_signs: x has shape {tuple(x.shape)}, must have 2 axes")
    if not is_native(x):
        return pack_bits(x >= 0)
    x = x.float().contiguous()
    out = torch.empty((x.shape[0], words_of(x.shape[1])), dtype=torch.int32)
    native.module().pack_signs(
        x.data_ptr(), x.numel(), *x.shape, out.data_ptr(), out.numel(), threads_of(threads), isa
    )  # fmt: skip
    return out


def pack_planes(codes: Tensor, bits: int, *, threads: int | None = None) -> Tensor:
    """Planes (bits, rows, ceil(k/32)) int32 of codes (rows, k): bit i of each code is in plane i.

    Args:
        codes: uint8 or int8, of which the low bits count (so int8 gives two's complement).
        bits: 1 to 8.

    Raises:
        ValueError: bits, shape or type is another.
    """
    _check_bits("pack_planes", bits)
    if codes.ndim != 2 or codes.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"pack_planes: codes are a uint8 or int8 matrix, got {codes.dtype} of {tuple(codes.shape)}")
    codes = codes.contiguous().view(torch.uint8) if codes.shape[1] else codes.to(torch.uint8)
    if bits > KERNEL_BITS:
        parts = ((codes, KERNEL_BITS), (codes >> KERNEL_BITS, bits - KERNEL_BITS))
        return torch.cat([pack_planes(part, few, threads=threads) for part, few in parts])
    if not is_native(codes):
        return torch.stack([pack_bits(codes >> i & 1) for i in range(bits)])
    out = torch.empty((bits, codes.shape[0], words_of(codes.shape[1])), dtype=torch.int32)
    native.module().pack_code_planes(
        codes.data_ptr(), codes.numel(), *codes.shape, bits, out.data_ptr(), out.numel(), threads_of(threads)
    )  # fmt: skip
    return out


def plane_values(planes: Tensor, k: int, encoding: str) -> Tensor:
    """int32 (rows, k): the numbers that planes (bits, rows, words) stand for."""
    weights = _weights(planes.shape[0], encoding)
    signs = torch.stack([2 * unpack(plane, 1, k).int() - 1 for plane in planes])
    v = (signs * torch.tensor(weights, dtype=torch.int32, device=planes.device)[:, None, None]).sum(
        0, dtype=torch.int32
    )
    return v if encoding == "bipolar" else (v + sum(weights)) // 2


def quantize_planes(
    x: Tensor, bits: int, encoding: str, scale: Tensor | None = None, *, threads: int | None = None, isa: int = -1
) -> tuple[Tensor, Tensor]:
    """Planes (bits, rows, words) of x / scale (rows, k), rounded to the numbers of an encoding, and the scale.

    bipolar takes the odd number of the cell 2 floor(x / 2s) + 1 (x = 0 becomes s); the others round to the nearest, ties
    to even. What is out of range becomes the largest number. Without a scale each row has its own: max|x| / 2^bits for
    bipolar, so that no error exceeds s (with one bit mean|x|, the best in squares); max x / (2^bits - 1) for unsigned;
    max|x| / (2^(bits-1) - 1) for twos.

    Args:
        x: (rows, k) float.
        bits: 1 to 8.
        encoding: see the module.
        scale: one number, or one for each row, float32.

    Returns:
        planes, and the scale (1) or (rows) in float32.
    """
    _check_bits("quantize_planes", bits)
    _check_encoding("quantize_planes", encoding)
    x = x.float().contiguous()
    rows, k = x.shape
    scale = _own_scale(x, bits, encoding) if scale is None else numbers("x_scale", scale, rows, x.device)
    factor, down, offset, low, high = _coding(scale, bits, encoding)
    if bits > KERNEL_BITS or not is_native(x):
        t = x * (factor if factor.numel() == 1 else factor[:, None])
        codes = ((t.floor() if down else t.round()) + offset).clamp(low, high).to(torch.int32)
        return pack_planes((codes & 0xFF).to(torch.uint8), bits, threads=threads), scale
    out = torch.empty((bits, rows, words_of(k)), dtype=torch.int32)
    native.module().pack_planes(
        x.data_ptr(), x.numel(), rows, k, factor.data_ptr(), factor.numel(), down, offset, low, high, bits,
        out.data_ptr(), out.numel(), threads_of(threads), isa,
    )  # fmt: skip
    return out, scale


def _own_scale(x: Tensor, bits: int, encoding: str) -> Tensor:
    if x.shape[1] == 0:
        return x.new_ones(x.shape[0])
    if encoding == "unsigned":
        scale = x.amax(-1) / (2**bits - 1)
    elif encoding == "twos":
        scale = x.abs().amax(-1) / max(1, 2 ** (bits - 1) - 1)
    else:
        scale = x.abs().mean(-1) if bits == 1 else x.abs().amax(-1) / 2**bits
    return torch.where(scale > 0, scale, 1.0)


def _coding(scale: Tensor, bits: int, encoding: str) -> tuple[Tensor, bool, float, float, float]:
    """factor, whether to round down, offset, least and largest code."""
    half = float(1 << (bits - 1))
    if encoding == "bipolar":
        return 0.5 / scale, True, half, 0.0, 2 * half - 1
    if encoding == "unsigned":
        return 1 / scale, False, 0.0, 0.0, 2 * half - 1
    return 1 / scale, False, 0.0, -half, half - 1


# --- products -------------------------------------------------------------------------------------------------------


def bit_product(
    a: Tensor, b: Tensor, k: int, a_encoding: str = "bipolar", b_encoding: str = "bipolar", *,
    threads: int | None = None, isa: int = -1,
) -> Tensor:  # fmt: skip
    """int32 (m, n), exact: the product of the numbers behind planes a (p, m, words) and b (q, n, words) along k.

    Sums must fit in int32: at 8 bits on both sides that holds for every k up to 33,000.

    Args:
        a, b: int32 planes; words of bits, bits past k zero.
        k: length of a row in bits.
        a_encoding, b_encoding: see the module.

    Raises:
        ValueError: a shape, type or encoding does not fit.
    """
    _check_product(a, b, k, a_encoding, b_encoding)
    if not is_native(a, b):
        return _product(a, b, k, a_encoding, b_encoding).to(torch.int32)
    if max(a.shape[0], b.shape[0]) > KERNEL_BITS:
        total = torch.zeros((a.shape[1], b.shape[1]), dtype=torch.int32)
        for low, a_part, a_as in _parts(a, a_encoding):
            for lower, b_part, b_as in _parts(b, b_encoding):
                product = bit_product(a_part, b_part, k, a_as, b_as, threads=threads, isa=isa)
                total += product << (low + lower)
        return total
    out = torch.empty((a.shape[1], b.shape[1]), dtype=torch.int32)
    _call(a, b, k, a_encoding, b_encoding, exact=out, threads=threads, isa=isa)
    return out


def _parts(planes: Tensor, encoding: str) -> Iterator[tuple[int, Tensor, str]]:
    """Planes that the kernel takes at once: the power of 2 that they stand for, themselves, and their encoding.

    The numbers of all planes are the sum of those of the parts, each shifted; only the top part is signed in `twos`.
    """
    for low in range(0, planes.shape[0], KERNEL_BITS):
        top = low + KERNEL_BITS >= planes.shape[0]
        yield low, planes[low : low + KERNEL_BITS], encoding if top or encoding != "twos" else "unsigned"


def _product(a: Tensor, b: Tensor, k: int, a_encoding: str, b_encoding: str) -> Tensor:
    """float64, exact: sums stay far below 2^53."""
    return plane_values(a, k, a_encoding).double() @ plane_values(b, k, b_encoding).double().t()


def _scaled(
    a: Tensor, b: Tensor, k: int, encodings: tuple[str, str], scales: tuple[Tensor, Tensor], bias: Tensor | None,
    threads: int | None, isa: int,
) -> Tensor:  # fmt: skip
    """float32 (m, n): product * a_scale * b_scale + bias."""
    _check_product(a, b, k, *encodings)
    if not is_native(a, b):
        return _scaled_reference(a, b, k, encodings, scales, bias)
    if max(a.shape[0], b.shape[0]) > KERNEL_BITS:
        y = bit_product(a, b, k, *encodings, threads=threads, isa=isa).float() * scales[0][:, None] * scales[1]
        return y if bias is None else y + bias
    out = torch.empty((a.shape[1], b.shape[1]), dtype=torch.float32)
    _call(a, b, k, *encodings, out=out, scales=scales, bias=bias, threads=threads, isa=isa)
    return out


def _scaled_reference(a, b, k, encodings, scales, bias):
    y = _product(a, b, k, *encodings).float() * scales[0][:, None] * scales[1]
    return y if bias is None else y + bias


def _call(a, b, k, a_encoding, b_encoding, *, exact=None, out=None, scales=(None, None), bias=None, threads, isa):
    native.module().bit_product(
        a.data_ptr(), a.numel(), a.shape[1], a.shape[0], ENCODINGS[a_encoding],
        b.data_ptr(), b.numel(), b.shape[1], b.shape[0], ENCODINGS[b_encoding], k,
        *_at(exact), *_at(out), *_at(scales[0]), *_at(scales[1]), *_at(bias), threads_of(threads), isa,
    )  # fmt: skip


# --- the ops --------------------------------------------------------------------------------------------------------


def binary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None, *,
    threads: int | None = None, isa: int = -1,
) -> Tensor:  # fmt: skip
    """y = x_scale * scale * (sgn(x) sgn(W)^T) + bias, with sgn(0) = 1.

    Args:
        x: (..., k) float; its signs are taken here.
        codes: (n, ceil(k/32)) int32, the signs of W: bit 1 is +1.
        scale: one number, or one for each row of W.
        bias: (n).
        x_scale: one number, or one for each row of x; none: 1.

    Raises:
        ValueError: a shape or type does not fit.
    """
    rows, m = codes.shape[0], math.prod(x.shape[:-1])
    scales = numbers("x_scale", x_scale, m, x.device), numbers("scale", scale, rows, x.device)
    signs = pack_signs(x.reshape(m, x.shape[-1]), threads=threads, isa=isa)
    y = _scaled(signs[None], codes[None], x.shape[-1], _SIGNS, scales, bias_of(bias, rows), threads, isa)
    return y.view(*x.shape[:-1], rows).to(x.dtype)


def bit_serial_linear(
    x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None, *,
    bits: int, encoding: str = "bipolar", x_encoding: str = "bipolar", threads: int | None = None, isa: int = -1,
) -> Tensor:  # fmt: skip
    """y = x_scale * scale * (Q(x / x_scale) W^T) + bias for W of 1 to 8 bits, x rounded to 1 to 8 bits here.

    Args:
        x: (..., k) float.
        planes: (bits of W, n, ceil(k/32)) int32.
        scale: one number, or one for each row of W.
        bias: (n).
        x_scale: one number, or one for each row of x; none: of the row itself, see `quantize_planes`.
        bits: of x.
        encoding, x_encoding: of W, of x.

    Raises:
        ValueError: a shape, type, number of bits or encoding does not fit.
    """
    rows, m = planes.shape[1], math.prod(x.shape[:-1])
    flat = x.reshape(m, x.shape[-1])
    own, x_scale = quantize_planes(flat, bits, x_encoding, x_scale, threads=threads, isa=isa)
    scales = x_scale, numbers("scale", scale, rows, x.device)
    y = _scaled(own, planes, x.shape[-1], (x_encoding, encoding), scales, bias_of(bias, rows), threads, isa)
    return y.view(*x.shape[:-1], rows).to(x.dtype)


_SIGNS = ("bipolar", "bipolar")


def _fake_binary_linear(x, codes, scale, bias=None, x_scale=None):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _fake_bit_serial_linear(
    x, planes, scale, bias=None, x_scale=None, *, bits, encoding="bipolar", x_encoding="bipolar"
):
    return x.new_empty((*x.shape[:-1], planes.shape[1]))


# --- operands -------------------------------------------------------------------------------------------------------


def is_native(*tensors: Tensor) -> bool:
    return not ops._by_reference and native.load() is not None and all(t.device.type == "cpu" for t in tensors)


def pack_bits(bits: Tensor) -> Tensor:
    """Words of a matrix of bits; `pack` of numerics runs on the CPU."""
    return pack(bits.to("cpu", torch.uint8), 1).to(bits.device)


def words_of(k: int) -> int:
    return -(-k // 32)


def threads_of(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _at(x: Tensor | None) -> tuple[int, int]:
    return (x.data_ptr(), x.numel()) if x is not None else (0, 0)


def _weights(bits: int, encoding: str) -> list[int]:
    top = -1 if encoding == "twos" else 1
    return [*(1 << i for i in range(bits - 1)), top << (bits - 1)]


def numbers(name: str, x: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """float32 (1) or (rows) of a scale; no tensor is 1."""
    if x is None:
        return torch.ones(1, device=device)
    if x.numel() not in (1, rows):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must be one number or one for each of {rows} rows")
    return x.reshape(-1).float().contiguous()


def bias_of(bias: Tensor | None, rows: int) -> Tensor | None:
    if bias is None:
        return None
    if tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be ({rows},)")
    return bias.float().contiguous()


def _check_bits(what: str, bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{what}: bits is {bits}, must be 1 to {MAX_BITS}")


def _check_encoding(what: str, encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ValueError(f"{what}: encoding={encoding!r}: one of {', '.join(ENCODINGS)}")


def _check_product(a: Tensor, b: Tensor, k: int, a_encoding: str, b_encoding: str) -> None:
    for name, planes, encoding in (("a", a, a_encoding), ("b", b, b_encoding)):
        _check_encoding("bit_product", encoding)
        if planes.dtype != torch.int32 or planes.ndim != 3 or planes.shape[2] != words_of(k):
            raise ValueError(
                f"bit_product: {name} is {planes.dtype} of shape {tuple(planes.shape)}; rows of {k} bits are int32 "
                f"(bits, rows, {words_of(k)})"
            )
        _check_bits(f"bit_product: {name}", planes.shape[0])
        if not planes.is_contiguous():
            raise ValueError(
                f"bit_product: {name} of shape {tuple(planes.shape)} is not contiguous; call .contiguous()"
            )


for _name, _run, _fake in (
    ("binary_linear", binary_linear, _fake_binary_linear),
    ("bit_serial_linear", bit_serial_linear, _fake_bit_serial_linear),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"laconic::{_name}", _fake, lib=_library)
