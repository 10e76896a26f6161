"""Triton's products with packed weights against float64 products with the dequantized ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import ops
from laconic.numerics import Binary, Int, Levels, Scale, Scheme, Ternary
from tests.kernels.test_ops import Packed, noise, packed
from tests.kernels.triton_road import HAVE_TRITON, ROADS, device_of

if HAVE_TRITON:
    from laconic.kernels.triton import _products, weight_only

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Error of the result's own rounding, as a part of it.
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

INTS = [
    Scheme(Int(bits), Scale(share, group=group, dtype=dtype), zero=zero)
    for bits, share, group, dtype, zero in (
        (8, "channel", None, "float32", "none"),
        (8, "tensor", None, "float32", "int"),
        (8, "group", 6, "float16", "int"),
        (7, "group", 16, "bfloat16", "real"),
        (6, "group", 64, "float16", "int"),
        (5, "channel", None, "float16", "int"),
        (4, "group", 32, "float16", "none"),
        (4, "group", 128, "float16", "int"),
        (4, "tensor", None, "float32", "real"),
        (4, "group", 500, "float16", "int"),
        (3, "group", 5, "float32", "int"),
        (3, "group", 40, "float16", "none"),
        (2, "group", 16, "float16", "real"),
        (2, "tensor", None, "bfloat16", "none"),
        (2, "group", 48, "float32", "int"),
    )
]
TABLES = [
    Scheme(Levels("nf4"), Scale("group", group=64, dtype="float16")),
    Scheme(Levels("fp4"), Scale("tensor")),
    Scheme(Ternary(), Scale("channel", dtype="float16", rule="absmean")),
    Scheme(Ternary(), Scale("group", group=32, dtype="float16", rule="absmean")),
    Scheme(Ternary(), Scale("group", group=40, dtype="float32", rule="absmean")),
    Scheme(Binary(), Scale("group", group=64, dtype="bfloat16", rule="absmean")),
    Scheme(Binary(), Scale("group", group=10, rule="absmean")),
]
SCHEMES = INTS + TABLES


@pytest.fixture(params=ROADS)
def device(request) -> torch.device:
    return device_of(request.param)


def on(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t.to(device) if t is not None else None for t in tensors]


def check(found: Tensor, x: Tensor, weight: Tensor, bias=None, residual=None, act="none", slack: float = 1.0) -> None:
    """Within the rounding of the result, and that of float32 sums, of the product in float64.

    Few rows of x meet weights in float32, many meet them rounded to the type of x, as the reference's do.
    """
    rounded = weight if x.reshape(-1, x.shape[-1]).shape[0] <= weight_only.GEMV_ROWS else weight.to(x.dtype)
    want = F.linear(x.double(), rounded.double(), bias.double() if bias is not None else None)
    size = F.linear(x.double().abs(), rounded.double().abs()) + want.abs()
    want = ops.ACTIVATIONS[act](want)
    if residual is not None:
        want, size = want + residual.double(), size + residual.double().abs()
    assert found.shape == want.shape and found.dtype == x.dtype
    allowed = slack * (ROUNDING[x.dtype] * want.abs() + 2e-6 * size + 1e-7)
    off = (found.cpu().double() - want).abs()
    assert bool((off <= allowed).all()), f"off by {float((off / allowed).max()):.3g} times what is allowed"


def run(device: torch.device, w: Packed, x: Tensor, bias=None, residual=None, act="none") -> Tensor:
    x, bias, residual, *operands = on(device, x, bias, residual, *w.operands)
    return weight_only.linear(x, *operands, bias, residual, scheme=str(w.scheme), act=act)


# --- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 33), (37, 130)])
def test_linear(device, scheme, rows, k):
    w = packed(scheme, rows, k)
    for m, dtype in ((1, torch.bfloat16), (3, torch.float32), (9, torch.float16), (70, torch.bfloat16))[
        :: 2 if k < 100 else 1
    ]:
        x = noise(m, k).to(dtype)
        check(run(device, w, x), x, w.weight)


@pytest.mark.parametrize("m", [1, 2, 5, 8, 9, 17, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows_and_type(device, m, dtype):
    w = packed(INTS[7], 66, 300)
    x, bias, residual = noise(m, 300).to(dtype), noise(66).to(dtype), noise(m, 66, seed=2).to(dtype)
    check(run(device, w, x, bias, residual, "silu"), x, w.weight, bias, residual, "silu", slack=2)


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_activations(device, act, m):
    w = packed(INTS[0], 19, 40)
    x, bias = noise(m, 40), 30 * noise(19)  # far into both tails
    check(run(device, w, x, bias, None, act), x, w.weight, bias, None, act, slack=2)


@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 3, 33), (3, 1, 7, 33)], ids=str)
def test_leading_axes(device, shape):
    w, x = packed(INTS[6], 9, 33), noise(*shape)
    residual = noise(*shape[:-1], 9, seed=3)
    check(run(device, w, x, None, residual), x, w.weight, None, residual)


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("scheme", [INTS[7], INTS[10], TABLES[2]], ids=str)
def test_strided_operands(device, scheme, m):
    """Transposed activations, every second row of the codes and scales, one column out of several."""
    w = packed(scheme, 22, 130)
    x = noise(130, m).T
    operands = [t.repeat_interleave(2, dim=0)[::2] if t is not w.zero else t for t in w.operands if t is not None]
    found = weight_only.linear(*on(device, x, *operands), scheme=str(scheme))
    check(found, x, w.weight)
    narrow = packed(Scheme(Int(4), Scale("channel")), 22, 8)  # one word a row
    wide = torch.stack([narrow.codes, narrow.codes], dim=-1)[..., 0]
    x, codes, scale = on(device, noise(m, 8), wide, narrow.scale)
    assert codes.stride(-1) != 1 or device.type != "cpu"
    check(weight_only.linear(x, codes, scale, scheme=str(narrow.scheme)), x.cpu(), narrow.weight)


@pytest.mark.parametrize("m", [1, 8, 12, 70])
def test_same_bits_from_run_to_run_and_in_any_place(device, m):
    w, x = packed(INTS[7], 9, 1050), noise(m, 1050).to(torch.bfloat16)
    first = run(device, w, x)
    assert torch.equal(run(device, w, x), first)
    moved = torch.cat([torch.zeros(1), x.float().flatten()]).to(torch.bfloat16)[1:].view(m, 1050)  # unaligned
    assert torch.equal(run(device, w, moved), first)


@pytest.mark.parametrize("m", [1, 12])
def test_sums_in_parts(device, m, monkeypatch):
    """K in several parts, the last one short or empty, gives what K in one part gives, up to the order of sums."""
    w, x, bias = packed(INTS[6], 9, 2133), noise(m, 2133), noise(9)
    for count in (1, 2, 3, 5, 16):
        monkeypatch.setattr(weight_only, "_splits", lambda programs, tiles, device, count=count: count)
        check(run(device, w, x, bias, None, "gelu"), x, w.weight, bias, None, "gelu", slack=2)


def test_how_many_parts():
    if not HAVE_TRITON:
        pytest.skip("triton is not installed")
    cpu = torch.device("cpu")
    assert weight_only._splits(1000, 64, cpu) == 1
    assert weight_only._splits(1, 64, cpu) == weight_only.WAVES * weight_only.processors(cpu)
    assert weight_only._splits(1, 3, cpu) == 3
    assert weight_only._splits(0, 0, cpu) == 1


def test_every_configuration_gives_the_same_bits(device):
    """What the autotuner picks goes by time, so it must not show."""
    w, x = packed(INTS[7], 130, 520), noise(70, 520).to(torch.bfloat16)
    kernel, results = weight_only._gemm, []
    configs = kernel.configs
    try:
        for config in _products.GEMM_CONFIGS:
            kernel.configs = [config]
            results.append(run(device, w, x))
    finally:
        kernel.configs = configs
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("m", [2, 20])
def test_what_is_not_finite_stays_in_its_place(device, m):
    """An infinite scale or input spoils the outputs that read it, and not those that only lie near it in a tile."""
    w, x = packed(INTS[4], 9, 100), noise(m, 100)
    scale = w.scale.clone()
    scale[4, 1] = torch.inf
    x[1, 99] = torch.nan
    found = weight_only.linear(*on(device, x, w.codes, scale, w.zero), scheme=str(w.scheme)).cpu()
    spoiled = torch.zeros(m, 9, dtype=torch.bool)
    spoiled[1], spoiled[:, 4] = True, True
    assert torch.equal(~found.isfinite(), spoiled)


def test_large_and_small_numbers(device):
    w = packed(INTS[0], 5, 64)
    for size in (1e30, 1e-30):
        for m in (2, 20):
            x = noise(m, 64) * size
            found = run(device, w, x).cpu()
            torch.testing.assert_close(found.double(), x.double() @ w.weight.double().T, rtol=1e-4, atol=1e-6 * size)


# --- weights themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 33), (24, 64), (5, 530)])
def test_dequantize_is_bit_equal(device, scheme, rows, k):
    w = packed(scheme, rows, k)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = weight_only.dequantize(*on(device, *w.operands), scheme=str(scheme), k=k, dtype=dtype).cpu()
        assert torch.equal(found, w.weight.to(dtype)), dtype


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", ["none", "int", "real"])
def test_every_code_of_every_width(device, bits, zero):
    """Random words, so every code and zero point, and bits behind the row's end that must not matter."""
    scheme = Scheme(Int(bits), Scale("group", group=7, dtype="float32"), zero=zero)
    generator = torch.Generator().manual_seed(bits)
    rows, k = 37, 203
    stored = {}
    for name, (dtype, shape) in scheme.tensors(rows, k).items():
        words = torch.randint(-(2**31), 2**31, shape, generator=generator)
        stored[name] = words.int() if dtype == torch.int32 else torch.rand(shape, generator=generator) + 0.5
    operands = stored["packed"], stored["scale"], stored.get("zero_point", stored.get("zero"))
    want = ops._dequantize(*operands, scheme=str(scheme), k=k, dtype=torch.float32)
    found = weight_only.dequantize(*on(device, *operands), scheme=str(scheme), k=k, dtype=torch.float32).cpu()
    assert torch.equal(found, want)
    for m in (2, 20):
        x = noise(m, k)
        check(weight_only.linear(*on(device, x, *operands), scheme=str(scheme)), x, want)


@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_embedding(device, scheme, shape):
    w = packed(scheme, 11, 19)
    ids = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))
    for kind in (torch.int64, torch.int32):
        moved = on(device, ids.to(kind), *w.operands)
        found = weight_only.embedding(*moved, scheme=str(scheme), dim=19, dtype=torch.bfloat16).cpu()
        assert torch.equal(found, F.embedding(ids, w.weight).to(torch.bfloat16))


def test_embedding_of_ids_outside_is_nan(device):
    w, ids = packed(INTS[0], 11, 19), torch.tensor([3, -1, 11, 2**40, 0])
    options = {"scheme": str(w.scheme), "dim": 19, "dtype": torch.float32}
    found = weight_only.embedding(*on(device, ids, *w.operands), **options).cpu()
    assert torch.equal(found.isnan().all(1), torch.tensor([False, True, True, True, False]))
    assert torch.equal(found[[0, 4]], w.weight[[3, 0]])


# --- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*INTS[1:12:3], TABLES[0], TABLES[3]], ids=str)
@pytest.mark.parametrize("tokens", [5, 17, 50])
def test_experts(device, scheme, tokens):
    count, out, k = 5, 7, 45
    w = packed(scheme, count * out, k)
    generator = torch.Generator().manual_seed(tokens)
    index = torch.randint(0, count - 1, (tokens,), generator=generator)  # no one picks the last
    x, bias = noise(tokens, k), noise(count, out)
    moved = on(device, x, index, *w.operands, bias)
    found = weight_only.experts(*moved, out=out, scheme=str(scheme), act="silu").cpu()
    weight = w.weight.view(count, out, k)[index].double()
    want = F.silu(torch.einsum("tk,tok->to", x.double(), weight) + bias[index].double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [6, 40])
def test_experts_in_types_and_parts(device, tokens, monkeypatch):
    w = packed(INTS[6], 3 * 9, 300)
    x, index = noise(tokens, 300), torch.arange(tokens, dtype=torch.int32) % 3
    want = torch.einsum("tk,tok->to", x.double(), w.weight.view(3, 9, 300)[index.long()].double())
    monkeypatch.setattr(weight_only, "_splits", lambda programs, tiles, device: 3)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        moved = on(device, x.to(dtype), index, *w.operands)
        found = weight_only.experts(*moved, out=9, scheme=str(w.scheme)).cpu()
        assert float((found.double() - want).abs().max() / want.abs().max()) < tolerance
        assert found.dtype == dtype


@pytest.mark.parametrize("tokens", [6, 40])
def test_rows_of_no_expert_are_nan(device, tokens):
    w = packed(INTS[0], 3 * 9, 33)
    x, bias = noise(tokens, 33), noise(3, 9)
    index = torch.arange(tokens) % 3
    index[2], index[5] = -1, 3
    found = weight_only.experts(*on(device, x, index, *w.operands, bias), out=9, scheme=str(w.scheme)).cpu()
    lost = (index < 0) | (index > 2)
    assert torch.equal(found.isnan().all(1), lost)
    weight = w.weight.view(3, 9, 33)[index[~lost]]
    torch.testing.assert_close(found[~lost], torch.einsum("tk,tok->to", x[~lost], weight) + bias[index[~lost]])


@pytest.mark.parametrize(("tokens", "count", "block"), [(1, 1, 16), (40, 3, 16), (33, 64, 16), (200, 2, 64)])
def test_tiles_hold_each_row_once_and_one_expert_each(tokens, count, block):
    if not HAVE_TRITON:
        pytest.skip("triton is not installed")
    index = torch.randint(-1, count + 1, (tokens,), generator=torch.Generator().manual_seed(0))
    order, expert, begin, end = weight_only._tiles_of_experts(index, count, block)
    seen = []
    for e, b, t in zip(expert.tolist(), begin.tolist(), end.tolist(), strict=True):
        rows = order[b:t]
        seen += rows.tolist()
        assert len(rows) <= block
        assert all((i == e) if 0 <= i < count else e == -1 for i in index[rows].tolist())
    assert sorted(seen) == list(range(tokens))
