"""Attention over a cache of keys and values for decoding, `torch.ops.laconic.{decode_attention,cache_append_}`.

A cache has two spans, one after the other in position: packed tokens, and recent ones as floats. Either may be empty: a
plain float cache is one of recent tokens alone. Every tensor has room for `capacity` tokens, of which the first
`packed` or `recent` count; nothing moves when one is added.

Packed keys or values are `codes` (B, H, capacity, words) int32, the dense words of `laconic.numerics.pack` a token, and
`scale` and `low` of one float type,

    x[b, h, t, i] = low[b, h, t, g] + scale[b, h, t, g] code[b, h, t, i],   g = i // group,

of shape (B, H, capacity, G). Keys may have theirs by channel over blocks of 32 tokens instead (capacity is a multiple
of 32), shape (B, H, capacity / 32, D), with low and scale [b, h, t // 32, i]: keys have channels of outliers that every
token shares, and 2 bits are hardly enough otherwise (KIVI, Liu et al. 2024, arXiv 2402.02750).

What is here in plain PyTorch is the reference. The compiled kernels never write a dequantized key or value to memory.
They sum in another order, so results agree to rounding of float32, and are the same bits for any number of threads;
packing is bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laconic.kernels import native, ops  # ops opens the library that these join
from laconic.numerics import pack, unpack

__all__ = ["BITS", "BLOCK", "append", "attend", "dequantize_tokens", "is_by_channel", "quantize_tokens"]

BITS = (8, 4, 2)
BLOCK = 32  # tokens that share a channel's scale
GROUP = 16  # a group smaller than a token's numbers is a multiple of it: the widest vector of the kernels

_FLOATS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

_library = torch.library.Library("laconic", "FRAGMENT")
_library.define(
    "decode_attention(Tensor q, Tensor? k=None, Tensor? v=None, Tensor? k_codes=None, Tensor? k_scale=None, "
    "Tensor? k_low=None, Tensor? v_codes=None, Tensor? v_scale=None, Tensor? v_low=None, Tensor? mask=None, "
    "*, int recent=0, int packed=0, int k_bits=8, int v_bits=8, float? scale=None, int v_dim=0, bool causal=False) "
    "-> Tensor"
)
_library.define(
    "cache_append_(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) low, *, int at, int bits) -> ()"
)


def is_by_channel(codes: Tensor, scale: Tensor) -> bool:
    """Whether scales belong to channels of a block of tokens, by their shape."""
    return scale.shape[2] != codes.shape[2]


# --- the references -------------------------------------------------------------------------------------------------


def quantize_tokens(
    x: Tensor, bits: int, group: int, dtype: torch.dtype, by_channel: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, H, N, words) int32, scale and low of tokens x (B, H, N, D).

    Over each group, low = min x and scale = (max x - min x) / (2^bits - 1), both rounded to `dtype`, and
    code = clamp(round((x - low) / scale), 0, 2^bits - 1), or 0 where scale is 0.

    Args:
        x: floating; computed with in float32.
        bits: 8, 4 or 2.
        group: numbers of a token that share a scale, a divisor of D; unused by channel.
        dtype: of scale and low. Numbers beyond float16 saturate.
        by_channel: a scale for each of D channels over 32 tokens; N is a multiple of 32.
    """
    batch, heads, n, dim = x.shape
    parts = (
        x.float().view(batch, heads, -1, BLOCK, dim) if by_channel else x.float().reshape(batch, heads, n, -1, group)
    )
    over = -2 if by_channel else -1
    least, most = parts.amin(over, keepdim=True), parts.amax(over, keepdim=True)
    low, scale = _stored(least, dtype), _stored((most - least) / ((1 << bits) - 1), dtype)
    step = torch.where(scale == 0, torch.inf, scale.float())
    codes = ((parts - low.float()) / step).nan_to_num(0).clamp(0, (1 << bits) - 1).round()
    words = pack(codes.reshape(-1, dim).to(torch.uint8), bits)
    return words.view(batch, heads, n, -1), scale.squeeze(over), low.squeeze(over)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As stored; saturates, since an infinite scale would lose every code."""
    if dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)
    return x.to(dtype)


def dequantize_tokens(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, dim: int, n: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The first n tokens (B, H, n, dim) of a packed cache."""
    batch, heads = codes.shape[:2]
    rows = codes[:, :, :n].reshape(-1, codes.shape[-1]).contiguous()
    fast = native.load() is not None and codes.device.type == "cpu"  # both give the same bits
    x = (native.unpack(rows, bits, dim) if fast else unpack(rows, bits, dim)).view(batch, heads, n, dim).float()
    if is_by_channel(codes, scale):
        blocks = -(-n // BLOCK)
        s, z = (p[:, :, :blocks].float().repeat_interleave(BLOCK, 2)[:, :, :n] for p in (scale, low))
    else:
        s, z = (p[:, :, :n].float().repeat_interleave(dim // p.shape[-1], -1) for p in (scale, low))
    return x.mul_(s).add_(z).to(dtype)


def _append(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, *, at: int, bits: int) -> None:
    _check_append(x, codes, scale, low, at, bits)
    if x.shape[2] == 0:
        return
    by_channel = is_by_channel(codes, scale)
    group = x.shape[-1] if by_channel else x.shape[-1] // scale.shape[-1]
    words, s, z = quantize_tokens(x, bits, group, scale.dtype, by_channel)
    first = at // BLOCK if by_channel else at
    codes[:, :, at : at + x.shape[2]] = words
    scale[:, :, first : first + s.shape[2]] = s
    low[:, :, first : first + s.shape[2]] = z


def _attend(
    q, k=None, v=None, k_codes=None, k_scale=None, k_low=None, v_codes=None, v_scale=None, v_low=None, mask=None,
    *, recent=0, packed=0, k_bits=8, v_bits=8, scale=None, v_dim=0, causal=False,
):  # fmt: skip
    _check_spans(q, k, v, k_codes, v_codes, recent, packed, (k_scale, k_low, v_scale, v_low))
    batch, heads, q_len, dim = q.shape
    v_dim = _value_dim(v, v_dim, dim)
    keys, values = [], []
    if packed:
        keys.append(dequantize_tokens(k_codes, k_scale, k_low, k_bits, dim, packed))
        values.append(dequantize_tokens(v_codes, v_scale, v_low, v_bits, v_dim, packed))
    if recent:
        keys.append(k[:, :, :recent].float())
        values.append(v[:, :, :recent].float())
    if not keys:
        return q.new_zeros((batch, heads, q_len, v_dim))
    all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)
    shared = heads // all_keys.shape[1]
    all_keys, all_values = all_keys.repeat_interleave(shared, 1), all_values.repeat_interleave(shared, 1)
    scores = (q.float() * (dim**-0.5 if scale is None else scale)) @ all_keys.transpose(-1, -2)
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal:
        n = scores.shape[-1]
        seen = torch.ones((q_len, n), dtype=torch.bool, device=q.device).tril(n - q_len)
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1)
    weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)  # no token to see: zeros
    return (weights @ all_values).to(q.dtype)


# --- the compiled kernels -------------------------------------------------------------------------------------------


def append(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    *,
    at: int,
    bits: int,
    threads: int | None = None,
    isa: int = -1,
) -> None:
    """Pack tokens x (B, H, N, D) into places at to at + N of a cache; see `torch.ops.laconic.cache_append_`.

    Raises:
        ValueError: a shape, a type or a number does not fit.
    """
    _check_append(x, codes, scale, low, at, bits)
    flat = x.float().contiguous()
    native.module().cache_append(
        _packed("cache_append_", codes, scale, low, bits, x.shape[-1]), flat.data_ptr(), flat.numel(), at, x.shape[2],
        torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_codes: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_low: Tensor | None = None,
    v_codes: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_low: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    recent: int = 0,
    packed: int = 0,
    k_bits: int = 8,
    v_bits: int = 8,
    scale: float | None = None,
    v_dim: int = 0,
    causal: bool = False,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """softmax(scale q K^T + mask) V over packed and recent tokens, (B, heads, q_len, v_dim) of q's type.

    Args:
        q: (B, heads, q_len, D), for few queries; heads is a multiple of those of the cache, neighbours share one.
        k: recent keys (B, H, capacity, D) and values (B, H, capacity, v_dim), floating; None with recent = 0.
        k_codes: packed keys and values, as at the top of this file; None with packed = 0.
        mask: bool, True where a token takes part, or float to be added; broadcast to (B, heads, q_len, N), where N is
            at least packed + recent. A query that sees no token gives zeros.
        recent: float tokens that count; packed: packed ones, which come before them.
        scale: of the products; None: D^(-1/2).
        v_dim: numbers of a packed value; 0: as v says, or D.
        causal: query j of q_len sees all tokens but the last q_len - 1 - j.

    Raises:
        ValueError: a shape, a type or a number does not fit.
    """
    _check_spans(q, k, v, k_codes, v_codes, recent, packed, (k_scale, k_low, v_scale, v_low))
    batch, heads, q_len, dim = q.shape
    v_dim = _value_dim(v, v_dim, dim)
    spans, lengths = [], []
    kv_heads = heads
    if packed and k_codes is not None:
        spans.append(_packed("decode_attention", k_codes, k_scale, k_low, k_bits, dim))
        spans.append(_packed("decode_attention", v_codes, v_scale, v_low, v_bits, v_dim))
        lengths.append(packed)
        kv_heads = k_codes.shape[1]
    if recent and k is not None:
        spans += [_floating("k", k), _floating("v", v)]
        lengths.append(recent)
        kv_heads = k.shape[1]
    out = torch.empty((batch, heads, q_len, v_dim), dtype=torch.float32)
    if not spans:
        return out.zero_().to(q.dtype)
    flat = q.float().contiguous()
    kind, where, length, strides = _mask_of(mask, (batch, heads, q_len), sum(lengths))
    native.module().decode_attention(
        flat.data_ptr(), flat.numel(), batch, heads, kv_heads, q_len, spans, lengths,
        where.data_ptr() if where is not None else 0, length, kind, *strides,
        dim**-0.5 if scale is None else scale, causal, out.data_ptr(), out.numel(),
        torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return out.to(q.dtype)


def _packed(op: str, codes: Tensor | None, scale: Tensor | None, low: Tensor | None, bits: int, dim: int) -> Any:
    """The extension's description of packed tokens: addresses of these tensors, which must stay alive."""
    assert codes is not None and scale is not None and low is not None  # the caller's checks have seen to it
    native.check(op, "codes", codes, (torch.int32,), 4)
    native.check(op, "scale", scale, tuple(_FLOATS), 4)
    native.check(op, "low", low, (scale.dtype,), 4)
    batch, heads, capacity, words = codes.shape
    by_channel = is_by_channel(codes, scale)
    want = (batch, heads, capacity // BLOCK, dim) if by_channel else (batch, heads, capacity, scale.shape[-1])
    if tuple(scale.shape) != want or scale.shape != low.shape:
        raise ValueError(f"{op}: scale has shape {tuple(scale.shape)}, low {tuple(low.shape)}, must be {want}")
    if words != -(-dim * bits // 32):
        raise ValueError(f"{op}: codes have {words} words a token, {dim} of {bits} bits fill {-(-dim * bits // 32)}")
    return native.module().CacheTokens(
        codes.data_ptr(), codes.numel(), scale.data_ptr(), scale.numel(), low.data_ptr(), low.numel(), bits,
        _FLOATS[scale.dtype], batch * heads, capacity, dim, dim // max(scale.shape[-1], 1), int(by_channel),
    )  # fmt: skip


def _floating(name: str, x: Tensor | None) -> Any:
    assert x is not None
    native.check("decode_attention", name, x, tuple(_FLOATS), 4)
    batch, heads, capacity, dim = x.shape
    return native.module().CacheTokens(
        x.data_ptr(), x.numel(), 0, 0, 0, 0, 0, _FLOATS[x.dtype], batch * heads, capacity, dim, dim, 0
    )


def _mask_of(
    mask: Tensor | None, shape: tuple[int, int, int], tokens: int
) -> tuple[int, Tensor | None, int, tuple[int, int, int]]:
    """Kind, tensor, elements that are reached, and strides over batch, head and query (0 where it is shared)."""
    if mask is None:
        return 0, None, 0, (0, 0, 0)
    if mask.dtype != torch.bool:
        mask = mask.float()
    if mask.stride(-1) != 1 and mask.shape[-1] != 1:
        mask = mask.contiguous()
    mask = mask.expand(*shape, mask.shape[-1])
    batch, head, query = (s if n > 1 else 0 for s, n in zip(mask.stride()[:3], mask.shape[:3], strict=True))
    stored = mask.untyped_storage().nbytes() // mask.element_size()
    reached = int(stored) - int(mask.storage_offset()) if mask.numel() else 0
    if mask.shape[-1] < tokens:
        raise ValueError(f"decode_attention: mask is for {mask.shape[-1]} tokens, the cache has {tokens}")
    return 2 if mask.dtype == torch.bool else 1, mask, reached, (batch, head, query)


# --- checks, shapes and dispatch ------------------------------------------------------------------------------------


def _check_append(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, at: int, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"cache_append_: bits is {bits}, must be 8, 4 or 2")
    if x.ndim != 4 or x.shape[:2] != codes.shape[:2]:
        raise ValueError(f"cache_append_: x has shape {tuple(x.shape)}, the cache {tuple(codes.shape)}")
    n, dim = x.shape[2], x.shape[3]
    if not 0 <= at <= codes.shape[2] - n:
        raise ValueError(f"cache_append_: tokens {at} to {at + n} do not lie in a cache of {codes.shape[2]}")
    if is_by_channel(codes, scale):
        if at % BLOCK or n % BLOCK:
            raise ValueError(f"cache_append_: scales by channel need blocks of {BLOCK} tokens, got {n} at {at}")
    elif not scale.shape[-1] or dim % scale.shape[-1]:
        raise ValueError(f"cache_append_: {scale.shape[-1]} groups do not divide {dim} numbers")


def _check_spans(
    q: Tensor, k: Any, v: Any, k_codes: Any, v_codes: Any, recent: int, packed: int, scales: tuple[Tensor | None, ...]
) -> None:
    if q.ndim != 4:
        raise ValueError(f"decode_attention: q has shape {tuple(q.shape)}, must be (batch, heads, q_len, dim)")
    for name, x, n in (("k", k, recent), ("v", v, recent), ("k_codes", k_codes, packed), ("v_codes", v_codes, packed)):
        if n == 0:
            continue
        if x is None:
            raise ValueError(f"decode_attention: {n} tokens, but {name} is None")
        if x.ndim != 4 or x.shape[0] != q.shape[0] or not 0 <= n <= x.shape[2]:
            raise ValueError(
                f"decode_attention: {name} has shape {tuple(x.shape)}, must hold {n} tokens of {q.shape[0]}"
            )
        if x.shape[1] == 0 or q.shape[1] % x.shape[1]:
            raise ValueError(f"decode_attention: {q.shape[1]} heads of queries do not share {x.shape[1]} of {name}")
    if packed and any(x is None for x in scales):
        raise ValueError("decode_attention: packed tokens need k_scale, k_low, v_scale and v_low")
    if recent and (k.shape[:2] != v.shape[:2] or k.shape[-1] != q.shape[-1]):
        raise ValueError(f"decode_attention: k has shape {tuple(k.shape)}, v {tuple(v.shape)}, q {tuple(q.shape)}")
    if recent and packed and k_codes.shape[:2] != k.shape[:2]:
        raise ValueError(f"decode_attention: k has shape {tuple(k.shape)}, k_codes {tuple(k_codes.shape)}")


def _value_dim(v: Tensor | None, v_dim: int, dim: int) -> int:
    return v_dim or (v.shape[-1] if v is not None else dim)


def _runs_native(*tensors: Tensor | None, groups: int = 1, group: int = 0) -> bool:
    if ops._by_reference or native.load() is None or (groups > 1 and group % GROUP):
        return False
    return all(x is None or (x.device.type == "cpu" and x.is_contiguous()) for x in tensors)


def _append_cpu(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, *, at: int, bits: int) -> None:
    groups = 1 if is_by_channel(codes, scale) else max(scale.shape[-1], 1)
    if x.dtype in _FLOATS and _runs_native(codes, scale, low, groups=groups, group=x.shape[-1] // groups):
        append(x, codes, scale, low, at=at, bits=bits)
    else:
        _append(x, codes, scale, low, at=at, bits=bits)


def _attend_cpu(
    q, k=None, v=None, k_codes=None, k_scale=None, k_low=None, v_codes=None, v_scale=None, v_low=None, mask=None,
    *, recent=0, packed=0, k_bits=8, v_bits=8, scale=None, v_dim=0, causal=False,
):  # fmt: skip
    _check_spans(q, k, v, k_codes, v_codes, recent, packed, (k_scale, k_low, v_scale, v_low))
    run: Callable[..., Tensor] = attend
    dims = ((k_codes, k_scale, q.shape[-1]), (v_codes, v_scale, _value_dim(v, v_dim, q.shape[-1])))
    for codes, scales, dim in dims if packed else ():
        groups = 1 if is_by_channel(codes, scales) else scales.shape[-1]
        if not _runs_native(codes, scales, groups=groups, group=dim // max(groups, 1)):
            run = _attend
    floats = (q, k, v) if recent else (q,)
    if any(x is not None and x.dtype not in _FLOATS for x in floats) or not _runs_native(k_low, v_low, *floats[1:]):
        run = _attend
    return run(
        q, k, v, k_codes, k_scale, k_low, v_codes, v_scale, v_low, mask, recent=recent, packed=packed, k_bits=k_bits,
        v_bits=v_bits, scale=scale, v_dim=v_dim, causal=causal,
    )  # fmt: skip


def _fake_append(x, codes, scale, low, *, at, bits):
    return None


def _fake_attend(
    q, k=None, v=None, k_codes=None, k_scale=None, k_low=None, v_codes=None, v_scale=None, v_low=None, mask=None,
    *, recent=0, packed=0, k_bits=8, v_bits=8, scale=None, v_dim=0, causal=False,
):  # fmt: skip
    return q.new_empty((*q.shape[:-1], _value_dim(v, v_dim, q.shape[-1])))


for _name, _reference, _fast, _fake in (
    ("decode_attention", _attend, _attend_cpu, _fake_attend),
    ("cache_append_", _append, _append_cpu, _fake_append),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    _library.impl(_name, _fast, "CPU")
    torch.library.register_fake(f"laconic::{_name}", _fake, lib=_library)
