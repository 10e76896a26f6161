"""`StreamNorm`: the compiled kernel where nothing but the values is asked for, torch's operations everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from laconic.kernels import native, norm, ops
from laconic.nn.stream_norm import StreamNorm

compiled = pytest.mark.skipif(native.load() is None, reason="the extension is not built")


def make(width: int = 12, bias: bool = True, dtype: torch.dtype = torch.float32) -> StreamNorm:
    made = StreamNorm(width, affine=True, bias=bias, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(width, generator=g))
    return made


@pytest.fixture(autouse=True)
def _references():
    """The kernels answer here, unlike in the other tests of modules."""


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called."""
    seen = []
    whole = norm.forward
    monkeypatch.setattr(norm, "forward", lambda *args, **options: seen.append(1) or whole(*args, **options))
    return seen


def plain(module: StreamNorm, x: torch.Tensor) -> torch.Tensor:
    y = F.rms_norm(x, (module.width,), module.weight, module.eps)
    return y if module.bias is None else y + module.bias


class Watching(TorchFunctionMode):
    """Sees torch's functions and calls them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 12), (3, 5, 12), (2, 0, 12)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_kernel_says_what_torch_says(dtype, shape, bias, calls):
    module, g = make(bias=bias, dtype=dtype), torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g).to(dtype)
    eps = torch.finfo(dtype).eps
    got = module(x)
    assert got.dtype == dtype and calls == [1]
    torch.testing.assert_close(
        got.float(), plain(make(bias=bias).to(dtype).float(), x.float()), rtol=8 * eps, atol=8 * eps
    )
    wide = torch.randn(*shape[:-1], 24, generator=g).to(dtype)[..., ::2]
    torch.testing.assert_close(module(wide), module(wide.contiguous()), rtol=0, atol=0)


@torch.no_grad()
def test_bare_norms_and_float64():
    x = torch.randn(4, 12)
    torch.testing.assert_close(StreamNorm(12)(x), F.rms_norm(x, (12,), None, 1e-5))
    module, wide = make(dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(module(wide), plain(module, wide))


@compiled
def test_whoever_needs_an_operation_of_torch_gets_one(calls):
    """Gradients of both kinds, transforms, exports, watchers, the reference."""
    module, x = make(), torch.randn(4, 12)
    want = plain(module, x)
    module(x.clone().requires_grad_()).sum().backward()
    assert module.weight.grad is not None
    frozen = make().requires_grad_(False)
    with forward_ad.dual_level():
        out = frozen(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(out).tangent is not None
    torch.testing.assert_close(torch.func.vmap(frozen)(x), want)
    tangent = torch.func.jvp(frozen, (x,), (torch.ones_like(x),))[1]
    assert tangent.abs().sum() > 0
    exported = torch.export.export(frozen, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), want)
    assert not any("laconic" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad(), ops.by_reference():
        assert torch.equal(module(x), want)
    with torch.no_grad(), Watching():
        assert torch.equal(module(x), want)
    meta = make().to("meta")
    assert meta(torch.empty(2, 12, device="meta")).shape == (2, 12)
    assert calls == []
    with torch.no_grad():
        module(x)
    frozen(x)
    assert len(calls) == 2
