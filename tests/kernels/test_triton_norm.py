"""Triton's fused norms against torch's, and their codes against those of the token scheme."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laconic.numerics import Int, Scale, Scheme, affine_params, quantize
from tests.kernels.test_ops import noise
from tests.kernels.triton_road import HAVE_TRITON, ROADS, device_of

if HAVE_TRITON:
    from laconic.kernels.triton import norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TOKEN = Scheme(Int(8), Scale("token"))


@pytest.fixture(params=ROADS)
def device(request) -> torch.device:
    return device_of(request.param)


def expected(kind: str, x, weight, bias, eps):
    """The norm of what was stored, in float64."""
    x, weight, bias = (t.double() if t is not None else None for t in (x, weight, bias))
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 5, 640), (4, 2049), (0, 7)], ids=str)
def test_norms(device, kind, dtype, shape):
    x, residual = noise(*shape).to(dtype) * 3 + 1, noise(*shape, seed=2).to(dtype)
    weight, bias = noise(shape[-1], seed=3), noise(shape[-1], seed=4)
    for w, b, r in ((None, None, None), (weight, None, residual), (weight.to(dtype), bias.to(dtype), residual)):
        moved = [t.to(device) if t is not None else None for t in (x, w, b, r)]
        found = getattr(norm, kind)(*moved[:3], 1e-5, residual=moved[3])
        total = x if r is None else x + r
        assert torch.equal(found.total.cpu(), total) and found.codes is None and found.scale is None
        want = expected(kind, total, w, b, 1e-5)
        assert found.y.dtype == dtype
        torch.testing.assert_close(found.y.cpu().double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 33, 640])
def test_codes_are_those_of_the_rounded_norm(device, kind, dtype, k):
    x, residual, weight = (noise(5, k, seed=i).to(dtype).to(device) for i in range(3))
    given = {"weight": weight[0], "residual": residual}
    plain = getattr(norm, kind)(x, **given)
    found = getattr(norm, kind)(x, **given, quantized=True)
    y = plain.y.cpu().float()
    scale, _ = affine_params(y, TOKEN)
    assert found.y is None and torch.equal(found.total, plain.total)
    assert torch.equal(found.scale.cpu(), scale)
    assert torch.equal(found.codes.cpu().short(), quantize(y, scale, None, TOKEN).short() - 128)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_rows_of_zeros_and_large_numbers(device, kind):
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e15), noise(64) * 1e-15]).to(device)
    found = getattr(norm, kind)(x, eps=1e-5).y.cpu()
    torch.testing.assert_close(found.double(), expected(kind, x.cpu(), None, None, 1e-5), rtol=1e-5, atol=1e-6)
    assert not getattr(norm, kind)(x[:1], quantized=True).codes.any()


def test_the_same_bits_from_run_to_run_and_transposed(device):
    x = noise(96, 40).to(device).T
    first = norm.layer_norm(x).y
    assert torch.equal(norm.layer_norm(x).y, first) and torch.equal(norm.layer_norm(x.contiguous()).y, first)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(2, 0)}, "1 to 32768 features"),
        ({"x": torch.zeros(1, 32769)}, "1 to 32768 features"),
        ({"x": torch.tensor(1.0)}, "1 to 32768 features"),
        ({"weight": torch.zeros(7)}, r"weight is torch.float32 of shape \(7,\)"),
        ({"residual": torch.zeros(8)}, "residual is"),
        ({"residual": torch.zeros(2, 8, dtype=torch.float16)}, "residual is torch.float16"),
    ],
)
def test_refuses(device, change, says):
    given = {"x": torch.zeros(2, 8)} | change
    with pytest.raises(ValueError, match=says):
        norm.rms_norm(**{name: v.to(device) for name, v in given.items()})
