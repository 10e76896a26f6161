"""`bitplane`: the identities for any numbers of bits and lengths, affine codes, the layer and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.numerics import NotFinite
from laconic.quant import BitPlaneLinear, affine_product, bipolar_of_affine, bitplane_matmul, pack_bitplanes
from laconic.testing import Example

EXAMPLES = [
    Example(
        lambda **options: BitPlaneLinear(40, 6, bits_w=2, bits_a=4, **options), kind="Layer", inputs=[(3, 5, 40)],
        wrong=[(3, 5, 39)], stated={"output": (3, 5, 6)},
    ),
    Example(
        lambda: BitPlaneLinear(33, 4, False, bits_w=6, bits_a=8), kind="Layer", inputs=[(4, 33)], wrong=[(4, 32)],
        stated={"output": (4, 4)},
    ),
]  # fmt: skip


def codes(rows: int, k: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, k), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("p", range(1, 9))
def test_equation(p: int) -> None:
    for q, k in ((1, 1), (2, 31), (3, 32), (8 - p // 2, 300), (4, 65)):
        x, w = codes(3, k, p, 1), codes(2, k, q, 2)
        got = bitplane_matmul(pack_bitplanes(x, p), pack_bitplanes(w, q), k, p, q)
        for t in range(3):
            for n in range(2):
                total = 0
                for i in range(p):
                    for j in range(q):
                        differ = int((((x[t] >> i) & 1) ^ ((w[n] >> j) & 1)).sum())
                        total += 2 ** (i + j) * (k - 2 * differ)
                v = sum((2 * int(a) - 2**p + 1) * (2 * int(b) - 2**q + 1) for a, b in zip(x[t], w[n], strict=True))
                assert int(got[t, n]) == total == v


@pytest.mark.parametrize(("p", "q", "k"), [(4, 4, 50), (8, 2, 33), (1, 3, 7)])
def test_affine_codes_are_bipolar_and_a_constant(p: int, q: int, k: int) -> None:
    x, w = codes(4, k, p, 3), codes(5, k, q, 4)
    generator = torch.Generator().manual_seed(0)
    sx, sw = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (4, 5))
    zx, zw = torch.tensor([0.0, 1.0, 2.0, 2**p - 1.0]).double(), (2**q - 1) / 2
    a, b = bipolar_of_affine(sx, zx, p), bipolar_of_affine(sw, zw, q)
    assert torch.equal(b.offset, torch.zeros(5, dtype=torch.float64))
    got = affine_product(pack_bitplanes(x, p), pack_bitplanes(w, q), k, a, b)
    want = (sx[:, None] * (x.double() - zx[:, None])) @ (sw[:, None] * (w.double() - zw)).T
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("bits_w", "bits_a"), [(1, 1), (2, 4), (8, 8), (3, 5)])
def test_the_layer_is_the_product_of_what_it_stores(bits_w: int, bits_a: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(70, 9), torch.randn(2, 3, 70)
    layer = BitPlaneLinear.from_float(linear, bits_w=bits_w, bits_a=bits_a)
    s = x.abs().amax(-1, keepdim=True) / 2**bits_a if bits_a > 1 else x.abs().mean(-1, keepdim=True)
    top = 2**bits_a - 1
    rounded = s * (2 * torch.floor(x / (2 * s)) + 1).clamp(-top, top)
    want = rounded @ layer.weight.T + linear.bias
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    error = (layer.weight - linear.weight).abs()
    scale = layer.scale[:, None]
    assert bits_w == 1 or bool((error <= scale * (1 + 1e-5)).all())
    stored = sum(t.numel() * t.element_size() for t in (layer.planes, layer.scale))
    assert stored == 4 * (bits_w * 9 * 3 + 9)


def test_more_bits_come_nearer_and_eight_are_close() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 32), torch.randn(16, 256)
    with torch.no_grad():
        want = linear(x)
        errors = [
            float((BitPlaneLinear.from_float(linear, bits_w=b, bits_a=b)(x) - want).norm() / want.norm())
            for b in (1, 2, 4, 8)
        ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


def test_gradient() -> None:
    layer = BitPlaneLinear(12, 5, bits_w=3, bits_a=2)
    x, upstream = torch.randn(2, 4, 12, requires_grad=True), torch.randn(2, 4, 5)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))
    assert torch.equal(layer(x).detach(), layer(x.detach()).detach())


def test_edges() -> None:
    layer = BitPlaneLinear(8, 3)
    with torch.no_grad():
        assert layer(torch.zeros(0, 8)).shape == (0, 3)
        zeros = layer(torch.zeros(1, 8))  # a row of zeros has the scale 1: each of them is +1
        torch.testing.assert_close(zeros, (layer.weight.sum(1) + layer.bias)[None])
    bare = BitPlaneLinear(8, 3, device="meta", dtype=torch.bfloat16)
    assert bare.planes.is_meta and bare.bias.dtype == torch.bfloat16
    dead = nn.Linear(8, 3)
    dead.weight.data[1] = 0
    assert math.isfinite(BitPlaneLinear.from_float(dead)(torch.ones(1, 8)).sum().item())


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="bits_a is 9, must be 1 to 8"):
        BitPlaneLinear(4, 4, bits_a=9)
    with pytest.raises(BadInput, match=r"weight has shape \(4, 3\), not \(4, 4\)"):
        BitPlaneLinear(4, 4).round_(torch.zeros(4, 3))
    broken = nn.Linear(4, 4)
    broken.weight.data[0, 0] = math.nan
    with pytest.raises(NotFinite, match=r"head\.weight"):
        BitPlaneLinear.from_float(broken, name="head.weight")
    planes = pack_bitplanes(codes(2, 9, 2, 0), 2)
    with pytest.raises(ValueError, match="a_planes has 2 planes, and 3 bits were said"):
        bitplane_matmul(planes, planes, 9, 3, 2)
