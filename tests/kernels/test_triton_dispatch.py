"""Which road the ops take: Triton's kernels where they can run, the reference for what they do not cover, and why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from laconic.kernels import ops, triton
from laconic.kernels.triton import dispatch
from laconic.nn.check_ops import check_op
from laconic.numerics import Int, Scale, Scheme
from tests.kernels.test_ops import noise, packed
from tests.kernels.triton_road import HAVE_TRITON, NO_TRITON, ROADS, device_of

if HAVE_TRITON:
    from laconic.kernels.triton import weight_only

laconic = torch.ops.laconic
SCHEME = Scheme(Int(4), Scale("group", group=32, dtype="float16"), zero="int")


@pytest.fixture(params=ROADS)
def device(request):
    """The ops run Triton's kernels on this device; in the interpreter they are registered for the CPU meanwhile."""
    device = device_of(request.param)
    if device.type == "cuda":
        yield device
        return
    library = torch.library.Library("laconic", "IMPL")
    assert dispatch.register(library, ops._ON_GPU, "CPU")
    yield device
    library._destroy()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the kernels' functions that were called."""
    if not HAVE_TRITON:
        pytest.skip(NO_TRITON)
    made: list[str] = []
    for name in ("linear", "experts", "embedding", "dequantize"):
        function = getattr(weight_only, name)

        def noted(*operands, function=function, name=name, **options):
            made.append(name)
            return function(*operands, **options)

        monkeypatch.setattr(weight_only, name, noted)
    return made


def moved(device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t.to(device) if t is not None else None for t in tensors]


@pytest.mark.parametrize("name", ["linear", "embedding", "conv", "experts", "experts_input_grad", "dequantize"])
def test_every_op_is_right(device, calls, name):
    """The self-test of `laconic doctor`."""
    check_op(name, device.type)
    used = {"conv": "dequantize", "experts_input_grad": None}.get(name, name)
    assert set(calls) == ({used} if used else set())


def test_each_kernel_is_taken(device, calls):
    w, x, bias = packed(SCHEME, 15, 45), noise(4, 45), noise(15)
    x, bias, ids, *operands = moved(device, x, bias, torch.tensor([[1, 14]]), *w.operands)
    text = {"scheme": str(SCHEME)}
    y = laconic.linear(x, *operands, bias, **text, act="gelu").cpu()
    torch.testing.assert_close(y, ops._linear(x.cpu(), *w.operands, bias.cpu(), **text, act="gelu"))
    y = laconic.experts(x, torch.tensor([2, 0, 0, 1], device=device), *operands, out=5, **text).cpu()
    torch.testing.assert_close(y, ops._experts(x.cpu(), torch.tensor([2, 0, 0, 1]), *w.operands, out=5, **text))
    y = laconic.embedding(ids, *operands, **text, dim=45, dtype=torch.float16).cpu()
    assert torch.equal(y, w.weight[[1, 14]][None].half())
    y = laconic.dequantize(*operands, **text, k=45, dtype=torch.float32).cpu()
    assert torch.equal(y, w.weight)
    options = {"kernel": [5], "stride": [1], "padding": [2], "dilation": [1], "groups": 1}
    y = laconic.conv(noise(2, 9, 8).to(device), *operands, **text, **options).cpu()
    torch.testing.assert_close(y, torch.nn.functional.conv1d(noise(2, 9, 8), w.weight.view(15, 9, 5), padding=2))
    assert calls == ["linear", "experts", "embedding", "dequantize", "dequantize"]


@pytest.mark.parametrize(
    "change",
    [
        {"x": noise(4, 45).double()},
        {"x": noise(0, 45)},
        {"bias": noise(15).half()},
        {"residual": noise(1, 15)},  # broadcasts
        {"residual": noise(4, 15).double()},
    ],
    ids=["float64", "no rows", "bias of another type", "residual that broadcasts", "residual of another type"],
)
def test_what_a_kernel_does_not_cover_goes_to_the_reference(device, calls, change):
    w = packed(SCHEME, 15, 45)
    given = {"x": noise(4, 45), "bias": None, "residual": None} | change
    x, bias, residual, *operands = moved(device, *given.values(), *w.operands)
    try:
        want = ops._linear(x, *operands, bias, residual, scheme=str(SCHEME))
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            laconic.linear(x, *operands, bias, residual, scheme=str(SCHEME))
    else:
        assert torch.equal(laconic.linear(x, *operands, bias, residual, scheme=str(SCHEME)), want)
    assert calls == []


def test_errors_are_those_of_the_reference(device, calls):
    w = packed(SCHEME, 15, 45)
    x, *operands = moved(device, noise(4, 45), *w.operands)
    with pytest.raises(ValueError, match="act='swish'"):
        laconic.linear(x, *operands, scheme=str(SCHEME), act="swish")
    with pytest.raises(ValueError, match="61 codes of 4 bits"):
        laconic.linear(noise(4, 61).to(device), *operands, scheme=str(SCHEME))
    assert calls == []


def test_gradients_come_through(device, calls):
    """Backward is the same for all roads; only the weights in it come from a kernel."""
    w = packed(SCHEME, 15, 45)
    x, bias, *operands = moved(device, noise(4, 45), noise(15), *w.operands)
    x.requires_grad_()
    y = laconic.linear(x, *operands, bias, scheme=str(SCHEME), act="silu")
    (found,) = torch.autograd.grad(y.square().sum(), x)
    plain = torch.nn.functional.silu(torch.nn.functional.linear(x, w.weight.to(device), bias))
    (want,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert calls == ["linear", "dequantize"]


def test_opcheck(device, calls):
    w = packed(SCHEME, 15, 45)
    x, *operands = moved(device, noise(4, 45), *w.operands)
    torch.library.opcheck(
        laconic.linear.default, (x.requires_grad_(), *operands), {"scheme": str(SCHEME), "act": "gelu"}
    )
    options = {"scheme": str(SCHEME), "k": 45, "dtype": torch.bfloat16}
    torch.library.opcheck(laconic.dequantize.default, tuple(operands), options)
    assert {"linear", "dequantize"} <= set(calls)


def test_activations_are_the_same_names():
    assert tuple(ops.ACTIVATIONS) == dispatch.ACTIVATIONS


# --- what is there, and what is missing -----------------------------------------------------------------------------


def in_a_fresh_process(script: str, **environment: str) -> str:
    environment = {name: v for name, v in os.environ.items() if name != triton.INTERPRET} | environment
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_not_imported_before_it_is_needed():
    said = in_a_fresh_process("""
import sys, torch, laconic
from laconic.kernels import ops, triton
print("triton" in sys.modules, triton.status()["present"] or bool(triton.status()["why"]))
""")
    assert said.split() == ["False", "True"]


def test_all_works_without_triton():
    said = in_a_fresh_process("""
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from laconic.kernels import triton
from laconic.nn.check_ops import check_op
print(triton.installed(), triton.status()["why"], triton.missing(torch.device("cpu")), sep="; ")
check_op("linear")
""")
    assert said.startswith("False; triton is not installed (pip install triton") and "TRITON_INTERPRET=1" in said


def test_switched_off_and_broken():
    script = """
import os, sys, torch
from laconic.kernels import triton
if "BROKEN" in os.environ:
    sys.modules["triton"] = None
print(triton.missing(torch.device("cpu")))
"""
    said = in_a_fresh_process(script, LACONIC_DISABLE_KERNELS="1", TRITON_INTERPRET="1")
    assert said.strip() == "switched off by LACONIC_DISABLE_KERNELS=1"
    assert "triton does not load" in in_a_fresh_process(script, BROKEN="1", TRITON_INTERPRET="1")


def test_reasons(monkeypatch):
    assert triton.missing(torch.device("meta")) == "there are no kernels for meta devices"
    assert triton._too_old((7, 5), triton.LEAST, "Triton") == (
        "the Triton kernels need compute capability 8.0, this GPU has 7.5"
    )
    assert triton._too_old((9, 0), triton.LEAST_FP8, "FP8") == ""
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    assert triton.missing(torch.device("cpu")) == "tensors on the CPU need TRITON_INTERPRET=1"
    assert triton.fp8_missing(torch.device("cpu")) == "tensors on the CPU need TRITON_INTERPRET=1"
    monkeypatch.setattr(triton, "installed", lambda: False)
    assert not dispatch.register(torch.library.Library("laconic", "IMPL"), ops._ON_GPU)


def test_status_has_the_form_of_the_other_kernels():
    status = triton.status()
    assert {"present", "why", "compiler", "isa", "path", "fp8"} == set(status)
    assert status["present"] == (status["why"] == "") == (status["isa"] is not None)
