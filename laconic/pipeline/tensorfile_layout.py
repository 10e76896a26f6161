"""Where every byte of a safetensors file goes, with tensors aligned.

Facts about the safetensors library (0.8), which decide our layout: it refuses holes between tensors ("invalid offset")
and bytes that belong to no tensor ("file not fully covered"), and it accepts any number of spaces after the JSON. So
alignment is made real in two ways:

1. the header is padded with spaces until the data starts at a multiple of `align`;
2. tensors whose byte count is a multiple of `align` come first and so need nothing. Odd ones of at least `align` bytes
   follow, each at an aligned offset behind an explicit `__pad_N` tensor (uint8, zeros). Odd ones below `align` bytes
   (shapes, small biases) come last, at multiples of their element size only.

A tensor of at least `align` bytes therefore always starts at a multiple of `align`, and a network whose widths are
multiples of 16 has no padding tensor at all, which matters to other readers: some refuse tensor names that they don't
know.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .tensorfile_format import CODES, MAX_HEADER
from .tensorfile_header import PAD

__all__ = ["FileLayout", "Spec", "file_layout"]

Spec = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class FileLayout:
    """Where every byte of a file goes, known before anything is written.

    Attributes:
        header: length field, JSON and filling spaces, as written.
        offsets: tensor name -> (offset from the start of the file, bytes).
        padding: likewise for the `__pad_N` tensors.
        total_bytes: the size of the file.
    """

    header: bytes
    offsets: dict[str, tuple[int, int]]
    padding: dict[str, tuple[int, int]]
    total_bytes: int

    @property
    def header_bytes(self) -> int:
        """Bytes of length field, JSON and filling spaces."""
        return len(self.header)

    @property
    def padding_bytes(self) -> int:
        """Bytes of all padding tensors."""
        return sum(nbytes for _, nbytes in self.padding.values())


def file_layout(specs: Sequence[Spec], metadata: Mapping[str, str] | None = None, align: int = 64) -> FileLayout:
    """The layout of a file with these tensors; a function of the set of `specs`, not of their order.

    Args:
        specs: `(name, dtype, shape)` of every tensor.
        metadata: strings for the header's `__metadata__`.
        align: a power of two from 8 on; tensors of at least that many bytes start at its multiples.

    Raises:
        ValueError: on names given twice or kept for padding, dtypes outside the format, or an odd `align`.
    """
    if align < 8 or align & (align - 1):
        raise ValueError(f"align={align} must be a power of two from 8 on")
    sizes: dict[str, int] = {}
    for name, dtype, shape in specs:
        if name in sizes or name == "__metadata__" or PAD.fullmatch(name):
            raise ValueError(f"the tensor name {name!r} is given twice or is reserved")
        if dtype not in CODES:
            raise ValueError(f"{name}: safetensors has no dtype for {dtype}")
        sizes[name] = math.prod(shape) * dtype.itemsize

    def order(spec: Spec) -> tuple[int, int, str]:
        name, dtype, _ = spec
        group = 0 if sizes[name] % align == 0 else 1 if sizes[name] > align else 2
        return group, -dtype.itemsize, name

    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    relative: dict[str, tuple[int, int]] = {}
    padding: dict[str, tuple[int, int]] = {}
    end = 0

    def place(
        where: dict[str, tuple[int, int]], name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int
    ) -> int:
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        where[name] = (end, nbytes)
        return end + nbytes

    for name, dtype, shape in sorted(specs, key=order):
        step = align if sizes[name] > align else dtype.itemsize
        if end % step and sizes[name]:
            gap = -end % step
            end = place(padding, f"__pad_{len(padding)}", torch.uint8, (gap,), gap)
        end = place(relative, name, dtype, shape, sizes[name])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would take {len(text)} bytes, more than the format's 100 MB")
    data = 8 + len(text)
    return FileLayout(
        struct.pack("<Q", len(text)) + text,
        {name: (data + offset, nbytes) for name, (offset, nbytes) in relative.items()},
        {name: (data + offset, nbytes) for name, (offset, nbytes) in padding.items()},
        data + end,
    )
