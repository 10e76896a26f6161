"""The base-3 layout of ternary codes: five to a byte, decoded by multiplications alone.

Code q_i = t_i + 1 in {0, 1, 2} of five consecutive elements of a row make a number, the first one its leading digit,
and the byte is that number as a fraction of 256, rounded up (the idea of llama.cpp's TQ1_0; its order of elements is
another):

    v = 81 q_0 + 27 q_1 + 9 q_2 + 3 q_3 + q_4        byte = ceil(256 v / 243)

    q_i = (((byte 3^i) mod 256) 3) >> 8

so that a decoder needs neither division nor table: it multiplies the byte by 3 within 8 bits, i times, and takes the
high part of a last multiplication. A row is padded to whole little-endian 32-bit words with t = 0: elements behind
its end have q = 1, and whole bytes of them are 128. Words are int32 (rows, ceil(k / 20)), 1.6 bits an element.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = 5  # to a byte
PER_WORD = 4 * DIGITS


def pack_base3(codes: Tensor) -> Tensor:
    """Words (rows, ceil(k / 20)) int32 of ternary codes (rows, k) uint8.

    Raises:
        ValueError: a code is not 0, 1 or 2, or the shape or type is another.
    """
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"pack_base3: codes are a uint8 matrix, got {codes.dtype} of shape {tuple(codes.shape)}")
    rows, k = codes.shape
    if codes.numel() and int(codes.max()) > 2:
        raise ValueError(f"pack_base3: code {int(codes.max())} is none of 0, 1, 2")
    words = -(-k // PER_WORD)
    if rows == 0 or words == 0:
        return torch.zeros((rows, words), dtype=torch.int32, device=codes.device)
    whole = torch.ones((rows, words * PER_WORD), dtype=torch.uint8, device=codes.device)
    whole[:, :k] = codes
    digits = whole.view(rows, words * 4, DIGITS)
    value = torch.zeros((rows, words * 4), dtype=torch.int32, device=codes.device)
    for i in range(DIGITS):
        value = value * 3 + digits[..., i]
    return ((value * 256 + 242) // 243).to(torch.uint8).view(torch.int32)


def unpack_base3(words: Tensor, k: int) -> Tensor:
    """Ternary codes (rows, k) uint8 of words (rows, ceil(k / 20)) int32: the inverse of `pack_base3`.

    Raises:
        ValueError: shape or type do not belong to `k` codes.
    """
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[1] != -(-k // PER_WORD):
        raise ValueError(
            f"unpack_base3: {k} ternary codes lie in int32 words of shape (rows, {-(-k // PER_WORD)}), got "
            f"{words.dtype} of shape {tuple(words.shape)}"
        )
    rows = words.shape[0]
    if rows == 0 or k == 0:
        return torch.empty((rows, k), dtype=torch.uint8, device=words.device)
    rest = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    digits = torch.empty((*rest.shape, DIGITS), dtype=torch.uint8, device=words.device)
    for i in range(DIGITS):
        digits[..., i] = (rest.to(torch.int32) * 3) >> 8
        rest = rest * 3  # modulo 256: what is left of the fraction
    return digits.view(rows, -1)[:, :k].contiguous()
