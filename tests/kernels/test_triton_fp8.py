"""Triton's FP8 kernels against float64 products of the very float8 numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laconic.kernels.triton import fp8_missing
from tests.kernels.test_ops import noise
from tests.kernels.triton_road import HAVE_TRITON, ROADS, device_of

if HAVE_TRITON:
    from laconic.kernels.triton import fp8


@pytest.fixture(params=ROADS)
def device(request) -> torch.device:
    device = device_of(request.param)
    if fp8_missing(device):
        pytest.skip(fp8_missing(device))
    return device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 33), (5, 4500)])
def test_numbers_are_rounded_as_torch_does(device, dtype, m, k):
    x = (noise(m, k) * 10 ** noise(m, 1, seed=2)).to(dtype)
    x[0, 0] = 0
    codes, scale = fp8.quantize_rows(x.to(device))
    largest = x.float().abs().amax(1, keepdim=True)
    want = torch.where(largest == 0, 1.0, largest / 448)
    assert torch.equal(scale.cpu(), want)
    assert torch.equal(codes.cpu().float(), (x.float() / want).clamp(-448, 448).to(fp8.DTYPE).float())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 7, 33), (70, 130, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(device, m, n, k, dtype):
    x, x_scale = fp8.quantize_rows(noise(m, k).to(device))
    weight, scale = fp8.quantize_rows(noise(n, k, seed=2).to(device))
    bias, residual = noise(n), noise(m, n, seed=3)
    given = (x, x_scale, weight, scale, bias.to(device), residual.to(device))
    found = fp8.linear(*given, dtype=dtype, act="silu").cpu()
    product = (x.cpu().double() * x_scale.cpu()) @ (weight.cpu().double() * scale.cpu()).T
    want = F.silu(product + bias) + residual
    tolerance = 2e-3 if device.type == "cuda" else 1e-5  # tensor cores sum FP8 products in fewer bits
    tolerance = max(tolerance, 8e-3 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


def test_one_scale_for_all(device):
    x, weight = noise(5, 40).to(device).to(fp8.DTYPE), noise(6, 40, seed=2).to(device).to(fp8.DTYPE)
    s, t = torch.tensor([[0.5]], device=device), torch.tensor([[3.0]], device=device)
    found = fp8.linear(x, s, weight, t, dtype=torch.float32).cpu()
    want = 1.5 * x.cpu().double() @ weight.cpu().double().T
    torch.testing.assert_close(found.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 64)}, "x is torch.float32"),
        ({"weight": torch.zeros(3, 32)}, r"weight is torch.float32 of shape \(3, 32\)"),
        ({"scale": torch.ones(2, 1)}, "the scale of weight"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_refuses(device, change, says):
    given = {
        "x": torch.zeros(2, 64).to(fp8.DTYPE),
        "x_scale": torch.ones(2, 1),
        "weight": torch.zeros(3, 64).to(fp8.DTYPE),
    }
    given |= {"scale": torch.ones(3, 1), "dtype": torch.float32} | change
    with pytest.raises(ValueError, match=says):
        fp8.linear(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()})


def test_a_gpu_without_it_is_refused(device, monkeypatch):
    monkeypatch.setattr(
        fp8, "fp8_missing", lambda device: "the FP8 kernels need compute capability 8.9, this GPU has 8.0"
    )
    with pytest.raises(RuntimeError, match="need compute capability 8.9, this GPU has 8.0; use int8"):
        fp8.quantize_rows(torch.zeros(1, 4, device=device))
