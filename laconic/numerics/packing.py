"""Packing of unsigned codes into bytes: the `Layout` apart from the numbers.

The dense layout is one LSB-first bit stream per row: code i of b bits occupies bits b*i .. b*i+b-1 of the
row, codes cross byte and word borders, and a row is padded with zero bits to whole little-endian 32-bit
words. For 2, 4 and 8 bits these are the bytes of compressed-tensors (every release), GPTQ's word order and
llama.cpp's bit order within a byte; for other widths those of compressed-tensors' current packer. It holds integers,
indices of level tables, and signs (1 bit, set for +1). Ternary codes have a layout of their own, `base3`: see
`base3.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .base3 import pack_base3, unpack_base3
from .elements import Codebook, Element, Ternary, words_per_row

if sys.byteorder != "little":  # pragma: no cover - no such machine in reach
    raise ImportError("laconic stores little-endian words and has not been built for big-endian machines")


@dataclass(frozen=True)
class Layout:
    """How codes lie in bytes: `dense` or `base3`; kernels read them as they lie, on every ISA."""

    name: str = "dense"
    word_bits: int = 32

    def shape(self, rows: int, k: int, bits: int) -> tuple[int, int]:
        """Shape of the int32 words that hold a (rows, k) matrix of `bits`-bit codes (ternary ones in `base3`)."""
        return rows, Ternary().words(k) if self.name == "base3" else words_per_row(k, bits)


DENSE = Layout()
BASE3 = Layout("base3")


def layout_of(element: Element) -> Layout:
    """The layout in which codes of an element are stored."""
    return BASE3 if isinstance(element, Ternary) else DENSE


def pack_codes(codes: Tensor, element: Element) -> Tensor:
    """Words (rows, element.words(k)) int32 of the codes (rows, k) uint8 of an element, in its layout.

    A codebook has one code for each run of numbers: (rows, k / dim).

    Raises:
        ValueError: a code is not one of the element's, or the shape or type is another.
    """
    if isinstance(element, Ternary):
        return pack_base3(codes)
    return pack(codes, element.width if isinstance(element, Codebook) else element.bits)


def unpack_codes(words: Tensor, element: Element, k: int) -> Tensor:
    """Codes (rows, k) uint8 of an element of words in its layout: the inverse of `pack_codes`.

    Raises:
        ValueError: shape or type do not belong to `k` codes of this element.
    """
    if isinstance(element, Ternary):
        return unpack_base3(words, k)
    if isinstance(element, Codebook):
        return unpack(words, element.width, -(-k // element.dim))
    return unpack(words, element.bits, k)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Dense words (rows, ceil(k*bits/32)) int32 of unsigned codes (rows, k) uint8.

    Args:
        codes: (rows, k), values in [0, 2^bits - 1].
        bits: 1 to 8.

    Raises:
        ValueError: a code does not fit in `bits`, or the shape or type is another.
    """
    _check_bits(bits)
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"pack: codes are a uint8 matrix, got {codes.dtype} of shape {tuple(codes.shape)}")
    rows, k = codes.shape
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"pack: code {int(codes.max())} does not fit in {bits} bits")
    words = words_per_row(k, bits)
    if rows == 0 or words == 0:
        return torch.zeros((rows, words), dtype=torch.int32)
    # One spare byte takes the last carry, always zero.
    stream = torch.zeros((rows, words * 4 + 1), dtype=torch.uint8)
    # Codes k0, k0+8, k0+16, ... start at the same bit of their byte, `bits` bytes apart: eight passes.
    for lane in range(min(8, k)):
        column = codes[:, lane::8].to(torch.int32)
        byte, shift = divmod(lane * bits, 8)
        low = (column << shift) & 0xFF
        high = (column << shift) >> 8
        n = column.shape[1]
        stream[:, byte : byte + bits * (n - 1) + 1 : bits] |= low.to(torch.uint8)
        if shift + bits > 8:
            stream[:, byte + 1 : byte + 1 + bits * (n - 1) + 1 : bits] |= high.to(torch.uint8)
    # A one-row slice counts as contiguous whatever its stride, which view() then refuses: copy explicitly.
    return stream[:, : words * 4].clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """Unsigned codes (rows, k) uint8 of dense words (rows, ceil(k*bits/32)) int32: the inverse of `pack`.

    Raises:
        ValueError: shape or type do not belong to `k` codes of `bits` bits.
    """
    _check_bits(bits)
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[1] != words_per_row(k, bits):
        raise ValueError(
            f"unpack: {k} codes of {bits} bits lie in int32 words of shape (rows, {words_per_row(k, bits)}), "
            f"got {words.dtype} of shape {tuple(words.shape)}"
        )
    rows = words.shape[0]
    if rows == 0 or k == 0:
        return torch.empty((rows, k), dtype=torch.uint8, device=words.device)
    # A view with one row counts as contiguous whatever its stride, which view() then refuses: copy it explicitly.
    words = words.contiguous() if words.stride(-1) == 1 else words.clone(memory_format=torch.contiguous_format)
    stream = words.view(torch.uint8)
    if bits == 8:
        return stream[:, :k].clone()  # a copy: codes never alias the words
    codes = torch.empty((rows, k), dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for lane in range(min(8, k)):
        n = codes[:, lane::8].shape[1]
        byte, shift = divmod(lane * bits, 8)
        value = stream[:, byte : byte + bits * (n - 1) + 1 : bits] >> shift
        if shift + bits > 8:
            value = value | (stream[:, byte + 1 : byte + 1 + bits * (n - 1) + 1 : bits] << (8 - shift))
        codes[:, lane::8] = value & mask
    return codes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: the dense layout holds 1 to 8 bits")
