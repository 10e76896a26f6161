"""Keys and values in groups with a clipped range, as `rotatekv` stores them, and the tokens that stay as they are.

Per token, n channels are stored in groups of g, with clip c and b bits:

    s = c (max - min) / (2^b - 1)   z = round(-c min / s)   q = clamp(round(x / s) + z, 0, 2^b - 1)      x^ = s (q - z)

Keys may be rotated before, by a Hadamard matrix over heads together. The sinks of a sequence are the tokens that hold
the largest |entries| of what enters a block.

Example:
    >>> import torch
    >>> kv_round(torch.tensor([[0.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]]), bits=2, group=4, clip=1.0).tolist()
    [[0.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from laconic.errors import BadInput

from .hadamard import hadamard, hadamard_block

__all__ = [
    "KVCodes", "grouped_size", "kv_codes", "kv_round", "kv_values", "rotate_heads", "sink_mask", "sink_tokens",
]  # fmt: skip

CLIP = 0.8  # at 2 bits


class KVCodes(NamedTuple):
    """Tokens in groups: codes (..., n) uint8, scale and zero (..., n / group)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def kv_codes(
    x: Tensor, bits: int = 2, group: int = 128, clip: float | None = None, dtype: torch.dtype = torch.float32
) -> KVCodes:
    """Codes of tokens x (..., n).

    Args:
        x: floating.
        bits: b, 1 to 8.
        group: g, a divisor of n.
        clip: c; 0.8 at 2 bits and 1 at others by default.
        dtype: of scale and zero, which are rounded to it before codes are computed.

    Raises:
        BadInput: the bits, the clip or the group are not possible.
    """
    if not 1 <= bits <= 8:
        raise BadInput(f"kv_codes: bits={bits}: keys and values have 1 to 8")
    c = (CLIP if bits == 2 else 1.0) if clip is None else clip
    if not 0 < c <= 1:
        raise BadInput(f"kv_codes: clip={clip} is not above 0 and at most 1")
    if group < 1 or x.shape[-1] % group:
        raise BadInput(f"kv_codes: groups of {group} do not divide {x.shape[-1]} channels")
    top = (1 << bits) - 1
    parts = x.float().unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    # A group of one value v: s = |v| and z = -sign(v), so that code 0 or 2 gives v back.
    scale = torch.where(high > low, (high - low) * c / top, torch.where(low == 0, 1.0, low.abs())).to(dtype).float()
    tiny = torch.finfo(dtype).tiny
    scale = scale.clamp(min=tiny)
    zero = torch.where(high > low, torch.round(-low * c / scale), -low.sign()).to(dtype).float()
    codes = (torch.round(parts / scale) + zero).clamp(0, top)
    return KVCodes(codes.to(torch.uint8).flatten(-2), scale[..., 0].to(dtype), zero[..., 0].to(dtype))


def kv_values(stored: KVCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """x^ (..., n) of codes."""
    group = stored.codes.shape[-1] // stored.scale.shape[-1]
    parts = stored.codes.float().unflatten(-1, (-1, group))
    return (stored.scale.float()[..., None] * (parts - stored.zero.float()[..., None])).flatten(-2).to(dtype)


def kv_round(
    x: Tensor, bits: int = 2, group: int = 128, clip: float | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x^ of tokens x (..., n) in x's type: what a cache would give back. See `kv_codes`."""
    return kv_values(kv_codes(x, bits, group, clip, dtype), x.dtype)


def rotate_heads(x: Tensor, size: int, transpose: bool = False) -> Tensor:
    """x (..., n) with H on runs of `size` channels; with H^T, which takes that back, if `transpose`."""
    return hadamard(x.unflatten(-1, (-1, size)), transpose=transpose).flatten(-2)


def grouped_size(heads: int, width: int, together: int = 4) -> int:
    """Channels that H mixes: as many heads as `together` and their number have in common, as far as there is an H."""
    return hadamard_block(math.gcd(heads, together) * width)


def sink_tokens(hidden: Tensor, top: int = 20) -> Tensor:
    """Token of each of the `top` largest |entries| of hidden (N, T, d), in falling order, repeats kept: (N, top)."""
    flat = hidden.abs().flatten(-2)
    return flat.topk(min(top, flat.shape[-1]), dim=-1).indices // hidden.shape[-1]


def sink_mask(hidden: Tensor, top: int) -> Tensor:
    """(N, T) bool: the tokens that `sink_tokens` names."""
    mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.scatter(1, sink_tokens(hidden, top), True)
