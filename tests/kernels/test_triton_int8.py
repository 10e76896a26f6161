"""Triton's int8 kernels: codes equal to those of the token scheme, products exact up to their scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laconic.kernels import ops
from laconic.numerics import Int, Scale, Scheme, Ternary, affine_params, quantize
from tests.kernels.test_ops import noise, packed
from tests.kernels.triton_road import HAVE_TRITON, ROADS, device_of

if HAVE_TRITON:
    from laconic.kernels.triton import int8

TOKEN = Scheme(Int(8), Scale("token"))

SCHEMES = [
    Scheme(Int(bits), Scale(share, group=group, dtype=dtype), zero=zero)
    for bits, share, group, dtype, zero in (
        (8, "channel", None, "float32", "none"),
        (8, "tensor", None, "float32", "int"),
        (8, "group", 128, "float16", "int"),
        (7, "channel", None, "float16", "real"),
        (5, "group", 32, "float16", "int"),
        (4, "channel", None, "float16", "none"),
        (4, "group", 96, "float16", "none"),
        (4, "group", 500, "float16", "int"),
        (3, "group", 64, "bfloat16", "real"),
        (2, "tensor", None, "float32", "none"),
    )
]


@pytest.fixture(params=ROADS)
def device(request) -> torch.device:
    return device_of(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 33), (5, 4096), (2, 9000)])
def test_codes_are_those_of_the_token_scheme(device, dtype, m, k):
    x = (noise(m, k) * 10 ** noise(m, 1, seed=2)).to(dtype)
    x[0, 0] = 0
    scale, _ = affine_params(x.float(), TOKEN)
    want = quantize(x.float(), scale, None, TOKEN).short() - 128
    codes, found = int8.quantize_rows(x.to(device))
    assert torch.equal(found.cpu(), scale)
    assert torch.equal(codes.cpu().short(), want)


def test_codes_of_ties_zeros_and_no_rows(device):
    """Halves of a step go to the even code, as torch.round has it."""
    step = torch.arange(-254, 256).float() / 2  # the largest is 127.5, so the scale is 1
    codes, scale = int8.quantize_rows(torch.stack([step, torch.zeros(510)]).to(device))
    assert scale.flatten().tolist() == [1.0, 1.0]
    assert torch.equal(codes[0].cpu().float(), step.round().clamp(-128, 127)) and not codes[1].any()
    assert int8.quantize_rows(torch.empty(0, 7, device=device))[0].shape == (0, 7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 7, 33), (70, 37, 200), (5, 70, 384)])
def test_linear(device, scheme, m, n, k):
    w = packed(scheme, n, k)
    x, x_scale = int8.quantize_rows(noise(m, k).to(device))
    bias, residual = noise(n), noise(m, n, seed=3)
    moved = [t.to(device) if t is not None else None for t in w.operands]
    options = {"scheme": str(scheme), "dtype": torch.float32}
    found = int8.linear(x, x_scale, *moved, bias.to(device), residual.to(device), act="gelu", **options).cpu()
    exact = (x.cpu().double() * x_scale.cpu().double()) @ w.weight.double().T
    want = F.gelu(exact + bias.double()) + residual.double()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_types_and_activations(device, act):
    w = packed(SCHEMES[0], 9, 64)
    codes, scale, _ = (t.to(device) if t is not None else None for t in w.operands)
    x, x_scale = int8.quantize_rows(noise(6, 64).to(torch.bfloat16).to(device))
    want = ops.ACTIVATIONS[act]((x.cpu().double() * x_scale.cpu().double()) @ w.weight.double().T)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        found = int8.linear(x, x_scale, codes, scale, scheme=str(w.scheme), dtype=dtype, act=act).cpu()
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


def test_a_scale_for_all_and_codes_for_the_next_layer(device):
    """Static activations: one scale in, one scale out."""
    w, out_scale = packed(SCHEMES[0], 9, 64), 0.25
    codes, weight_scale, _ = (t.to(device) if t is not None else None for t in w.operands)
    x = torch.randint(-128, 128, (6, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.tensor([[0.02]], device=device)
    options = {"scheme": str(w.scheme), "dtype": torch.float32, "act": "relu"}
    y = int8.linear(x.to(device), scale, codes, weight_scale, **options)
    want = F.relu(0.02 * x.double() @ w.weight.double().T)
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-5, atol=1e-5)
    found = int8.linear(x.to(device), scale, codes, weight_scale, out_scale=out_scale, **options)
    assert found.dtype == torch.int8
    assert torch.equal(found.cpu().float(), (y.cpu() / out_scale).round().clamp(-128, 127))


def test_the_largest_sum_is_exact(device):
    """All codes at their ends, K long: sums beyond 2^24 would lose bits in float32."""
    k = 4096
    scheme = Scheme(Int(8), Scale("tensor"))
    codes = torch.zeros(1, k // 4, dtype=torch.int32)  # code 0 is -128
    codes[0, 0] = 1  # and one of them -127
    x, one = torch.full((1, k), -128, dtype=torch.int8), torch.ones(1, 1)
    moved = (t.to(device) for t in (x, one, codes, one))
    found = int8.linear(*moved, scheme=str(scheme), dtype=torch.float32)
    assert found.item() == 128 * 128 * k - 128


@pytest.mark.parametrize(
    ("scheme", "k", "says"),
    [
        (Scheme(Ternary(), Scale("channel", rule="absmean")), 64, "weights of ternary"),
        (Scheme(Int(4), Scale("group", group=20)), 64, "groups of 20, no multiple of 32"),
        (Scheme(Int(8), Scale("token")), 64, "belong to activations"),
        (Scheme(Int(4), Scale("group", group=128)), 64, ""),
    ],
)
def test_what_it_does_not_take(scheme, k, says):
    if not HAVE_TRITON:
        pytest.skip("triton is not installed")
    assert says in int8.not_covered(scheme, k) and bool(says) == bool(int8.not_covered(scheme, k))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 64)}, "x of torch.float32"),
        ({"x_scale": torch.ones(3, 1)}, r"scales of torch.float32 and shape \(3, 1\)"),
        ({"codes": torch.zeros(3, 4, dtype=torch.int32)}, "for 64 inputs"),
        ({"dtype": torch.float64}, "a result of torch.float64"),
    ],
)
def test_refuses(device, change, says):
    w = packed(SCHEMES[0], 3, 64)
    given = {"x": torch.zeros(2, 64, dtype=torch.int8), "x_scale": torch.ones(2, 1), "codes": w.codes, "scale": w.scale}
    given |= {"scheme": str(w.scheme), "dtype": torch.float32} | change
    with pytest.raises(ValueError, match=says):
        int8.linear(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()})
