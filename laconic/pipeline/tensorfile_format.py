"""The safetensors format: names of files and dtypes, limits, and a digest of a tensor's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AGAIN", "CHUNK", "CODES", "DTYPES", "INDEX", "MAX_HEADER", "SINGLE", "bytes_of", "row_range", "tensor_digest",
]  # fmt: skip

MAX_HEADER = 100_000_000  # the limit of the safetensors library
CHUNK = 16 << 20  # bytes read at a time where a tensor is streamed
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download or copy it again"
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def tensor_digest(dtype: torch.dtype, shape: Sequence[int], chunks: Iterator[Any]) -> str:
    """SHA-256 (hex) of `dtype`, `shape` and the tensor's little-endian bytes, given in chunks."""
    sha = hashlib.sha256(f"{CODES[dtype]}:{','.join(map(str, shape))}:".encode())
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def row_range(name: str, shape: tuple[int, ...], start: int | None, stop: int | None) -> tuple[int, int]:
    """`start` and `stop` with defaults filled in, checked against the rows of `shape`."""
    rows = shape[0] if shape else 0
    start, stop = start or 0, rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"rows {start}:{stop} of {name}, which has shape {tuple(shape)}")
    return start, stop
