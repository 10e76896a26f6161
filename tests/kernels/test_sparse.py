"""The sparse ops against float operations on the matrix written out: values, gradients, schema, export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.kernels import ops, sparse  # noqa: F401 - registers torch.ops.laconic.sparse_linear
from laconic.numerics import BlockSparse, Sparse24, mask_24, mask_blocks

laconic = torch.ops.laconic

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
FORMATS = ["2:4", "block1x4", "block1x16", "block4x16", "block2x1"]


def noise(*shape: int, seed: int = 1, **options) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def made(
    format: str, rows: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Operands, and the float32 matrix that they stand for."""
    x = noise(rows, k, seed=0)
    if format == "2:4":
        two = Sparse24.pack(x * mask_24(x), dtype)
        return (two.values, two.positions, None, two.scale), two.unpack()
    r, c = map(int, format.removeprefix("block").split("x"))
    some = BlockSparse.pack(x * mask_blocks(x, (r, c), 0.5), (r, c), dtype)
    return (some.values, some.columns, some.starts, some.scale), some.unpack()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("shape", [(48,), (4, 48), (2, 3, 48), (0, 48), (2, 0, 48)], ids=str)
def test_linear(format, values, shape):
    operands, weight = made(format, 8, 48, values)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, bias = noise(*shape).to(dtype), noise(8).to(dtype)
        with ops.by_reference():
            found = laconic.sparse_linear(x, *operands, bias, format=format, act="gelu")
            assert torch.equal(found, F.gelu(F.linear(x, weight.to(dtype), bias)))
            assert torch.equal(laconic.sparse_linear(x, *operands, format=format), F.linear(x, weight.to(dtype)))
    dense = laconic.sparse_dense(*operands, format=format, k=48, dtype=torch.float32)
    assert torch.equal(dense, weight)


@pytest.mark.parametrize(
    ("format", "rows", "k"), [("2:4", 0, 8), ("2:4", 3, 0), ("block2x4", 0, 8), ("block2x4", 4, 0)]
)
def test_empty(format, rows, k):
    operands, weight = made(format, rows, k)
    assert torch.equal(laconic.sparse_linear(noise(2, k), *operands, format=format), F.linear(noise(2, k), weight))


def test_nothing_kept():
    some = BlockSparse.pack(torch.zeros(4, 8), (2, 4))
    y = laconic.sparse_linear(noise(3, 8), some.values, some.columns, some.starts, None, noise(4), format="block2x4")
    assert torch.equal(y, noise(4).expand(3, 4))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("act", ["none", "silu"])
def test_gradients(format, act):
    operands, weight = made(format, 8, 48)
    inputs = [noise(4, 48).requires_grad_(), noise(8).requires_grad_()]
    y = laconic.sparse_linear(inputs[0], *operands, inputs[1], format=format, act=act)
    expected = ops.ACTIVATIONS[act](F.linear(inputs[0], weight, inputs[1]))
    ramp = torch.arange(y.numel()).view_as(y)
    for a, b in zip(
        torch.autograd.grad((y * ramp).sum(), inputs), torch.autograd.grad((expected * ramp).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("values", DTYPES)
def test_opcheck(format, values):
    operands, _ = made(format, 8, 48, values)
    for x in (noise(3, 48, requires_grad=True), noise(2, 0, 48), noise(48)):
        torch.library.opcheck(laconic.sparse_linear.default, (x, *operands), {"format": format})
    given = (noise(3, 48, requires_grad=True), *operands, noise(8, requires_grad=True))
    torch.library.opcheck(laconic.sparse_linear.default, given, {"format": format, "act": "gelu"})
    said = {"format": format, "k": 48, "dtype": torch.bfloat16}
    torch.library.opcheck(laconic.sparse_dense.default, operands, said)


def test_refusals():
    operands, _ = made("block4x16", 8, 48)
    with pytest.raises(ValueError, match="do not divide rows of 40"):
        laconic.sparse_linear(noise(2, 40), *operands, format="block4x16")
    all_of_it = BlockSparse.pack(noise(8, 48), (4, 16))
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        laconic.sparse_linear(noise(2, 32), all_of_it.values, all_of_it.columns, all_of_it.starts, format="block4x16")
    with pytest.raises(ValueError, match="'csr' is not known"):
        laconic.sparse_linear(noise(2, 48), *operands, format="csr")
    with pytest.raises(ValueError, match="act='swish'"):
        laconic.sparse_linear(noise(2, 48), *operands, format="block4x16", act="swish")
    two, _ = made("2:4", 8, 48)
    with pytest.raises(ValueError, match="does not take 44 columns"):
        laconic.sparse_linear(noise(2, 44), *two, format="2:4")


class SparseLinear(nn.Module):
    def __init__(self):
        super().__init__()
        (self.values, self.index, self.starts, _), _ = made("block4x16", 8, 48)

    def forward(self, x: Tensor) -> Tensor:
        return laconic.sparse_linear(x, self.values, self.index, self.starts, format="block4x16")


def test_export():
    model = SparseLinear()
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (noise(3, 48),), dynamic_shapes=dynamic, strict=False)
    assert laconic.sparse_linear.default in {node.target for node in program.graph.nodes}
    assert torch.equal(program.module()(noise(5, 48)), model(noise(5, 48)))
