"""LayerNorm and RMSNorm with what stands around them: kernels against references, references against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import native, norm
from laconic.kernels.inputs import INT8_TOKENS, round_inputs

laconic = torch.ops.laconic
MODULE = native.load()
ISAS = range(MODULE.best_isa() + 1) if MODULE is not None else ()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 130, 384, 1001]
KINDS = [
    {"centred": True, "eps": 1e-5},
    {"centred": True, "eps": 1e-5, "unit_offset": True},
    {"centred": False, "eps": 1e-6},
    {"centred": False, "eps": 1e-6, "unit_offset": True},
    {"centred": False, "eps": 1e-8, "eps_outside": True},
]

needs_kernels = pytest.mark.skipif(MODULE is None, reason=f"no compiled kernels: {native.status()['why']}")


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """To rounding of the type, relative to the largest element of a row."""
    size = want.double().abs().amax(-1, keepdim=True) + 1e-30
    assert got.shape == want.shape
    worst = ((got.double() - want.double()).abs() / size).max() if want.numel() else 0.0
    assert worst <= ROUNDING[dtype], float(worst)


# --- the references -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_references_are_torchs_norms(dtype: torch.dtype) -> None:
    x, w, b = noise(5, 33, dtype=dtype), noise(33, dtype=dtype, seed=1), noise(33, dtype=dtype, seed=2)
    rounding = ROUNDING | {torch.float64: 1e-12}
    for got, want in (
        (laconic.layer_norm(x, w, b, eps=1e-5), F.layer_norm(x, (33,), w, b, 1e-5)),
        (laconic.rms_norm(x, w, eps=1e-6), F.rms_norm(x, (33,), w, 1e-6)),
        (laconic.rms_norm(x, eps=1e-6), F.rms_norm(x, (33,), None, 1e-6)),
        (laconic.rms_norm(x, w - 1, eps=1e-6, unit_offset=True), F.rms_norm(x, (33,), 1 + (w - 1), 1e-6)),
    ):
        assert got.dtype == dtype
        assert (got.double() - want.double()).abs().max() <= 2 * rounding[dtype] * want.double().abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_gradients_are_those_of_the_reference(kind: dict, add: bool) -> None:
    """In float64, against numerical differences, to the second derivative."""
    options = {key: value for key, value in kind.items() if key != "centred"}
    op = getattr(laconic, "add_" * add + ("layer_norm" if kind["centred"] else "rms_norm"))
    inputs = [noise(3, 7, seed=i).double().requires_grad_() for i in range(1 + add)]
    inputs += [noise(7, seed=i).double().requires_grad_() for i in (5, 6)]
    assert torch.autograd.gradcheck(lambda *given: op(*given, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: op(*given, **options), inputs)
    assert torch.autograd.gradcheck(lambda x: op(x, *inputs[1 : 1 + add], **options), inputs[:1])


def test_a_row_of_zeros() -> None:
    x, w = torch.zeros(2, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    for op, options in ((laconic.layer_norm, {}), (laconic.rms_norm, {}), (laconic.rms_norm, {"eps_outside": True})):
        y = op(x, w, eps=1e-6, **options)
        assert torch.equal(y, torch.zeros_like(y))
        dx, dw = torch.autograd.grad(y.sum(), [x, w])
        assert dx.isfinite().all() and torch.equal(dw, torch.zeros(5))
    y, codes, scale = laconic.rms_norm_int8(x, w, eps=1e-6)
    assert not codes.any() and (scale == 1).all() and codes.dtype == torch.int8 and scale.shape == (2, 1)


# --- the kernels ----------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forward_equals_the_reference(kind: dict, dtype: torch.dtype, isa: int) -> None:
    for d in LENGTHS:
        for rows, add, affine in ((0, True, True), (1, False, True), (5, True, True), (3, False, False)):
            x, residual = noise(rows, d, dtype=dtype), noise(rows, d, dtype=dtype, seed=1) if add else None
            w = noise(d, dtype=DTYPES[d % 3], seed=2) if affine else None
            b = noise(d, dtype=dtype, seed=3) if affine and d % 2 else None
            want, s = norm.reference(x, residual, w, b, **kind)
            got = norm.forward(x, residual, w, b, **kind, codes=True, isa=isa)
            close(got[0], want, dtype)
            assert got[0].dtype == dtype
            if add:
                assert torch.equal(got[1], s)  # one addition, rounded: the same bits
            y = got[0].float()
            scale = 2 * y.abs().amax(-1, keepdim=True) / 255
            scale[scale == 0] = 1
            assert torch.equal(got[-1], scale)
            assert torch.equal(got[-2], (y / scale).round().clamp(-128, 127).to(torch.int8))
            assert torch.equal(got[0], norm.forward(x, residual, w, b, **kind, isa=isa)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_8_bit_inputs(dtype: torch.dtype) -> None:
    y, codes, scale = laconic.layer_norm_int8(noise(9, 100, dtype=dtype), eps=1e-5)
    assert torch.equal((codes.float() * scale).to(dtype), round_inputs(y, INT8_TOKENS))


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_backward_equals_the_reference(kind: dict, dtype: torch.dtype, isa: int) -> None:
    for d, rows in zip(LENGTHS[1:], [0, 1, 2, 5, 15, 16, 17, 33, 255, 256, 300, 40], strict=True):
        x, grad = noise(rows, d, dtype=dtype), noise(rows, d, dtype=dtype, seed=1)
        w = noise(d, dtype=dtype, seed=2) if d % 4 else None
        grad_sum = noise(rows, d, dtype=dtype, seed=3) if d % 2 else None
        want = norm.backward_reference(
            grad.double(), x.double(), w.double() if w is not None else None, grad_sum, **kind
        )
        dx, dw, db = norm.backward(grad, x, w, grad_sum, **kind, isa=isa)
        assert dx.dtype == dtype and dw.dtype == db.dtype == torch.float32
        if kind["centred"] and d == 2:
            continue  # a is all rounding, or 1 and -1: dx is a difference of equal numbers
        size = 1 + (grad.double().abs() * (w.double().abs() + 1 if w is not None else 1)).amax(-1, keepdim=True)
        inverse = 1 / (x.double().square().mean(-1, keepdim=True).sqrt() + 1e-3)
        assert ((dx.double() - want[0]).abs() <= 40 * ROUNDING[dtype] * size * (1 + inverse)).all()
        for got, exact in ((dw, want[1]), (db, want[2])):
            assert ((got - exact).abs() <= 1e-5 * (1 + rows)).all()
        bare = norm.backward(grad, x, w, grad_sum, **kind, dweight=False, dbias=False, isa=isa)
        assert torch.equal(bare[0], dx) and bare[1].numel() == bare[2].numel() == 0


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa: int) -> None:
    x, w, grad = noise(321, 200), noise(200), noise(321, 200, seed=1)
    options = {"centred": True, "eps": 1e-5, "isa": isa}
    first = norm.forward(x, grad, w, w, **options, codes=True, threads=1)
    back = norm.backward(grad, x, w, None, **options, threads=1)
    for threads in (1, 2, 3, 4):
        again = norm.forward(x, grad, w, w, **options, codes=True, threads=threads)
        assert all(map(torch.equal, first, again))
        assert all(map(torch.equal, back, norm.backward(grad, x, w, None, **options, threads=threads)))


@needs_kernels
def test_strided_and_unaligned_inputs() -> None:
    x = noise(40, 7).t()[1:]
    flat = noise(1 + 6 * 40)[1:].view(6, 40)
    for given in (x, flat, x.unflatten(0, (2, 3))):
        want, _ = norm.reference(given, None, None, None, centred=True, eps=1e-5)
        close(laconic.layer_norm(given, eps=1e-5), want, torch.float32)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_values(isa: int) -> None:
    # A large mean: the variance comes from what is left when it is taken off.
    x = noise(4, 512) + 4096
    want, _ = norm.reference(x.double(), None, None, None, centred=True, eps=1e-5)
    got = norm.forward(x, None, None, None, centred=True, eps=1e-5, isa=isa)[0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)
    for value in (1e-30, 1e15):
        x = torch.full((2, 40), value)
        want, _ = norm.reference(x, None, None, None, centred=False, eps=1e-6)
        got = norm.forward(x, None, None, None, centred=False, eps=1e-6, isa=isa)[0]
        torch.testing.assert_close(got, want)
    for value in (torch.nan, torch.inf):
        x = noise(3, 40)
        x[1, 7] = value
        y, _, scale = norm.forward(x, None, None, None, centred=False, eps=1e-6, codes=True, isa=isa)
        want, _ = norm.reference(x, None, None, None, centred=False, eps=1e-6)
        assert torch.equal(y.isnan(), want.isnan())
        assert scale.isnan().flatten().tolist() == [False, value is torch.nan, False]


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_is_rounded_as_torch_does(dtype: torch.dtype, isa: int) -> None:
    """x + residual over all halves, and halves against small ones, which makes every kind of tie."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    for other in (x.flip(0), torch.full_like(x, 2**-9), torch.full_like(x, 3e-8), torch.full_like(x, 1e4)):
        s = norm.forward(x, other, None, None, centred=False, eps=1e-6, isa=isa)[1]
        want = x + other
        assert torch.equal(s.isnan(), want.isnan())
        assert torch.equal(s.nan_to_num(0.0), want.nan_to_num(0.0))
        assert torch.equal(s.signbit()[~want.isnan()], want.signbit()[~want.isnan()])


# --- what torch asks of an op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_opcheck(kind: str) -> None:
    w, b = noise(20, seed=1).requires_grad_(), noise(20, seed=2).requires_grad_()
    for x in (
        noise(3, 20).requires_grad_(), noise(2, 0, 20), noise(20), noise(3, 20, dtype=torch.bfloat16),
    ):  # fmt: skip
        torch.library.opcheck(getattr(laconic, kind).default, (x, w, b), {"eps": 1e-6})
        torch.library.opcheck(getattr(laconic, "add_" + kind).default, (x, x.detach(), w), {"eps": 1e-6})
        given = (x.detach(), w.detach(), None)
        torch.library.opcheck(getattr(laconic, kind + "_int8").default, given, {"eps": 1e-6})
        given = (x.detach(), x.detach(), w.detach(), b.detach())
        torch.library.opcheck(getattr(laconic, f"add_{kind}_int8").default, given, {"eps": 1e-6, "unit_offset": True})
    given = (noise(3, 20), noise(3, 20, seed=1), w.detach(), None)
    torch.library.opcheck(laconic.norm_backward.default, given, {"centred": True, "eps": 1e-6, "dbias": False})


def test_gradients_of_the_ops_equal_autograd_of_the_reference() -> None:
    x, residual = noise(30, 50).requires_grad_(), noise(30, 50, seed=1).requires_grad_()
    w, b = noise(50).requires_grad_(), noise(50, seed=1).requires_grad_()
    inputs = [x, residual, w, b]
    y, s = laconic.add_layer_norm(*inputs, eps=1e-5)
    weight = noise(30, 50, seed=4)
    found = torch.autograd.grad((y * weight + s.square()).sum(), inputs)
    y, s = norm.reference(*inputs, centred=True, eps=1e-5)
    for got, want in zip(found, torch.autograd.grad((y * weight + s.square()).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    x = noise(3, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), x \(3, 8\) takes \(8,\)"):
        laconic.layer_norm(x, noise(7), eps=1e-5)
    with pytest.raises(ValueError, match=r"residual is torch.float16 of shape \(3, 8\), x is torch.float32"):
        laconic.add_rms_norm(x, x.half(), eps=1e-5)
    with pytest.raises(ValueError, match="needs a last axis"):
        laconic.rms_norm(torch.zeros(3, 0), eps=1e-5)
    with pytest.raises(ValueError, match="x is torch.int64, must be floating"):
        laconic.rms_norm(torch.zeros(3, 1, dtype=torch.int64), eps=1e-5)


@needs_kernels
def test_the_edge_trusts_no_caller() -> None:
    x, y = noise(3, 8), torch.empty(3, 8)
    kind, none = (1e-5, True, False, False), (0, 0, 1)
    fits = [(t.data_ptr(), 24, 1) for t in (x, y)]

    def call(rows=3, d=8, x=fits[0], y=fits[1], weight=none, codes=(0, 0, 0, 0), threads=1):
        MODULE.norm(x, none, weight, none, y, none, *codes, rows, d, kind, threads)

    call()
    for change, says in (
        ({"rows": 4}, r"x: 24 elements given, the shape \(4, 8\) needs 32"),
        ({"rows": -1}, "rows is -1"),
        ({"d": 0}, "d is 0"),
        ({"x": (0, 24, 1)}, "x: the address is null"),
        ({"x": (x.data_ptr(), 24, 4)}, "x: there is no dtype number 4"),
        ({"y": (y.data_ptr(), 24, 2)}, "y: dtype number 2, must be 1"),
        ({"weight": (y.data_ptr(), 7, 1)}, r"weight: 7 elements given, the shape \(1, 8\) needs 8"),
        ({"codes": (y.data_ptr(), 24, 0, 3)}, "scales: the address is null"),
        ({"threads": 0}, "threads is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            call(**change)
