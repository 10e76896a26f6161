"""Linear layers on sparse weights by the compiled kernels against the matrix written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.kernels import cpu_sparse, native
from laconic.kernels import sparse as _sparse  # noqa: F401 - registers torch.ops.laconic.sparse_linear
from laconic.kernels.ops import ACTIVATIONS
from laconic.numerics import BlockSparse, Sparse24, mask_24, mask_blocks

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")

ISAS = range(native.load().best_isa() + 1) if native.load() is not None else ()
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
# Blocks of whole vectors, of part of one, of a row each, of a column each, of odd sizes.
BLOCKS = [(1, 16), (4, 16), (2, 32), (5, 48), (16, 1), (8, 2), (4, 4), (8, 8), (1, 4), (1, 1), (3, 5), (7, 20)]
ROWS_OF_X = [0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 40, 70]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def two_of_four(rows: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[str, tuple[Tensor | None, ...], Tensor]:
    x = noise(rows, k)
    sparse = Sparse24.pack(x * mask_24(x), dtype)
    return "2:4", (sparse.values, sparse.positions, None, sparse.scale), sparse.unpack()


def blocks(
    rows: int, k: int, block: tuple[int, int], dtype: torch.dtype = torch.float32, kept: float = 0.5
) -> tuple[str, tuple[Tensor | None, ...], Tensor]:
    x = noise(rows, k)
    sparse = BlockSparse.pack(x * mask_blocks(x, block, kept), block, dtype)
    return sparse.format, (sparse.values, sparse.columns, sparse.starts, sparse.scale), sparse.unpack()


def check(made: tuple[str, tuple[Tensor | None, ...], Tensor], isa: int) -> None:
    """All numbers of rows of x; a sum of k products, each rounded, is off by a part of the sum of their sizes."""
    format, operands, weight = made
    rows, k = weight.shape
    for number, m in enumerate(ROWS_OF_X):
        act = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
        x, bias = noise(m, k), noise(rows) if number % 3 else None
        got = cpu_sparse.sparse_linear(x, *operands, bias, format, act, isa=isa)
        want = ACTIVATIONS[act](x.double() @ weight.double().T + (bias if bias is not None else 0))
        size = (x.double().abs() @ weight.double().abs().T + 1).max() if want.numel() else 1.0
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=2e-6 * float(size), msg=lambda s, m=m: f"m={m}: {s}"
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_of_four_equals_the_dense_product(dtype: torch.dtype, isa: int) -> None:
    for rows, k in ((1, 4), (3, 8), (5, 28), (6, 32), (9, 36), (4, 64), (33, 100), (18, 260), (7, 516), (0, 8)):
        check(two_of_four(rows, k, dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_equal_the_dense_product(block: tuple[int, int], dtype: torch.dtype, isa: int) -> None:
    r, c = block
    for down, across in ((1, 1), (3, 5), (2, 300 // c + 1), (40 // r + 1, 7)):
        check(blocks(r * down, c * across, block, dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_nothing_and_all_of_it(kept: float, isa: int) -> None:
    check(blocks(12, 96, (4, 16), kept=kept), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa: int) -> None:
    for format, operands, _ in (two_of_four(77, 520), blocks(80, 512, (4, 16)), blocks(80, 512, (16, 1))):
        for m in (1, 5, 33):
            x = noise(m, operands[0].shape[1] * 2 if format == "2:4" else 512)
            first = cpu_sparse.sparse_linear(x, *operands, None, format, "silu", threads=1, isa=isa)
            for threads in (1, 2, 3, 4):
                again = cpu_sparse.sparse_linear(x, *operands, None, format, "silu", threads=threads, isa=isa)
                assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_takes_any_float_type_and_strides(dtype: torch.dtype) -> None:
    format, operands, weight = two_of_four(9, 64)
    x = noise(64, 6).to(dtype).t()[::2]  # neither contiguous nor aligned
    got = torch.ops.laconic.sparse_linear(x, *operands, format=format)
    assert got.dtype == dtype and got.shape == (3, 9)
    want = (x.float() @ weight.T).to(dtype)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)
    leading = torch.ops.laconic.sparse_linear(x.view(3, 1, 64), *operands, format=format)
    assert torch.equal(leading, got.view(3, 1, 9))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [2, 12])
def test_a_dropped_element_may_meet_anything(m: int, isa: int) -> None:
    """What stands beside the kept blocks does not count, be it inf; what a kept block meets does."""
    for format, operands, weight in (blocks(8, 64, (4, 16)), blocks(8, 64, (8, 2))):
        x = noise(m, 64)
        column = int((weight == 0).all(0).nonzero()[0]) if bool((weight == 0).all(0).any()) else None
        x[0, 5] = torch.nan
        got = cpu_sparse.sparse_linear(x, *operands, None, format, "none", isa=isa)
        assert torch.equal(got[0].isnan(), weight[:, 5] != 0) and not got[1:].isnan().any()
        if column is not None:
            x[1, column] = torch.inf
            assert cpu_sparse.sparse_linear(x, *operands, None, format, "none", isa=isa)[1].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    format, (values, columns, starts, _), _ = blocks(8, 64, (4, 16))
    x = noise(1, 64)

    def call(columns: Tensor = columns, starts: Tensor = starts, **options: int) -> Tensor:
        return cpu_sparse.sparse_linear(x, values, columns, starts, None, None, format, "none", **options)

    call()
    for number in (-1, 4):
        wrong = columns.clone()
        wrong[2] = number
        with pytest.raises(ValueError, match="columns: one is outside of 0 to 3"):
            call(columns=wrong)
    with pytest.raises(ValueError, match="starts run from 0 to 3, must from 0 to 4"):
        call(starts=starts.clamp(max=3))
    with pytest.raises(ValueError, match="starts fall at block row 1"):
        call(starts=torch.tensor([0, 5, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="threads is 0"):
        call(threads=0)
    with pytest.raises(ValueError, match="isa is 9"):
        call(isa=9)


def test_the_edge_trusts_no_caller() -> None:
    _, (values, positions, _, _), _ = two_of_four(3, 64)
    x, out, cpu, none = noise(2, 64), torch.empty(2, 3), native.module(), (0, 0)
    fits = {
        "values": (values.data_ptr(), 96), "dtype": 1, "index": (positions.data_ptr(), 6), "starts": none, "scale": none,
        "rows": 3, "k": 64, "r": 1, "c": 1, "x": (x.data_ptr(), 128), "m": 2, "out": (out.data_ptr(), 6), "bias": none,
        "act": 0, "threads": 1,
    }  # fmt: skip
    cpu.sparse_linear(**fits)
    for change, says in (
        ({"values": (values.data_ptr(), 95)}, r"values: 95 elements given, the shape \(3, 32\) needs 96"),
        ({"index": (positions.data_ptr(), 5)}, "positions: 5 elements given"),
        ({"k": 66}, "k is 66, must be a multiple of 4"),
        ({"m": 3}, "x: 128 elements given"),
        ({"rows": -1}, "a size is negative"),
        ({"dtype": 2}, "values: there is no dtype number 2"),
        ({"dtype": 5}, "scale: int8 values have one"),
        ({"act": 9}, "act: there is no activation number 9"),
        ({"out": none}, "out: 0 elements given"),
    ):
        with pytest.raises(ValueError, match=says):
            cpu.sparse_linear(**(fits | change))
