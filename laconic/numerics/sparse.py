"""Sparse matrices as they are stored: two of every four (`Sparse24`), and blocks (`BlockSparse`).

A matrix W (rows, k) becomes tensors that a kernel reads as they lie, values beside indices:

- `Sparse24`: of every four consecutive elements of a row at most two are kept. `values` (rows, k/2) holds them in
  order, and `positions` where in their four they stand: codes of 2 bits (rows, k/2), dense as `pack` lays them, so 32-bit
  word i of a row belongs to its elements 32 i .. 32 i + 31. Within a four positions rise; where fewer than two elements
  are not zero, zeros fill up, the first ones that are free. k is a multiple of 4.

      W[r, 4 j + p[r, 2 j + i]] = values[r, 2 j + i]        j < k / 4, i < 2

- `BlockSparse`: of the (rows/r, k/c) blocks of r x c elements some are kept, row of blocks by row of blocks (block
  compressed sparse rows): those of block row b are number `starts[b]` to `starts[b + 1] - 1` of `values` (n, r, c), and
  `columns` (n,) says which block column each is, rising within a row. Rows are a multiple of r and k one of c.

      W[r b + i, c columns[n] + j] = values[n, i, j]        starts[b] <= n < starts[b + 1]

Values are float32, bfloat16 or int8; int8 comes with `scale` (rows, 1), float32, of its row: W = scale * value, scale =
max |W| / 127 of the row, 1 where that is 0. Indices are int32. Values are contiguous; nothing is padded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .elements import words_per_row
from .finite import check_finite
from .packing import pack, unpack

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
TOP = 127  # largest size of an int8 value


@dataclass(frozen=True)
class Sparse24:
    """A matrix of which at most two of every four elements of a row are kept.

    Attributes:
        values: (rows, k/2) float32, bfloat16 or int8.
        positions: (rows, ceil(k/32)) int32 words of 2-bit positions.
        scale: (rows, 1) float32 of int8 values, else None.

    Example:
        >>> sparse = Sparse24.pack(torch.tensor([[0.0, 3.0, 0.0, 5.0, 0.0, 0.0, 7.0, 0.0]]))
        >>> sparse.values.tolist(), sparse.indices().tolist()
        ([[3.0, 5.0, 0.0, 7.0]], [[1, 3, 0, 2]])
        >>> torch.equal(Sparse24.pack(sparse.unpack()).values, sparse.values)
        True
    """

    values: Tensor
    positions: Tensor
    scale: Tensor | None = None

    format = "2:4"

    def __post_init__(self) -> None:
        _check_values("Sparse24", self.values, 2)
        rows, half = self.values.shape
        if half % 2:
            raise ValueError(f"Sparse24: values have {half} columns, which are no pairs")
        _check_tensor("Sparse24: positions", self.positions, torch.int32, (rows, words_per_row(half, 2)))
        _check_scale("Sparse24", self.values, self.scale, rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, k) of the matrix."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return self.values.nbytes + self.positions.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    @staticmethod
    def pack(x: Tensor, dtype: torch.dtype = torch.float32, name: str = "tensor") -> Sparse24:
        """The sparse form of a matrix (rows, k) that has at most two nonzero elements in every four.

        Raises:
            ValueError: it has more somewhere, or k is no multiple of 4; or a value does not fit in `dtype`.
            NotFinite: inf or nan in `x`.
        """
        fours = _fours(x, name)
        check_finite(x, name)
        kept = fours != 0
        count = kept.sum(-1)
        if count.numel() and int(count.max()) > 2:
            row, four = (int(i) for i in (count > 2).nonzero()[0])
            raise ValueError(
                f"{name}: row {row} has {int(count[row, four])} nonzero elements from column {4 * four} on, 2:4 keeps two "
                "of four; zero the others first (mask_24)"
            )
        # Nonzeros first and in order, then free places in order; the two that are left stand in order again.
        at = kept.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(-1).values
        rows, k = x.shape
        values, scale = _stored(fours.gather(-1, at).reshape(rows, k // 2), _row_scale(x, dtype), dtype, name)
        return Sparse24(values, pack(at.reshape(rows, k // 2).to(torch.uint8).cpu(), 2).to(x.device), scale)

    def indices(self) -> Tensor:
        """(rows, k/2) uint8: where each value stands in its four, 0 to 3."""
        return unpack(self.positions, 2, self.values.shape[1])

    def unpack(self) -> Tensor:
        """The matrix (rows, k) in float32. Two values of one place, which `check` refuses, add up."""
        rows, half = self.values.shape
        first = torch.arange(half, device=self.values.device) // 2 * 4
        whole = torch.zeros((rows, 2 * half), dtype=torch.float32, device=self.values.device)
        return whole.scatter_add_(1, self.indices().long() + first, _floats(self.values, self.scale))

    def check(self, name: str = "tensor") -> None:
        """Look at the numbers too, as a file from elsewhere needs.

        Raises:
            ValueError: positions do not rise within a four.
            NotFinite: inf or nan among values or scales.
        """
        pairs = self.indices().unflatten(1, (self.values.shape[1] // 2, 2))
        if not bool((pairs[..., 0] < pairs[..., 1]).all()):
            row, four = (int(i) for i in (pairs[..., 0] >= pairs[..., 1]).nonzero()[0])
            raise ValueError(f"{name}: positions do not rise in row {row}, columns {4 * four} to {4 * four + 3}")
        _check_numbers(self.values, self.scale, name)


@dataclass(frozen=True)
class BlockSparse:
    """A matrix of which only some blocks are kept.

    Attributes:
        values: (n, r, c) float32, bfloat16 or int8.
        columns: (n,) int32, block columns.
        starts: (rows/r + 1,) int32, where each block row begins; the last is n.
        k: columns of the matrix.
        scale: (rows, 1) float32 of int8 values, else None.

    Example:
        >>> sparse = BlockSparse.pack(torch.tensor([[0.0, 0, 1, 2], [0, 0, 0, 0], [0, 3, 0, 0]]), (1, 2))
        >>> sparse.values.tolist(), sparse.columns.tolist(), sparse.starts.tolist()
        ([[[1.0, 2.0]], [[0.0, 3.0]]], [1, 0], [0, 1, 1, 2])
        >>> sparse.format, sparse.shape, sparse.density
        ('block1x2', (3, 4), 0.3333333333333333)
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    k: int
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        _check_values("BlockSparse", self.values, 3)
        count, r, c = self.values.shape
        if r < 1 or c < 1 or self.k < 0 or self.k % c:
            raise ValueError(f"BlockSparse: blocks of {r} x {c} do not divide rows of {self.k} elements")
        _check_tensor("BlockSparse: columns", self.columns, torch.int32, (count,))
        if self.starts.ndim != 1 or self.starts.shape[0] < 1:
            raise ValueError(f"BlockSparse: starts have shape {tuple(self.starts.shape)}, must be (block rows + 1,)")
        _check_tensor("BlockSparse: starts", self.starts, torch.int32, tuple(self.starts.shape))
        _check_scale("BlockSparse", self.values, self.scale, self.shape[0])

    @property
    def block(self) -> tuple[int, int]:
        """(r, c) of a block."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def format(self) -> str:
        """As the op takes it: `block4x16`."""
        return f"block{self.block[0]}x{self.block[1]}"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, k) of the matrix."""
        return (self.starts.shape[0] - 1) * self.block[0], self.k

    @property
    def density(self) -> float:
        """Share of blocks that are kept."""
        rows, k = self.shape
        return self.values.numel() / max(1, rows * k)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        parts = [self.values, self.columns, self.starts, *([self.scale] if self.scale is not None else [])]
        return sum(part.nbytes for part in parts)

    @staticmethod
    def pack(
        x: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32, name: str = "tensor"
    ) -> BlockSparse:
        """The sparse form of a matrix (rows, k): its blocks (r, c) that are not all zero.

        Raises:
            ValueError: blocks do not divide the matrix; or a value does not fit in `dtype`.
            NotFinite: inf or nan in `x`.
        """
        blocks = _blocks(x, block, name)
        check_finite(x, name)
        kept = (blocks != 0).any(-1).any(-1)
        row, column = kept.nonzero(as_tuple=True)
        starts = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=x.device)
        starts[1:] = kept.sum(1).cumsum(0)
        scale = _row_scale(x, dtype)
        of_row = None if scale is None else scale.view(-1, block[0])[row].unsqueeze(-1)  # (n, r, 1)
        values, _ = _stored(blocks[row, column], of_row, dtype, name)
        return BlockSparse(values, column.to(torch.int32), starts, x.shape[1], scale)

    def unpack(self) -> Tensor:
        """The matrix (rows, k) in float32. Two blocks of one place, which `check` refuses, add up.

        Raises:
            ValueError: an index points outside.
        """
        self._check_bounds("tensor")
        (rows, k), (r, c) = self.shape, self.block
        row = self._block_rows()
        values = self.values.float()
        if self.scale is not None:
            values = values * self.scale.view(-1, r)[row].unsqueeze(-1)
        whole = torch.zeros((rows // r, k // c, r, c), dtype=torch.float32, device=values.device)
        whole.index_put_((row, self.columns.long()), values, accumulate=True)
        return whole.transpose(1, 2).reshape(rows, k)

    def check(self, name: str = "tensor") -> None:
        """Look at the numbers too, as a file from elsewhere needs.

        Raises:
            ValueError: an index points outside, or columns do not rise within a block row.
            NotFinite: inf or nan among values or scales.
        """
        self._check_bounds(name)
        row = self._block_rows()
        falls = (self.columns[1:] <= self.columns[:-1]) & (row[1:] == row[:-1])
        if bool(falls.any()):
            raise ValueError(f"{name}: columns do not rise in block row {int(row[1:][falls][0])}")
        _check_numbers(self.values, self.scale, name)

    def _block_rows(self) -> Tensor:
        """(n,) the block row of each block."""
        each = self.starts.diff().long()
        return torch.repeat_interleave(torch.arange(len(each), device=each.device), each)

    def _check_bounds(self, name: str) -> None:
        count, c = self.values.shape[0], self.block[1]
        if int(self.starts[0]) != 0 or int(self.starts[-1]) != count or bool((self.starts.diff() < 0).any()):
            raise ValueError(f"{name}: starts must rise from 0 to {count}, the number of blocks")
        if count and not 0 <= int(self.columns.min()) <= int(self.columns.max()) < self.k // c:
            raise ValueError(f"{name}: a block column is outside of 0 to {self.k // c - 1}")


Sparse = Sparse24 | BlockSparse


def sparse_from(
    values: Tensor, index: Tensor, starts: Tensor | None, scale: Tensor | None, format: str, k: int
) -> Sparse:
    """The sparse matrix of tensors as the ops take them: `index` are positions or block columns.

    Raises:
        ValueError: the format is not known, or the tensors do not belong to it and to `k` columns.
    """
    if format == Sparse24.format:
        sparse = Sparse24(values, index, scale)
        if starts is not None or sparse.shape[1] != k:
            raise ValueError(f"a 2:4 matrix of {sparse.shape[1]} columns without starts does not take {k} columns")
        return sparse
    parsed = re.fullmatch(r"block([1-9][0-9]*)x([1-9][0-9]*)", format)
    if parsed is None:
        raise ValueError(f"sparse format {format!r} is not known: 2:4, or a block as in block4x16")
    if starts is None:
        raise ValueError(f"{format}: block-sparse matrices have starts")
    blocks = BlockSparse(values, index, starts, k, scale)
    if blocks.format != format:
        raise ValueError(f"{format}: the values are blocks of {blocks.block[0]} x {blocks.block[1]}")
    return blocks


def mask_24(x: Tensor, name: str = "tensor") -> Tensor:
    """(rows, k) bool: the two largest by size of every four elements of a row; of equals the first.

    Raises:
        ValueError: k is no multiple of 4.
    """
    fours = _fours(x, name)
    largest = fours.abs().sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, largest, True).view(x.shape)


def mask_blocks(x: Tensor, block: tuple[int, int], kept: float, name: str = "tensor") -> Tensor:
    """(rows, k) bool: the share `kept` of all blocks (rounded to whole ones) of largest sum of squares; of equals the first.

    Raises:
        ValueError: blocks do not divide the matrix, or the share is not in [0, 1].
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"mask_blocks(kept={kept}): a share in [0, 1]")
    blocks = _blocks(x, block, name)
    energy = blocks.double().square().sum((-1, -2))
    chosen = energy.flatten().sort(descending=True, stable=True).indices[: round(kept * energy.numel())]
    mask = torch.zeros(energy.numel(), dtype=torch.bool, device=x.device)
    mask[chosen] = True
    return mask.view(energy.shape).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


# --- what both share --------------------------------------------------------------------------------------------------


def _fours(x: Tensor, name: str) -> Tensor:
    """(rows, k/4, 4) view of a matrix."""
    if x.ndim != 2 or x.shape[1] % 4:
        raise ValueError(f"{name}: 2:4 takes a matrix whose rows are fours of elements, got shape {tuple(x.shape)}")
    return x.reshape(x.shape[0], x.shape[1] // 4, 4)


def _blocks(x: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """(rows/r, k/c, r, c) of a matrix."""
    r, c = block
    if x.ndim != 2 or r < 1 or c < 1 or x.shape[0] % r or x.shape[1] % c:
        raise ValueError(f"{name}: blocks of {r} x {c} do not divide a matrix of shape {tuple(x.shape)}")
    return x.reshape(x.shape[0] // r, r, x.shape[1] // c, c).transpose(1, 2)


def _row_scale(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(rows, 1) float32 scale of int8 values; 1 of a row of zeros."""
    if dtype != torch.int8:
        return None
    size = x.float().abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros((x.shape[0], 1), dtype=torch.float32)
    return torch.where(size == 0, torch.ones_like(size), size / TOP)


def _stored(values: Tensor, scale: Tensor | None, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor | None]:
    """Values in their storage type, under a scale that broadcasts against them."""
    if dtype not in VALUE_DTYPES:
        raise ValueError(f"{name}: values are stored as float32, bfloat16 or int8, not as {dtype}")
    if scale is None:
        stored = values.to(dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"{name}: a value does not fit in {dtype}; scale the tensor down, or store another type")
        return stored, None
    if bool((scale == 0).any()):
        raise ValueError(f"{name}: a row is so small that its scale is 0 in float32; store it as float32")
    return (values.float() / scale).round().clamp(-TOP, TOP).to(torch.int8).contiguous(), scale


def _floats(values: Tensor, scale: Tensor | None) -> Tensor:
    return values.float() if scale is None else values.float() * scale


def _check_values(what: str, values: Tensor, ndim: int) -> None:
    if values.ndim != ndim or values.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"{what}: values have {ndim} axes and are float32, bfloat16 or int8, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )


def _check_scale(what: str, values: Tensor, scale: Tensor | None, rows: int) -> None:
    if (values.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"{what}: a scale belongs to int8 values and to no others, got values of {values.dtype}")
    if scale is not None:
        _check_tensor(f"{what}: scale", scale, torch.float32, (rows, 1))


def _check_tensor(what: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or tuple(x.shape) != shape:
        raise ValueError(f"{what}: expected {dtype} of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")


def _check_numbers(values: Tensor, scale: Tensor | None, name: str) -> None:
    if values.dtype != torch.int8:
        check_finite(values, name)
    if scale is not None:
        check_finite(scale, f"{name} (scale)")
