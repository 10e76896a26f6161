"""Attention over a packed cache: the compiled kernels against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import attention, native
from laconic.kernels.attention import BLOCK, dequantize_tokens, quantize_tokens

compiled = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")
ISAS = range(native.load().best_isa() + 1) if native.load() is not None else ()

# kv heads, queries a head, q_len, numbers of a key, of a value
SHAPES = [
    (2, 1, 1, 64, 64),
    (1, 3, 2, 32, 48),
    (2, 4, 1, 128, 128),
    (1, 7, 1, 20, 9),
    (3, 1, 8, 16, 16),
    (1, 1, 3, 7, 40),
]
SPANS = [(0, 5), (96, 0), (64, 33), (1120, 40), (0, 1100)]  # packed and recent tokens


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def store(
    x: Tensor, bits: int, groups: int, dtype: torch.dtype, by_channel: bool, spare: int = BLOCK
) -> tuple[Tensor, ...]:
    """Codes, scale and low of tokens, with room for more that is filled with what must not be read."""
    parts = quantize_tokens(x, bits, x.shape[-1] // groups, dtype, by_channel)
    room = [parts[0].new_full((*x.shape[:2], spare, parts[0].shape[-1]), -1)]
    more = spare // BLOCK if by_channel else spare
    room += [p.new_full((*x.shape[:2], more, p.shape[-1]), torch.nan) for p in parts[1:]]
    return tuple(torch.cat([p, r], 2).contiguous() for p, r in zip(parts, room, strict=True))


def cache(
    shape: tuple[int, ...], span: tuple[int, int], bits: tuple[int, int] = (8, 8), *, batch: int = 1, groups: int = 1,
    dtype: torch.dtype = torch.float16, floats: torch.dtype = torch.float32, by_channel: bool = False,
    size: float = 1.0,
) -> tuple[list[Tensor | None], dict[str, Any]]:  # fmt: skip
    """Operands of the op and what it is told, for a random cache."""
    heads, shared, q_len, dim, v_dim = shape
    packed, recent = span
    q = noise(batch, heads * shared, q_len, dim) * size
    k, v = noise(batch, heads, recent + 3, dim, dtype=floats), noise(batch, heads, recent + 3, v_dim, dtype=floats)
    k[:, :, recent:] = v[:, :, recent:] = torch.nan
    old_k, old_v = noise(batch, heads, packed, dim) * 2 + 1, noise(batch, heads, packed, v_dim)
    keys = store(old_k, bits[0], groups, dtype, by_channel) if packed else (None,) * 3
    values = store(old_v, bits[1], groups, dtype, False) if packed else (None,) * 3
    told = {"recent": recent, "packed": packed, "k_bits": bits[0], "v_bits": bits[1], "v_dim": v_dim}
    return [q, k, v, *keys, *values], told


def close(got: Tensor, want: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * size)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (4, 2)])
def test_equals_the_reference(bits: tuple[int, int], isa: int) -> None:
    for shape in SHAPES:
        for span in SPANS:
            for by_channel in (False, True):
                operands, told = cache(shape, span, bits, batch=2, by_channel=by_channel)
                for causal in (False, True):
                    got = attention.attend(*operands, **told, causal=causal, isa=isa)
                    close(got, attention._attend(*operands, **told, causal=causal))


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dim", "groups"), [(64, 4), (128, 2), (96, 2), (48, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_groups_and_types_of_scales(dim: int, groups: int, dtype: torch.dtype, isa: int) -> None:
    for bits in ((8, 2), (4, 4), (2, 8)):
        operands, told = cache((2, 5, 1, dim, dim), (160, 7), bits, groups=groups, dtype=dtype)
        close(attention.attend(*operands, **told, isa=isa), attention._attend(*operands, **told))


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("floats", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_alone_equal_torch(floats: torch.dtype, isa: int) -> None:
    for shape in SHAPES:
        (q, k, v, *_), told = cache(shape, (0, 700), floats=floats)
        want = F.scaled_dot_product_attention(q, k[:, :, :700].float(), v[:, :, :700].float(), enable_gqa=True)
        close(attention.attend(q, k, v, **told, isa=isa), want)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_masks_of_every_shape_and_kind(isa: int) -> None:
    operands, told = cache((2, 3, 4, 32, 32), (64, 21), (4, 4), batch=3)
    for shape in ((3, 6, 4, 85), (3, 1, 1, 85), (1, 6, 1, 85), (1, 1, 4, 90), (4, 85), (85,)):
        kept = noise(*shape) > 0
        added = noise(*shape).masked_fill(noise(*shape) > 1, -torch.inf)
        wide = torch.stack([added, added], -1)[..., 0]  # strides of 2
        for mask in (kept, added, wide, added.to(torch.bfloat16)):
            for causal in (False, True):
                got = attention.attend(*operands, mask, **told, causal=causal, isa=isa)
                close(got, attention._attend(*operands, mask, **told, causal=causal))


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_a_query_that_sees_nothing_gives_zeros(isa: int) -> None:
    operands, told = cache((1, 2, 2, 32, 32), (544, 5), batch=2)
    mask = torch.ones((2, 1, 2, 549), dtype=torch.bool)
    mask[0, :, 1] = False
    mask[1, :, :, :512] = False  # a whole range of tokens
    got = attention.attend(*operands, mask, **told, isa=isa)
    assert torch.equal(got[0, :, 1], torch.zeros_like(got[0, :, 1])) and got.isfinite().all()
    close(got, attention._attend(*operands, mask, **told))
    q = operands[0]
    assert torch.equal(attention.attend(q, isa=isa), torch.zeros_like(q))
    assert attention.attend(q[:, :, :0], *operands[1:], **told, isa=isa).shape == (2, 2, 0, 32)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e3, 1e30])
def test_extreme_scores(size: float, isa: int) -> None:
    operands, told = cache((2, 2, 1, 64, 64), (96, 40), (8, 8), dtype=torch.float32, size=size)
    got, want = attention.attend(*operands, **told, isa=isa), attention._attend(*operands, **told)
    assert got.isfinite().all()
    # Scores are rounded relative to their size, and the softmax of 10^3 and more is a choice of one token.
    close(got, want, size=max(1.0, size) if size < 1e4 else 1e5)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_not_lost(isa: int) -> None:
    for where in range(3):
        operands, told = cache((1, 1, 1, 32, 32), (0, 600))
        operands[where] = operands[where].clone()
        operands[where][0, 0, 0, 3] = torch.nan
        assert attention.attend(*operands, **told, isa=isa).isnan().any(), where


@compiled
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_same_bits_for_any_number_of_threads_and_from_run_to_run(bits: int) -> None:
    operands, told = cache((2, 3, 2, 64, 64), (1536, 37), (bits, bits), by_channel=True)
    first = attention.attend(*operands, **told, threads=1)
    for threads in (1, 2, 3, 4):
        assert torch.equal(first, attention.attend(*operands, **told, threads=threads))


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_is_bit_equal(bits: int, dtype: torch.dtype, isa: int) -> None:
    for dim, groups in ((64, 1), (64, 4), (7, 1), (33, 1), (96, 2), (1, 1)):
        for by_channel in (False, True):
            x = noise(2, 3, 64, dim)
            x[0, 0] *= 1e-6  # float16 has few bits there
            x[0, 1] = 0.5  # no range at all
            x[0, 2] *= 1e6  # beyond float16
            x[1, 0] = x[1, 0].round()  # ties
            room = store(x, bits, groups, dtype, by_channel)
            want = [p.clone() for p in room]
            fresh = noise(2, 3, 32, dim)
            for run, parts in ((attention._append, want), (attention.append, room)):
                told = {"isa": isa, "threads": 3} if run is attention.append else {}
                run(x, *parts, at=0, bits=bits, **told)
                run(fresh, *parts, at=64, bits=bits, **told)
            for got, right in zip(room, want, strict=True):
                assert torch.equal(got, right) and not got.isnan().any()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("by_channel", [False, True])
def test_what_is_packed_is_within_half_a_step(bits: int, by_channel: bool) -> None:
    x = noise(2, 2, 64, 32)
    codes, scale, low = quantize_tokens(x, bits, 16, torch.float32, by_channel)
    back = dequantize_tokens(codes, scale, low, bits, 32, 64)
    steps = scale.repeat_interleave(BLOCK, 2) if by_channel else scale.repeat_interleave(16, -1)
    assert ((back - x).abs() <= steps * 0.5001).all()
    assert torch.equal(dequantize_tokens(codes, scale, low, bits, 32, 41), back[:, :, :41])


def test_nan_and_infinity_make_no_wild_codes() -> None:
    x = noise(1, 1, 32, 16)
    x[0, 0, 0, 0], x[0, 0, 1, 1] = torch.nan, torch.inf
    room = store(noise(1, 1, 32, 16), 4, 1, torch.float16, False)
    torch.ops.laconic.cache_append_(x, *room, at=0, bits=4)
    assert dequantize_tokens(*room, 4, 16, 32)[0, 0, 2:].isfinite().all()


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_ops_fall_back_where_the_kernels_do_not_reach(groups: int) -> None:
    operands, told = cache((1, 2, 1, 64, 64), (64, 9), (4, 2), groups=groups)  # 8 groups of 8: below a vector
    got = torch.ops.laconic.decode_attention(*operands, **told)
    close(got, attention._attend(*operands, **told))
    doubles = [x.double() if x is not None and i < 3 else x for i, x in enumerate(operands)]
    close(torch.ops.laconic.decode_attention(*doubles, **told).float(), got)
    x = noise(1, 1, 32, 64)
    room, want = (store(x, 4, groups, torch.float16, False) for _ in range(2))
    torch.ops.laconic.cache_append_(x, *room, at=3, bits=4)
    attention._append(x, *want, at=3, bits=4)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(room, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_any_float_type_and_strides(dtype: torch.dtype) -> None:
    operands, told = cache((2, 2, 1, 32, 32), (32, 5), floats=dtype)
    q = noise(1, 3, 8, 32).to(dtype).transpose(1, 2)[:, ::2, 1:2]  # neither contiguous nor aligned
    got = torch.ops.laconic.decode_attention(q, *operands[1:], **told)
    assert got.dtype == dtype
    want = attention._attend(q, *operands[1:], **told)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 2e-5, atol=1e-4)


def test_opcheck() -> None:
    operands, told = cache((1, 2, 1, 32, 32), (32, 5), (4, 4))
    torch.library.opcheck(torch.ops.laconic.decode_attention, tuple(operands), told)
    room = store(noise(1, 1, 32, 32), 4, 1, torch.float16, False)
    room = tuple(x.nan_to_num(0) for x in room)
    torch.library.opcheck(torch.ops.laconic.cache_append_, (noise(1, 1, 3, 32), *room), {"at": 2, "bits": 4})


@compiled
def test_what_does_not_fit_is_refused() -> None:
    operands, told = cache((2, 1, 1, 32, 32), (64, 5), (4, 4))
    op = torch.ops.laconic.decode_attention
    q, k, v, k_codes, k_scale, k_low, *values = operands
    with pytest.raises(ValueError, match="k has shape .*, must hold 9 tokens"):
        op(*operands, **{**told, "recent": 9})
    with pytest.raises(ValueError, match="2 tokens, but k_codes is None"):
        op(q, k, v, packed=2, recent=1)
    with pytest.raises(ValueError, match="3 heads of queries do not share 2"):
        op(noise(1, 3, 1, 32), *operands[1:], **told)
    with pytest.raises(ValueError, match="mask is for 60 tokens, the cache has 69"):
        op(*operands, torch.ones(60), **told)
    with pytest.raises(ValueError, match="codes have 4 words a token, 32 of 8 bits fill 8"):
        op(*operands, **{**told, "k_bits": 8})
    with pytest.raises(ValueError, match="scale has shape"):
        op(q, k, v, k_codes, k_scale[:, :, :70].contiguous(), k_low, *values, **told)
    with pytest.raises(ValueError, match="low is torch.float32"):
        op(q, k, v, k_codes, k_scale, k_low.float(), *values, **told)
    with pytest.raises(ValueError, match="threads is 0"):
        attention.attend(*operands, **told, threads=0)
    with pytest.raises(ValueError, match="isa is 9"):
        attention.attend(*operands, **told, isa=9)
    append = torch.ops.laconic.cache_append_
    x = noise(1, 2, 32, 32)
    with pytest.raises(ValueError, match="tokens 80 to 112 do not lie in a cache of 96"):
        append(x, k_codes, k_scale, k_low, at=80, bits=4)
    with pytest.raises(ValueError, match="bits is 3"):
        append(x, k_codes, k_scale, k_low, at=0, bits=3)
    by_channel = store(x, 4, 1, torch.float16, True)
    with pytest.raises(ValueError, match="need blocks of 32 tokens, got 31 at 0"):
        append(x[:, :, :31], *by_channel, at=0, bits=4)
