"""The block types of ggml, as llama.cpp stores matrices: from floats, to floats, and to and from our packed form.

A row of k elements is k / L blocks of L elements, each with its own scale d in float16, little endian:

    Q4_0   L 32   d, 16 bytes: byte j = q[j] | q[j + 16] << 4                   w = (q - 8) d, d = (largest |x|, signed) / -8
    Q4_1   L 32   d, m, 16 bytes likewise                                       w = q d + m
    Q5_0   L 32   d, the fifth bits as a uint32, 16 bytes                       w = (q - 16) d
    Q5_1   L 32   d, m, the fifth bits, 16 bytes                                w = q d + m
    Q8_0   L 32   d, 32 int8                                                    w = q d, d = max |x| / 127
    TQ1_0  L 256  48 bytes of 5 trits, 4 of 4, d                                w = t d, t in -1, 0, 1
    TQ2_0  L 256  64 bytes of 4 trits, d                                        likewise
    MXFP4  L 32   an exponent e (E8M0), 16 bytes of e2m1 in the order of Q4_0    w = 2^(e - 127) v

In our numbers they are integers, ternary numbers or levels with a scale a block, exactly; Q4_1 and Q5_1 are integers with a
real zero point z = -m / d, whose values agree to the rounding of float32. The rounding rules are those of llama.cpp's
reference (MIT), restated; the bytes are compared with it in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from laconic.numerics import Binary, Element, Int, Levels, Scale, Scheme, Ternary

from .matrix import QuantizedMatrix, spread

__all__ = ["BLOCKS", "FLOATS", "NUMBERS", "Block", "as_blocks", "decode", "encode", "read_matrix"]

Array = np.ndarray
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class Block:
    """A block type: its number in files, elements and bytes of a block."""

    name: str
    number: int
    length: int
    nbytes: int


BLOCKS = {
    block.name: block
    for block in (
        Block("Q4_0", 2, 32, 18), Block("Q4_1", 3, 32, 20), Block("Q5_0", 6, 32, 22), Block("Q5_1", 7, 32, 24),
        Block("Q8_0", 8, 32, 34), Block("TQ1_0", 34, 256, 54), Block("TQ2_0", 35, 256, 66), Block("MXFP4", 39, 32, 17),
    )
}  # fmt: skip
FLOATS = {"F32": (0, np.float32), "F16": (1, np.float16), "F64": (28, np.float64), "BF16": (30, np.uint16)}
# Number -> name of every type, so that one that is not read here can be named.
NUMBERS = {number: name for name, (number, _) in FLOATS.items()} | {b.number: b.name for b in BLOCKS.values()}
NUMBERS |= {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 29: "IQ1_M",
}  # fmt: skip


# --- bytes of blocks <-> codes ---------------------------------------------------------------------------------------


def _halves(low: Array) -> Array:
    """d of float16 bytes (n, 2) as float32 (n, 1)."""
    return np.ascontiguousarray(low).view(np.float16).astype(np.float32)


def _half_bytes(d: Array | None) -> Array:
    assert d is not None
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(d.astype(np.float16)).view(np.uint8)


def _nibbles(data: Array) -> Array:
    return np.concatenate([data & 15, data >> 4], axis=1)


def _from_nibbles(q: Array) -> Array:
    return q[:, :16] | q[:, 16:] << 4


def _with_fifth(high: Array, low: Array) -> Array:
    bits = np.ascontiguousarray(high).view("<u4") >> np.arange(32, dtype=np.uint32) & 1
    return _nibbles(low) | bits.astype(np.uint8) << 4


def _fifth(q: Array) -> Array:
    return np.packbits(q >> 4, axis=1, bitorder="little")


# TQ1_0: (first byte, bytes, trits a byte), in the order of elements.
_TRITS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))


def _tq1_codes(data: Array) -> Array:
    parts = []
    for first, count, trits in _TRITS:
        byte = data[:, None, first : first + count]
        power = (3 ** np.arange(trits)).astype(np.uint8)[None, :, None]
        parts.append(((byte * power).astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1))
    return np.concatenate(parts, axis=1)


def _tq1_bytes(q: Array) -> Array:
    parts, begin = [], 0
    for _, count, trits in _TRITS:
        digits = q[:, begin : begin + count * trits].reshape(len(q), trits, count).astype(np.uint16)
        value = (digits * (3 ** (4 - np.arange(trits))).astype(np.uint16)[None, :, None]).sum(1, dtype=np.uint16)
        parts.append((value.astype(np.uint32) * 256 + 242) // 243)
        begin += count * trits
    return np.concatenate(parts, axis=1).astype(np.uint8)


def _tq2_codes(data: Array) -> Array:
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    return (data.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(len(data), 256)


def _tq2_bytes(q: Array) -> Array:
    digits = q.reshape(-1, 2, 4, 32)
    return (digits[:, :, 0] | digits[:, :, 1] << 2 | digits[:, :, 2] << 4 | digits[:, :, 3] << 6).reshape(len(q), 64)


def _parts(raw: Array, name: str) -> tuple[Array, Array, Array | None]:
    """Codes (n, L) uint8, d (n, 1) and m (n, 1) or None, float32, of blocks (n, bytes)."""
    match name:
        case "Q4_0":
            return _nibbles(raw[:, 2:]), _halves(raw[:, :2]), None
        case "Q4_1":
            return _nibbles(raw[:, 4:]), _halves(raw[:, :2]), _halves(raw[:, 2:4])
        case "Q5_0":
            return _with_fifth(raw[:, 2:6], raw[:, 6:]), _halves(raw[:, :2]), None
        case "Q5_1":
            return _with_fifth(raw[:, 4:8], raw[:, 8:]), _halves(raw[:, :2]), _halves(raw[:, 2:4])
        case "Q8_0":
            return raw[:, 2:] ^ 0x80, _halves(raw[:, :2]), None  # two's complement to excess 128
        case "TQ1_0":
            return _tq1_codes(raw[:, :52]), _halves(raw[:, 52:]), None
        case "TQ2_0":
            return _tq2_codes(raw[:, :64]), _halves(raw[:, 64:]), None
        case _:
            return _nibbles(raw[:, 1:]), np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 127), None


def _blocks(name: str, codes: Array, d: Array, m: Array | None = None) -> Array:
    """Blocks (n, bytes) of codes (n, L), d (n, 1) and m: the inverse of `_parts`."""
    match name:
        case "Q4_0":
            parts = [_half_bytes(d), _from_nibbles(codes)]
        case "Q4_1":
            parts = [_half_bytes(d), _half_bytes(m), _from_nibbles(codes)]
        case "Q5_0":
            parts = [_half_bytes(d), _fifth(codes), _from_nibbles(codes & 15)]
        case "Q5_1":
            parts = [_half_bytes(d), _half_bytes(m), _fifth(codes), _from_nibbles(codes & 15)]
        case "Q8_0":
            parts = [_half_bytes(d), codes ^ 0x80]
        case "TQ1_0":
            parts = [_tq1_bytes(codes), _half_bytes(d)]
        case "TQ2_0":
            parts = [_tq2_bytes(codes), _half_bytes(d)]
        case _:
            parts = [(np.log2(d) + 127).astype(np.uint8), _from_nibbles(codes)]
    return np.concatenate(parts, axis=1)


_MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "TQ1_0": 1, "TQ2_0": 1}


def decode(raw: Array, name: str) -> Array:
    """float32 (rows, k) of rows of blocks, uint8 (rows, bytes)."""
    block = BLOCKS[name]
    codes, d, m = _parts(raw.reshape(-1, block.nbytes), name)
    if name == "MXFP4":
        values = E2M1[codes] * d
    elif m is not None:
        values = d * codes.astype(np.float32) + m
    else:
        values = (codes.astype(np.float32) - _MIDDLE[name]) * d
    return values.astype(np.float32).reshape(len(raw), -1)


# --- floats -> blocks ------------------------------------------------------------------------------------------------


def encode(x: Array, name: str) -> Array:
    """Rows of blocks, uint8 (rows, bytes), of float32 (rows, k): rounded as llama.cpp's reference does.

    Raises:
        ValueError: k is no multiple of the block's length.
    """
    block = BLOCKS[name]
    if x.shape[1] % block.length:
        raise ValueError(f"{name} stores runs of {block.length}, and a row of {x.shape[1]} is no multiple of it")
    x = np.ascontiguousarray(x, np.float32)
    flat = x.reshape(-1, block.length)
    return _ROUNDED[name](flat).reshape(len(x), -1)


def _inverse(d: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d).astype(np.float32)


def _signed(name: str, half: int) -> Callable[[Array], Array]:
    def rounded(x: Array) -> Array:
        top = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
        d = top / np.float32(-half)
        # In float64: a fused multiply-add of the C reference rounds once.
        q = np.trunc(x.astype(np.float64) * _inverse(d).astype(np.float64) + (half + 0.5))
        return _blocks(name, q.astype(np.float32).clip(0, 2 * half - 1).astype(np.uint8), d)

    return rounded


def _ranged(name: str, top: int) -> Callable[[Array], Array]:
    def rounded(x: Array) -> Array:
        low = x.min(1, keepdims=True)
        d = (x.max(1, keepdims=True) - low) / np.float32(top)
        q = np.trunc((x - low) * _inverse(d) + np.float32(0.5)).clip(0, top).astype(np.uint8)
        return _blocks(name, q, d, low)

    return rounded


def _away(x: Array) -> Array:
    """To the nearest whole number, half away from zero."""
    size = np.abs(x)
    down = np.floor(size)
    return np.sign(x) * (down + np.floor(2 * (size - down)))


def _q8_0(x: Array) -> Array:
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    return _blocks("Q8_0", (_away(x * _inverse(d)) + 128).astype(np.uint8), d)


def _ternary(name: str) -> Callable[[Array], Array]:
    def rounded(x: Array) -> Array:
        d = np.abs(x).max(1, keepdims=True)
        return _blocks(name, (_away(x * _inverse(d)) + 1).astype(np.uint8), d)

    return rounded


def _mxfp4(x: Array) -> Array:
    size = np.abs(x).max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        e = np.where(size > 0, np.floor(np.log2(size)) - 2 + 127, 0).clip(0, 254)
    d = np.exp2(e - 127).astype(np.float32)
    codes = np.abs(x[:, :, None] - (d * E2M1)[:, None, :]).argmin(-1).astype(np.uint8)
    return np.concatenate([e.astype(np.uint8), _from_nibbles(codes)], axis=1)


_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "Q4_0": _signed("Q4_0", 8), "Q4_1": _ranged("Q4_1", 15), "Q5_0": _signed("Q5_0", 16), "Q5_1": _ranged("Q5_1", 31),
    "Q8_0": _q8_0, "TQ1_0": _ternary("TQ1_0"), "TQ2_0": _ternary("TQ2_0"), "MXFP4": _mxfp4,
}  # fmt: skip


# --- blocks <-> our packed form --------------------------------------------------------------------------------------

_ELEMENTS: dict[str, Element] = {
    "Q4_0": Int(4), "Q4_1": Int(4), "Q5_0": Int(5), "Q5_1": Int(5), "Q8_0": Int(8), "TQ1_0": Ternary(), "TQ2_0": Ternary(),
    "MXFP4": Levels("fp4"),
}  # fmt: skip


def read_matrix(raw: Array, name: str) -> QuantizedMatrix:
    """Rows of blocks in our numbers: the same values, those of Q4_1 and Q5_1 to the rounding of float32."""
    block, rows = BLOCKS[name], len(raw)
    codes, d, m = _parts(raw.reshape(-1, block.nbytes), name)
    scale = torch.from_numpy(d.reshape(rows, -1).copy())
    matrix = torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, -1)))
    element = _ELEMENTS[name]
    if m is not None:
        # A block of one value has d = 0: then s = m, z = -1 and q = 0.
        low = torch.from_numpy(m.reshape(rows, -1).copy())
        flat = scale == 0
        scale = torch.where(flat, torch.where(low == 0, 1.0, low), scale)
        zero = torch.where(flat, torch.where(low == 0, 0.0, -1.0), -low / scale)
        matrix[flat.repeat_interleave(block.length, 1)] = 0
        return QuantizedMatrix(Scheme(element, Scale("group", block.length), "real"), matrix, scale, zero)
    if name == "MXFP4":
        return QuantizedMatrix(Scheme(element, Scale("group", block.length)), matrix, scale * 6)
    return QuantizedMatrix(Scheme(element, Scale("group", block.length, "float16")), matrix, scale.half())


def as_blocks(matrix: QuantizedMatrix, *, exact: bool = False) -> tuple[str, Array, bool] | None:
    """A packed matrix as rows of blocks, in the smallest type that holds it.

    Args:
        matrix: what is stored.
        exact: values may not change at all; else scales and minima may be rounded to float16.

    Returns:
        The type, uint8 (rows, bytes), and whether the values are the same; None if no type fits.
    """
    k = matrix.shape[1]
    if k % 32 or k == 0 or matrix.order is not None:
        return None
    whole = isinstance(matrix.scheme.element, Int | Ternary | Binary)
    found = _whole(matrix, exact) if whole else _levels(matrix)
    if found is None:
        return None
    name, raw = found
    raw = raw.reshape(matrix.shape[0], -1)
    same = bool((torch.from_numpy(decode(raw, name)) == matrix.values()).all())
    if (exact and not same) or not np.isfinite(decode(raw, name)).all():
        return None
    return name, raw, same


def _levels(matrix: QuantizedMatrix) -> tuple[str, Array] | None:
    scale = matrix.blocks(32)
    if matrix.scheme.element != Levels("fp4") or scale is None:
        return None
    exponent = torch.log2(scale.double() / 6)
    if bool((exponent != exponent.round()).any()) or float(exponent.min()) < -127 or float(exponent.max()) > 125:
        return None
    d = torch.exp2(exponent).reshape(-1, 1).numpy()
    return "MXFP4", _blocks("MXFP4", matrix.codes.reshape(-1, 32).numpy(), d)


def _whole(matrix: QuantizedMatrix, exact: bool) -> tuple[str, Array] | None:
    element, scale = matrix.scheme.element, matrix.blocks(32)
    if scale is None:
        return None
    codes, d = matrix.codes.reshape(-1, 32).numpy(), scale.reshape(-1, 1).numpy()
    with_minima = isinstance(element, Int) and element.bits <= 5 and matrix.zero is not None
    small = isinstance(element, Int) and element.bits <= 4
    v = matrix.integers()
    low, high = (0, 0) if v is None or v.numel() == 0 else (int(v.min()), int(v.max()))
    if v is not None and isinstance(element, Ternary | Binary) and matrix.blocks(256) is not None:
        wide = matrix.blocks(256).reshape(-1, 1).numpy()  # type: ignore[union-attr]
        return "TQ2_0", _blocks("TQ2_0", (v + 1).to(torch.uint8).reshape(-1, 256).numpy(), wide)
    if v is not None and low >= -8 and high <= 7:
        return "Q4_0", _blocks("Q4_0", (v + 8).to(torch.uint8).reshape(-1, 32).numpy(), d)
    if with_minima and (v is None or not exact):
        assert matrix.zero is not None
        zero = spread(matrix.zero.float(), matrix.shape, matrix.scheme)[:, ::32]
        minimum = -(zero * scale).reshape(-1, 1).numpy()
        name = "Q4_1" if small else "Q5_1"
        return name, _blocks(name, codes, d, minimum)
    if v is not None and low >= -16 and high <= 15:
        return "Q5_0", _blocks("Q5_0", (v + 16).to(torch.uint8).reshape(-1, 32).numpy(), d)
    if v is not None and low >= -128 and high <= 127:
        return "Q8_0", _blocks("Q8_0", (v + 128).to(torch.uint8).reshape(-1, 32).numpy(), d)
    return None
