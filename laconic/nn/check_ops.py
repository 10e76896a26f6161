"""Every op of laconic on packed weights or a packed cache, against torch's own operation on the same numbers unpacked.

The reference goes by `laconic.numerics` alone: W = s (q - z), or s T[q], as float32, and then the float operation. What runs is
whatever is registered here, so a broken kernel, or one that was built for another machine, shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import sparse as _sparse  # noqa: F401 - registers torch.ops.laconic.sparse_linear
from laconic.kernels.attention import dequantize_tokens, quantize_tokens
from laconic.kernels.binary import pack_planes, pack_signs
from laconic.kernels.conv import pack_binary_weight, pack_int8_weight
from laconic.numerics import (
    NAMED,
    Binary,
    BlockSparse,
    Codebook,
    Int,
    Levels,
    NestedScales,
    Scale,
    Scheme,
    Sparse24,
    Ternary,
    affine_params,
    dequantize,
    mask_24,
    mask_blocks,
    quantize,
    read_scales,
)

from .packed import PackedParameterSpec, pack_tensors

__all__ = ["CASES", "check_op"]

Op = Callable[..., Tensor]
Case = tuple[str, Tensor, Tensor]  # what was tried, what the op gave, what is right

# Sums may be taken in another order than torch takes them; this is a part of the largest value of the result.
TOLERANCE = 1e-4


class _Packed(NamedTuple):
    """A packed matrix, and the float32 matrix (rows, k) that it stands for."""

    scheme: str
    operands: tuple[Tensor, Tensor, Tensor | None]  # codes, scale, zero
    weight: Tensor


def _matrices(rows: int, k: int) -> Iterator[_Packed]:
    """A (rows, k) matrix in schemes of every kind of element, zero point and granularity."""
    for scheme in (
        Scheme(Int(8), Scale("channel")),
        Scheme(Int(5), Scale("tensor"), zero="int"),
        Scheme(Int(4), Scale("group", group=16, dtype="float16")),
        Scheme(Int(3), Scale("group", group=5, dtype="float16"), zero="int"),
        Scheme(Int(2), Scale("group", group=16, dtype="bfloat16"), zero="real"),
        Scheme(Levels("nf4"), Scale("group", group=16, dtype="float16")),
        Scheme(Levels("fp4"), Scale("tensor")),
        Scheme(Ternary(), Scale("channel", dtype="float16", rule="absmean")),
        Scheme(Binary(), Scale("group", group=10, dtype="bfloat16", rule="absmean")),
        Scheme(Levels("nf8"), Scale("group", group=16, outer=NestedScales())),
        NAMED["nvfp4"],
        NAMED["mxfp6"],
        NAMED["fp8"],
        Scheme(Codebook(3), Scale("channel", dtype="float16")),
        Scheme(Codebook(5, 3), Scale("tensor")),
    ):
        if scheme.refusal(k):
            continue
        x = _noise(rows, k)
        scale, zero = affine_params(x, scheme)
        codes = quantize(x, scale, zero, scheme)
        stored = pack_tensors(PackedParameterSpec(scheme, (rows, k)), codes, scale, zero)
        beside = None if scheme.beside is None else stored[scheme.beside]
        operands = stored["packed"], read_scales(stored, scheme, scheme.scales(rows, k)), beside
        yield _Packed(str(scheme.plain), operands, dequantize(codes, scale, zero, scheme))


def _linear(op: Op) -> Iterator[Case]:
    for packed in _matrices(6, 37):
        for leading in ((), (3,), (2, 3)):
            x, bias, residual = _noise(*leading, 37), _noise(6), _noise(*leading, 6)
            got = op(x, *packed.operands, bias, residual, scheme=packed.scheme, act="silu")
            yield packed.scheme, got, F.silu(F.linear(x, packed.weight, bias)) + residual


def _embedding(op: Op) -> Iterator[Case]:
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    for packed in _matrices(9, 37):
        got = op(ids, *packed.operands, scheme=packed.scheme, dim=37, dtype=torch.float32)
        yield packed.scheme, got, F.embedding(ids, packed.weight)


def _conv(op: Op) -> Iterator[Case]:
    for float_conv, kernel in ((F.conv1d, (3,)), (F.conv2d, (3, 2)), (F.conv3d, (1, 2, 3))):
        n = len(kernel)
        options = {"stride": (2,) * n, "padding": (1,) * n, "dilation": (1,) * n, "groups": 2}
        inputs = 3 * 2  # of each group three
        k = 3 * math.prod(kernel)
        for packed in _matrices(4, k):
            x, bias = _noise(2, inputs, *(7,) * n), _noise(4)
            got = op(x, *packed.operands, bias, scheme=packed.scheme, kernel=kernel, **options)
            yield f"{n}d, {packed.scheme}", got, float_conv(x, packed.weight.view(4, 3, *kernel), bias, **options)


def _experts(op: Op) -> Iterator[Case]:
    index = torch.tensor([2, 0, 2, 2, 0])  # expert 1 is not picked
    for packed in _matrices(3 * 6, 37):
        x, bias, weight = _noise(5, 37), _noise(3, 6), packed.weight.view(3, 6, 37)
        want = torch.einsum("tk,tok->to", x, weight[index]) + bias[index]
        yield packed.scheme, op(x, index, *packed.operands, bias, out=6, scheme=packed.scheme), want


def _experts_input_grad(op: Op) -> Iterator[Case]:
    index = torch.tensor([2, 0, 2, 2, 0])
    for packed in _matrices(3 * 6, 37):
        grad = _noise(5, 6)
        want = torch.einsum("to,tok->tk", grad, packed.weight.view(3, 6, 37)[index])
        yield packed.scheme, op(grad, index, *packed.operands, k=37, scheme=packed.scheme), want


def _dequantize(op: Op) -> Iterator[Case]:
    for rows, k in ((6, 37), (1, 64), (0, 5)):
        for packed in _matrices(rows, k):
            got = op(*packed.operands, scheme=packed.scheme, k=k, dtype=torch.float32)
            yield f"{(rows, k)}, {packed.scheme}", got, packed.weight


def _sparse_matrices(rows: int, k: int) -> Iterator[tuple[dict[str, str], tuple[Tensor | None, ...], Tensor]]:
    """Format, operands and float32 matrix: two of four and blocks, in every type of values."""
    x = _noise(rows, k)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        two = Sparse24.pack(x * mask_24(x), dtype)
        yield {"format": two.format}, (two.values, two.positions, None, two.scale), two.unpack()
        for block in ((1, 4), (3, 2)):
            some = BlockSparse.pack(x * mask_blocks(x, block, 0.4), block, dtype)
            yield {"format": some.format}, (some.values, some.columns, some.starts, some.scale), some.unpack()


def _sparse_linear(op: Op) -> Iterator[Case]:
    for how, operands, weight in _sparse_matrices(6, 36):
        for leading in ((), (3,), (2, 3)):
            x, bias = _noise(*leading, 36), _noise(6)
            got = op(x, *operands, bias, **how, act="silu")
            yield how["format"], got, F.silu(F.linear(x, weight, bias))


def _sparse_dense(op: Op) -> Iterator[Case]:
    for how, operands, weight in _sparse_matrices(6, 36):
        yield how["format"], op(*operands, **how, k=36, dtype=torch.float32), weight


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def _binary_linear(op: Op) -> Iterator[Case]:
    for k in (1, 31, 64, 257):
        for leading in ((), (3,), (2, 3)):
            x, weight, scale, bias = _noise(*leading, k), _noise(6, k), _noise(6).abs() + 0.1, _noise(6)
            want = F.linear(_sign(x), _sign(weight)) * scale + bias
            yield f"{leading} of {k}", op(x, pack_signs(weight), scale, bias), want


def _bit_serial_linear(op: Op) -> Iterator[Case]:
    for k in (33, 128):
        for bits in (1, 2, 3, 4):
            for x_bits in (1, 2, 4):
                # Bipolar numbers: sum_i 2^i (2 b_i - 1), odd and between +-(2^bits - 1).
                codes = (_noise(6, k) * 100).int().remainder(1 << bits)
                steps = torch.tensor(0.25)
                x = (2 * (_noise(3, k) * 100).int().remainder(1 << x_bits) - (1 << x_bits) + 1).float() * steps
                planes = pack_planes(codes.to(torch.uint8), bits)
                got = op(x, planes, torch.tensor([0.5]), x_scale=steps.view(1), bits=x_bits)
                weight = (2 * codes - (1 << bits) + 1).float() * 0.5
                yield f"{bits} by {x_bits} bits, {k}", got, F.linear(x, weight)


def _convolutions() -> Iterator[tuple[str, Tensor, Tensor, Tensor, dict[str, Any]]]:
    for channels in (3, 32, 40):
        for stride, padding in ((1, 0), (2, 1)):
            x, weight, bias = _noise(2, 2 * channels, 7, 6), _noise(4, channels, 3, 2), _noise(4)
            options = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1), "groups": 2}
            yield f"{channels} channels, {options}", x, weight, bias, options


def _binary_conv2d(op: Op) -> Iterator[Case]:
    for case, x, weight, bias, options in _convolutions():
        scale = torch.linspace(0.5, 1.5, 4)
        want = F.conv2d(_sign(x), _sign(weight), None, **options) * scale[:, None, None] + bias[:, None, None]
        yield case, op(x, pack_binary_weight(weight), scale, bias, **options), want


def _int8_conv2d(op: Op) -> Iterator[Case]:
    for case, x, weight, bias, options in _convolutions():
        codes, step, scale = (
            (weight * 40).round().clamp(-127, 127).to(torch.int8),
            torch.tensor([1 / 32]),
            torch.tensor([0.5]),
        )
        rounded = (x * 32).round().clamp(-128, 127) / 32
        want = F.conv2d(rounded, codes.float() * 0.5, bias, **options)
        yield case, op(x, pack_int8_weight(codes), scale, bias, step, signed=True, **options), want


def _decode_attention(op: Op) -> Iterator[Case]:
    for bits in (8, 4, 2):
        for packed, recent in ((64, 5), (32, 0), (0, 9)):
            q, k, v = _noise(2, 4, 1, 32), _noise(2, 2, packed + recent, 32), -_noise(2, 2, packed + recent, 32).flip(2)
            stored = [
                quantize_tokens(t[:, :, :packed], bits, 16, torch.float16) if packed else (None,) * 3 for t in (k, v)
            ]
            held = [t[:, :, packed:] if recent else None for t in (k, v)]
            got = op(q, *held, *stored[0], *stored[1], recent=recent, packed=packed, k_bits=bits, v_bits=bits, v_dim=32)
            if packed:
                back = [dequantize_tokens(*parts, bits, 32, packed) for parts in stored]
                k, v = (torch.cat([a, t[:, :, packed:]], 2) for a, t in zip(back, (k, v), strict=True))
            yield (
                f"{bits} bits, {packed} + {recent} tokens",
                got,
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            )


def _cache_append_(op: Op) -> Iterator[Case]:
    for bits in (8, 4, 2):
        for at, n in ((0, 5), (3, 1)):
            x = _noise(2, 2, n, 32)
            room = quantize_tokens(torch.zeros(2, 2, 16, 32), bits, 16, torch.float16)
            op(x, *room, at=at, bits=bits)
            want = torch.zeros(2, 2, 16, 32)
            want[:, :, at : at + n] = dequantize_tokens(*quantize_tokens(x, bits, 16, torch.float16), bits, 32, n)
            yield f"{bits} bits, {n} tokens at {at}", dequantize_tokens(*room, bits, 32, 16), want


CASES: dict[str, Callable[[Op], Iterator[Case]]] = {
    "linear": _linear,
    "embedding": _embedding,
    "conv": _conv,
    "experts": _experts,
    "experts_input_grad": _experts_input_grad,
    "dequantize": _dequantize,
    "sparse_linear": _sparse_linear,
    "sparse_dense": _sparse_dense,
    "binary_linear": _binary_linear,
    "bit_serial_linear": _bit_serial_linear,
    "binary_conv2d": _binary_conv2d,
    "int8_conv2d": _int8_conv2d,
    "decode_attention": _decode_attention,
    "cache_append_": _cache_append_,
}


def check_op(name: str, device: str = "cpu") -> str:
    """Run `torch.ops.laconic.NAME` on its cases on a device, and say what was compared.

    Raises:
        AssertionError: naming the first case that is wrong, and by how much.
    """
    op = getattr(torch.ops.laconic, name)

    def on_device(*operands: Any, **options: Any) -> Any:
        found = op(*(x.to(device) if isinstance(x, Tensor) else x for x in operands), **options)
        return found if found is None else found.cpu()

    count, worst = 0, 0.0
    with torch.no_grad():
        for case, got, want in CASES[name](on_device):
            if got.shape != want.shape or got.dtype != want.dtype:
                raise AssertionError(
                    f"{case}: {got.dtype} {tuple(got.shape)} where {want.dtype} {tuple(want.shape)} was due"
                )
            off = float((got - want).abs().max() / want.abs().max()) if want.numel() else 0.0
            if not off <= TOLERANCE:  # nan, too
                raise AssertionError(f"{case}: off by {off:.2g} of the largest value, where {TOLERANCE:.0e} is allowed")
            count, worst = count + 1, max(worst, off)
    return f"{count} cases, off by {worst:.1g} of the largest value at most"


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
