"""Writing safetensors files by `pwrite`, at offsets known up front and in any order."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from laconic.errors import BadInput, LaconicError

from .tensorfile_format import bytes_of
from .tensorfile_layout import Spec, file_layout

__all__ = ["TensorWriter"]

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class TensorWriter:
    """Writes a safetensors file at offsets known up front, in any order; equal contents give equal bytes.

    Used as a context manager it is closed, and checked for completeness, unless an exception passes.

    Args:
        path: the file; an existing one is replaced.
        specs: `(name, dtype, shape)` of every tensor.
        metadata: strings for the header.
        align: see `file_layout`.

    Attributes:
        layout: offsets, header and padding bytes, total size.

    Raises:
        BadInput: if the disk has too little room.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[Spec],
        metadata: Mapping[str, str] | None = None,
        align: int = 64,
    ):
        self.path = Path(path)
        self.layout = file_layout(specs, metadata, align)
        self._specs = {name: (dtype, tuple(shape)) for name, dtype, shape in specs}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._specs}
        have = self.path.stat().st_size if self.path.is_file() else 0  # replaced, so its bytes come free
        free = shutil.disk_usage(self.path.parent).free + have
        if self.layout.total_bytes > free:
            raise self._full(free)
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._reserve()
        self._pwrite(memoryview(self.layout.header), 0)

    @property
    def header_bytes(self) -> int:
        """Bytes of length field, JSON and filling spaces."""
        return self.layout.header_bytes

    @property
    def padding_bytes(self) -> int:
        """Bytes of all padding tensors."""
        return self.layout.padding_bytes

    @property
    def total_bytes(self) -> int:
        """The size of the file."""
        return self.layout.total_bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor, whose dtype and shape must be as announced."""
        _, shape = self._check(name, tensor)
        if tuple(tensor.shape) != shape:
            raise LaconicError(f"{name}: announced with shape {shape}, given {tuple(tensor.shape)}")
        offset, nbytes = self.layout.offsets[name]
        self._pwrite(bytes_of(tensor.detach().cpu().contiguous()), offset)
        self._written[name] = [(0, nbytes)]

    def write_rows(self, name: str, start: int, tensor: Tensor) -> None:
        """Write rows `[start : start + len(tensor))` of dimension 0."""
        _, shape = self._check(name, tensor)
        if tuple(tensor.shape[1:]) != shape[1:] or not shape or not 0 <= start <= shape[0] - len(tensor):
            raise LaconicError(f"{name}: rows {start}+{tuple(tensor.shape)} do not fit into the shape {shape}")
        offset, nbytes = self.layout.offsets[name]
        row = nbytes // shape[0] if shape[0] else 0
        self._pwrite(bytes_of(tensor.detach().cpu().contiguous()), offset + start * row)
        _add_interval(self._written[name], start * row, (start + len(tensor)) * row)

    def missing(self) -> list[str]:
        """Names of the tensors that are not written, or not entirely."""
        sizes = self.layout.offsets
        return [name for name, done in self._written.items() if sizes[name][1] and done != [(0, sizes[name][1])]]

    def close(self) -> None:
        """Check that every tensor is complete, flush to the disk and close.

        Raises:
            LaconicError: naming the tensors that are missing.
        """
        if self._descriptor is None:
            return
        missing = self.missing()
        if missing:
            self.abandon()
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise LaconicError(f"{self.path} is incomplete: {', '.join(missing[:3])}{more} not written")
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._translated(error) from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without any check, leaving the file as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _check(self, name: str, tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self._specs:
            raise LaconicError(f"{self.path}: {name!r} was not announced")
        dtype, shape = self._specs[name]
        if tensor.dtype is not dtype:
            raise LaconicError(f"{name}: announced as {dtype}, given {tensor.dtype}")
        return dtype, shape

    def _reserve(self) -> None:
        """Ask for the file's whole room now, so that a full disk shows before the work and not after."""
        try:
            os.posix_fallocate(self._descriptor, 0, self.total_bytes)
        except (AttributeError, OSError) as error:
            # Not every system can; then the length alone is set, and `pwrite` may still find the disk full.
            if isinstance(error, OSError) and error.errno not in _NO_FALLOCATE:
                self.abandon()
                self.path.unlink(missing_ok=True)
                raise self._translated(error) from error
            os.ftruncate(self._descriptor, self.total_bytes)

    def _pwrite(self, source: memoryview, offset: int) -> None:
        if self._descriptor is None:
            raise LaconicError(f"{self.path} is closed")
        while source:
            try:
                count = os.pwrite(self._descriptor, source[: 1 << 30], offset)
            except OSError as error:
                raise self._translated(error) from error
            source, offset = source[count:], offset + count

    def _translated(self, error: OSError) -> Exception:
        """A full disk or quota as a sentence; any other error as it is."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        return self._full(shutil.disk_usage(self.path.parent).free)

    def _full(self, free: int) -> BadInput:
        return BadInput(
            f"the disk of {self.path.parent} is full: {self.path.name} needs {self.total_bytes} bytes and "
            f"{free} are free; make room or choose another output folder"
        )


def _add_interval(done: list[tuple[int, int]], start: int, stop: int) -> None:
    """Add [start, stop) to sorted disjoint intervals, in place, merging what touches."""
    touching = [(a, b) for a, b in done if a <= stop and start <= b]
    merged = (min([start, *(a for a, _ in touching)]), max([stop, *(b for _, b in touching)]))
    done[:] = sorted([interval for interval in done if interval not in touching] + [merged])
