"""The ops against float operations on the dequantized weight: values, gradients, schema, export."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.kernels import native, ops
from laconic.kernels.inputs import INT8_TOKENS, int8_tensor
from laconic.nn import PackedParameterSpec, declare, fill, pack_tensors
from laconic.numerics import Binary, Int, Levels, Scale, Scheme, Ternary, affine_params, dequantize, quantize

laconic = torch.ops.laconic

SCHEMES = [
    Scheme(Int(bits), Scale(share, group=group, dtype=dtype), zero=zero)
    for bits, share, group, dtype, zero in (
        (8, "channel", None, "float32", "none"),
        (8, "tensor", None, "float32", "int"),
        (7, "group", 16, "bfloat16", "real"),
        (6, "group", 64, "float16", "int"),
        (5, "channel", None, "float16", "int"),
        (4, "group", 32, "float16", "none"),
        (4, "group", 32, "float16", "int"),
        (3, "group", 5, "float32", "int"),
        (2, "group", 16, "float16", "real"),
        (2, "tensor", None, "bfloat16", "none"),
    )
]
CODEBOOKS = [
    Scheme(Levels("nf4"), Scale("group", group=16, dtype="float16")),
    Scheme(Levels("fp4"), Scale("tensor", dtype="bfloat16")),
    Scheme(Ternary(), Scale("channel", dtype="float16", rule="absmean")),
    Scheme(Ternary(), Scale("group", group=16, dtype="float32", rule="mse")),
    Scheme(Binary(), Scale("group", group=5, dtype="float16", rule="absmean")),
]


@dataclass
class Packed:
    """A packed matrix and the float32 matrix that it stands for."""

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    weight: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.codes, self.scale, self.zero


def packed(scheme: Scheme, rows: int, k: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    scale, zero = affine_params(x, scheme)
    codes = quantize(x, scale, zero, scheme)
    stored = pack_tensors(PackedParameterSpec(scheme, (rows, k)), codes, scale, zero)
    kept = stored.get("zero_point", stored.get("zero"))
    return Packed(scheme, stored["packed"], stored["scale"], kept, dequantize(codes, scale, zero, scheme))


def noise(*shape: int, seed: int = 1, **options) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)
    return made


@pytest.fixture(autouse=True)
def _references():
    """The compiled linear layer takes sums in another order: test_cpu_linear.py holds it to the reference."""
    with ops.by_reference():
        yield


@pytest.fixture(params=["native", "reference"])
def road(request, monkeypatch):
    """Each test runs with the compiled kernel and without."""
    if request.param == "reference":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip(f"the kernel is not built: {native.reason() if hasattr(native, 'reason') else 'no compiler'}")
    return request.param


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 33), (24, 64), (5, 130)])
def test_dequantize(road, scheme, rows, k):
    w = packed(scheme, rows, k)
    found = laconic.dequantize(*w.operands, scheme=str(scheme), k=k, dtype=torch.float32)
    assert torch.equal(found, w.weight)


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33), (0, 33), (2, 0, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear(road, scheme, shape, dtype):
    w, x = packed(scheme, 9, 33), noise(*shape).to(dtype)
    bias, residual = noise(9).to(dtype), noise(*shape[:-1], 9, seed=2).to(dtype)
    found = laconic.linear(x, *w.operands, bias, residual, scheme=str(scheme), act="silu")
    assert torch.equal(found, F.silu(F.linear(x, w.weight.to(dtype), bias)) + residual)
    plain = laconic.linear(x, *w.operands, scheme=str(scheme))
    assert torch.equal(plain, F.linear(x, w.weight.to(dtype)))


def test_a_first_call_in_inference_mode_spoils_no_later_one(road, monkeypatch):
    """What the ops keep for later calls has to be writable then."""
    monkeypatch.setattr(ops, "_local", threading.local())
    w, x = packed(SCHEMES[0], 9, 33), noise(4, 33)
    with torch.inference_mode():
        first = laconic.linear(x, *w.operands, scheme=str(SCHEMES[0]))
    assert torch.equal(laconic.linear(x, *w.operands, scheme=str(SCHEMES[0])), first)


def test_linear_in_tiles(road, monkeypatch):
    """A weight of several tiles, the last one short: the same numbers up to the order of sums."""
    monkeypatch.setattr(ops, "TILE", 100)
    for scheme in (*SCHEMES, *CODEBOOKS):
        w, x, bias = packed(scheme, 17, 33), noise(4, 33), noise(17)
        found = laconic.linear(x, *w.operands, bias, None, scheme=str(scheme), act="relu")
        torch.testing.assert_close(found, F.relu(F.linear(x, w.weight, bias)))
        assert torch.equal(laconic.dequantize(*w.operands, scheme=str(scheme), k=33, dtype=torch.float32), w.weight)


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_activations(act):
    w, x = packed(SCHEMES[0], 4, 8), noise(3, 8)
    assert torch.equal(
        laconic.linear(x, *w.operands, scheme=str(w.scheme), act=act),
        ops.ACTIVATIONS[act](F.linear(x, w.weight)),
    )


def test_unknown_activation_and_scheme():
    w, x = packed(SCHEMES[0], 4, 8), noise(3, 8)
    with pytest.raises(ValueError, match="act='swish'"):
        laconic.linear(x, *w.operands, scheme=str(w.scheme), act="swish")
    with pytest.raises(ValueError, match="expected 7 parts"):
        laconic.linear(x, *w.operands, scheme="int4")


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_embedding(road, scheme, shape):
    w = packed(scheme, 11, 19)
    ids = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))
    found = laconic.embedding(ids, *w.operands, scheme=str(scheme), dim=19, dtype=torch.bfloat16)
    assert torch.equal(found, F.embedding(ids, w.weight).to(torch.bfloat16))
    small = laconic.embedding(ids.int(), *w.operands, scheme=str(scheme), dim=19, dtype=torch.float32)
    assert torch.equal(small, F.embedding(ids, w.weight))


@pytest.mark.parametrize("bad", [-1, -100, 11])
def test_embedding_refuses_ids_outside_as_torch_does(bad):
    """Indexing alone would read a negative number from the end."""
    w = packed(SCHEMES[4], 11, 19)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        laconic.embedding(torch.tensor([bad]), *w.operands, scheme=str(w.scheme), dim=19, dtype=torch.float32)


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
@pytest.mark.parametrize(
    ("dims", "options"),
    [(1, {}), (1, {"stride": [2], "padding": [3], "dilation": [2]}), (2, {"groups": 2}),
     (2, {"stride": [2, 1], "padding": [1, 2]}), (3, {})],
)  # fmt: skip
def test_conv(road, scheme, dims, options):
    groups = options.get("groups", 1)
    kernel = [3, 2, 3][:dims]
    channels = 4 // groups
    w = packed(scheme, 6, channels * torch.Size(kernel).numel())
    given = {"stride": [1] * dims, "padding": [0] * dims, "dilation": [1] * dims, "groups": 1} | options
    weight = w.weight.view(6, channels, *kernel)
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    for batch in ((2,), (), (0,)):
        x, bias = noise(*batch, 4, *[9, 8, 7][:dims]), noise(6)
        found = laconic.conv(x, *w.operands, bias, None, scheme=str(scheme), kernel=kernel, **given)
        assert torch.equal(found, function(x, weight, bias, **given))


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
def test_experts(road, scheme):
    count, out, k = 3, 5, 13
    w = packed(scheme, count * out, k)
    x, bias, index = noise(7, k), noise(count, out), torch.tensor([2, 0, 0, 2, 2, 0, 2])  # no one picks 1
    found = laconic.experts(x, index, *w.operands, bias, out=out, scheme=str(scheme))
    weight = w.weight.view(count, out, k)
    for row in range(7):
        expected = F.linear(x[row], weight[index[row]], bias[index[row]])
        torch.testing.assert_close(found[row], expected)
    none = laconic.experts(x[:0], index[:0], *w.operands, out=out, scheme=str(scheme))
    assert none.shape == (0, out)


# --- the two roads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
def test_native_equals_reference(scheme, monkeypatch):
    if native.load() is None:
        pytest.skip("the kernel is not built")
    w, x = packed(scheme, 33, 77), noise(5, 77)

    def run() -> list[Tensor]:
        ids = torch.arange(0, 33, 4)
        return [
            laconic.dequantize(*w.operands, scheme=str(scheme), k=77, dtype=torch.float32),
            laconic.linear(x, *w.operands, scheme=str(scheme)),
            laconic.embedding(ids, *w.operands, scheme=str(scheme), dim=77, dtype=torch.float32),
            laconic.experts(x, torch.tensor([0, 1, 2, 0, 1]), *w.operands, out=11, scheme=str(scheme)),
        ]

    fast = run()
    monkeypatch.setattr(native, "load", lambda: None)
    assert all(map(torch.equal, fast, run()))


# --- gradients ----------------------------------------------------------------------------------------------


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), inputs))


@pytest.mark.parametrize("scheme", [*SCHEMES[:7:3], *CODEBOOKS[::2]], ids=str)
@pytest.mark.parametrize("act", ["none", "gelu"])
def test_linear_gradients(scheme, act):
    w = packed(scheme, 9, 33)
    inputs = [t.requires_grad_() for t in (noise(4, 33), noise(9), noise(4, 9, seed=3))]
    x, bias, residual = inputs
    found = gradients(laconic.linear(x, *w.operands, bias, residual, scheme=str(scheme), act=act), inputs)
    expected = gradients(ops.ACTIVATIONS[act](F.linear(x, w.weight, bias)) + residual, inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_linear_gradient_through_several_tiles(monkeypatch):
    monkeypatch.setattr(ops, "TILE", 64)
    w, x = packed(SCHEMES[6], 17, 33), noise(4, 33).requires_grad_()
    found = gradients(laconic.linear(x, *w.operands, scheme=str(w.scheme)), [x])
    torch.testing.assert_close(found, gradients(F.linear(x, w.weight), [x]))


def test_conv_gradients():
    w = packed(SCHEMES[6], 6, 2 * 9)
    x, bias = noise(2, 4, 8, 7).requires_grad_(), noise(6).requires_grad_()
    options = {"stride": [2, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
    y = laconic.conv(x, *w.operands, bias, None, scheme=str(w.scheme), kernel=[3, 3], act="silu", **options)
    expected = F.silu(F.conv2d(x, w.weight.view(6, 2, 3, 3), bias, **options))
    torch.testing.assert_close(gradients(y, [x, bias]), gradients(expected, [x, bias]))


def test_experts_gradients():
    w = packed(SCHEMES[6], 3 * 5, 13)
    x, bias, index = noise(4, 13).requires_grad_(), noise(3, 5).requires_grad_(), torch.tensor([2, 0, 1, 2])
    y = laconic.experts(x, index, *w.operands, bias, out=5, scheme=str(w.scheme))
    expected = torch.einsum("tk,tok->to", x, w.weight.view(3, 5, 13)[index]) + bias[index]
    torch.testing.assert_close(gradients(y, [x, bias]), gradients(expected, [x, bias]))


def test_experts_gradients_through_an_activation():
    w = packed(SCHEMES[3], 3 * 5, 13)
    x, bias, index = noise(4, 13).requires_grad_(), noise(3, 5).requires_grad_(), torch.tensor([2, 0, 1, 2])
    y = laconic.experts(x, index, *w.operands, bias, out=5, scheme=str(w.scheme), act="silu")
    expected = F.silu(torch.einsum("tk,tok->to", x, w.weight.view(3, 5, 13)[index]) + bias[index])
    torch.testing.assert_close(gradients(y, [x, bias]), gradients(expected, [x, bias]))


def test_second_derivatives_are_refused():
    w, x = packed(SCHEMES[0], 4, 8), noise(3, 8).requires_grad_()
    y = laconic.linear(x, *w.operands, scheme=str(w.scheme), act="silu")
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def test_packed_tensors_have_no_gradient():
    w, x = packed(SCHEMES[0], 4, 8), noise(3, 8).requires_grad_()
    scale = w.scale.clone().requires_grad_()
    y = laconic.linear(x, w.codes, scale, w.zero, scheme=str(w.scheme))
    found = torch.autograd.grad(y.sum(), [x, scale], allow_unused=True)
    assert found[0] is not None and found[1] is None


# --- what torch asks of an op -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, *CODEBOOKS], ids=str)
def test_opcheck(scheme):
    text = {"scheme": str(scheme)}
    w = packed(scheme, 6, 20)
    for x in (noise(3, 20, requires_grad=True), noise(2, 0, 20), noise(20)):
        torch.library.opcheck(laconic.linear.default, (x, *w.operands), text)
    given = (noise(3, 20, requires_grad=True), *w.operands, noise(6, requires_grad=True), noise(3, 6))
    torch.library.opcheck(laconic.linear.default, given, {**text, "act": "gelu"})
    ids = torch.tensor([[0, 5], [3, 3]])
    torch.library.opcheck(laconic.embedding.default, (ids, *w.operands), {**text, "dim": 20, "dtype": torch.float16})
    torch.library.opcheck(laconic.dequantize.default, w.operands, {**text, "k": 20, "dtype": torch.bfloat16})
    conv = {**text, "kernel": [5], "stride": [1], "padding": [2], "dilation": [1], "groups": 1}
    for x in (noise(2, 4, 9, requires_grad=True), noise(0, 4, 9), noise(4, 9)):
        torch.library.opcheck(laconic.conv.default, (x, *w.operands, noise(6), None), conv)
    index = torch.tensor([1, 0, 1])
    given = (noise(3, 20, requires_grad=True), index, *w.operands, noise(2, 3, requires_grad=True))
    torch.library.opcheck(laconic.experts.default, given, {**text, "out": 3, "act": "silu"})
    torch.library.opcheck(laconic.experts_input_grad.default, (noise(3, 3), index, *w.operands), {**text, "k": 20})


@pytest.mark.parametrize("scheme", [*SCHEMES[::4], *CODEBOOKS[::2]], ids=str)
def test_export_of_a_packed_linear(scheme):
    """The exported program calls the op, and takes any batch size."""
    module = nn.Linear(20, 6)
    spec = PackedParameterSpec(scheme, (6, 20))
    scale, zero = affine_params(module.weight.detach(), scheme)
    tensors = pack_tensors(spec, quantize(module.weight.detach(), scale, zero, scheme), scale, zero)
    declare(module, "weight", spec)
    fill(module, "weight", tensors)
    model = nn.Sequential(module, nn.ReLU()).eval()
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (noise(3, 20),), dynamic_shapes=dynamic, strict=False)
    assert laconic.linear.default in {node.target for node in program.graph.nodes}
    x = noise(5, 20, seed=4)
    assert torch.equal(program.module()(x), model(x))


def test_ops_under_autocast_and_inference_mode():
    w, x = packed(SCHEMES[4], 9, 33), noise(4, 33)
    with torch.inference_mode():
        assert torch.equal(laconic.linear(x, *w.operands, scheme=str(w.scheme)), F.linear(x, w.weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = laconic.linear(x.to(torch.bfloat16), *w.operands, scheme=str(w.scheme))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", ["", INT8_TOKENS, int8_tensor(0.02)], ids=["float", "int8", "static"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_linear_layer_is_the_reference_to_rounding(scheme, inputs, monkeypatch):
    weights, x = packed(scheme, 9, 64), noise(3, 64)
    words = {"scheme": str(scheme), "act": "silu", "inputs": inputs}
    want = laconic.linear(x, *weights.operands, **words)
    monkeypatch.setattr(ops, "_by_reference", False)
    got = laconic.linear(x, *weights.operands, **words)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    torch.library.opcheck(laconic.linear, (x, *weights.operands), words)


def test_every_kind_of_op_runs_by_reference_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled function is called within `by_reference`: norms, bits, attention on a cache."""
    from laconic.kernels import attention, binary, native, norm  # noqa: F401 - which register their ops

    monkeypatch.setattr(ops, "_by_reference", False)
    x, codes = torch.randn(3, 32), binary.pack_signs(torch.randn(5, 32))
    heads = x.view(1, 1, 3, 32)
    calls = (
        lambda: torch.ops.laconic.rms_norm(x, eps=1e-6),
        lambda: torch.ops.laconic.binary_linear(x, codes, torch.ones(5)),
        lambda: torch.ops.laconic.decode_attention(heads, heads, heads, recent=3, v_dim=32),
    )
    want = [call() for call in calls]
    with ops.by_reference(), monkeypatch.context() as patched:
        patched.setattr(native, "module", lambda: pytest.fail("a compiled function was called"))
        for call, was in zip(calls, want, strict=True):
            torch.testing.assert_close(call(), was, rtol=1e-5, atol=1e-6)
