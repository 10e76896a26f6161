"""Read and write safetensors files by `pread` and `pwrite`: no memory map, no whole file in memory.

The format is `u64 header length | JSON header | data`. Facts about the safetensors library (0.8), which
decide our layout: it refuses holes between tensors ("invalid offset") and bytes that belong to no tensor
("file not fully covered"), and it accepts any number of spaces after the JSON. So alignment is made real in
two ways:

1. the header is padded with spaces until the data starts at a multiple of `align`;
2. tensors whose byte count is a multiple of `align` come first and so need nothing. Odd ones of at least
   `align` bytes follow, each at an aligned offset behind an explicit `__pad_N` tensor (uint8, zeros). Odd
   ones below `align` bytes (shapes, small biases) come last, at multiples of their element size only.

A tensor of at least `align` bytes therefore always starts at a multiple of `align`, and a network whose
widths are multiples of 16 has no padding tensor at all, which matters to other readers: some refuse tensor
names that they don't know.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput, LaconicError

__all__ = ["FileLayout", "TensorReader", "TensorWriter", "file_layout", "tensor_digest"]

MAX_HEADER = 100_000_000  # the limit of the safetensors library
CHUNK = 16 << 20  # bytes read at a time where a tensor is streamed
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download or copy it again"

_DTYPES: dict[str, torch.dtype] = {
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
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_PAD = re.compile(r"__pad_\d+")


def tensor_digest(dtype: torch.dtype, shape: Sequence[int], chunks: Iterator[Any]) -> str:
    """SHA-256 (hex) of `dtype`, `shape` and the tensor's little-endian bytes, given in chunks."""
    sha = hashlib.sha256(f"{_CODES[dtype]}:{','.join(map(str, shape))}:".encode())
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: `offset` counts from the start of the file."""

    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorReader:
    """Tensors of one `.safetensors` file, or of a folder with `model.safetensors` or its shards and index.

    Every header is parsed and checked here before anything is read. Reads are `pread` into fresh memory, so
    they may come from several threads and work under a limit on address space.

    Args:
        path: a file or a folder.

    Attributes:
        path: as given.
        files: the weight files, in order.
        metadata: the `__metadata__` of the files, merged.
        notes: sentences on what is odd and harmless (the index's total size is wrong, tensors that it doesn't
            list).
        size: bytes of the weight files.
        header_bytes: bytes of headers with their length fields and filling spaces.
        padding_bytes: bytes of `__pad_N` tensors.

    Raises:
        BadInput: if a file is missing, cut short, or its header lies.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.notes: list[str] = []
        self.header_bytes = self.padding_bytes = self.size = 0
        self._entries: dict[str, _Entry] = {}
        self._descriptors: dict[int, int] = {}
        self.files, weight_map, total = _weight_files(self.path)
        unlisted = 0
        for number, file in enumerate(self.files):
            tensors, start = self._open(number, file)
            for name, entry in tensors.items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    unlisted += 1
                    continue
                self._entries[name] = entry
            self.header_bytes += start
        self._check_index(weight_map, total, unlisted)

    def _open(self, number: int, file: Path) -> tuple[dict[str, _Entry], int]:
        """Parse one file's header; return its tensors and the offset of its data."""
        try:
            self._descriptors[number] = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise BadInput(f"{file} does not exist: {AGAIN}") from None
        except OSError as error:
            raise BadInput(f"{file} cannot be opened: {error.strerror}") from error
        size = os.fstat(self._descriptors[number]).st_size
        self.size += size
        header, start = _read_header(self._descriptors[number], file, size)
        metadata, tensors = _parse_header(header, file, number, start, size)
        self.metadata.update(metadata)
        self.padding_bytes += sum(entry.nbytes for name, entry in tensors.items() if _is_padding(name, entry))
        return {name: entry for name, entry in tensors.items() if not _is_padding(name, entry)}, start

    def _check_index(self, weight_map: Mapping[str, str] | None, total: int | None, unlisted: int) -> None:
        """Compare the index with what the shards hold."""
        if weight_map is None:
            return
        lacking = [name for name in weight_map if name not in self._entries]
        if lacking:
            raise BadInput(
                f"{self.path / INDEX} says that {lacking[0]} is in {weight_map[lacking[0]]}, but that "
                f"file does not hold it{_more(lacking)}: {AGAIN} (index and shards must be of one version)"
            )
        if unlisted:
            self.notes.append(f"{unlisted} tensors in the shards are not in {INDEX} and are ignored")
        stored = sum(entry.nbytes for entry in self._entries.values())
        if total is not None and total != stored:
            self.notes.append(f"{INDEX} says total_size {total}, the shards hold {stored} bytes of tensors")

    def names(self) -> list[str]:
        """Names of all tensors except padding, in file order."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def where(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and the offset of its first byte in that file."""
        entry = self._entry(name)
        return self.files[entry.file], entry.offset

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows `[start:stop)` of dimension 0 (all by default) in fresh memory.

        Raises:
            BadInput: if the file has become shorter since it was opened.
            IndexError: if the rows are outside of the tensor.
        """
        entry = self._entry(name)
        if start is None and stop is None:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            self._fill(name, bytes_of(tensor), entry.offset)
            return tensor
        start, stop = row_range(name, entry.shape, start, stop)
        tensor = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        self._fill(name, bytes_of(tensor), entry.offset + start * row)
        return tensor

    def digest(self, name: str) -> str:
        """SHA-256 of the tensor's dtype, shape and bytes, read in bounded chunks."""
        entry = self._entry(name)
        return tensor_digest(entry.dtype, entry.shape, self._chunks(name, entry))

    def _chunks(self, name: str, entry: _Entry) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK, entry.nbytes)))
        for done in range(0, entry.nbytes, CHUNK):
            piece = buffer[: min(CHUNK, entry.nbytes - done)]
            self._fill(name, piece, entry.offset + done)
            yield piece

    def _fill(self, name: str, target: memoryview, offset: int) -> None:
        """Read `len(target)` bytes at `offset`; the system may hand them over in several pieces."""
        entry = self._entry(name)
        while target:
            count = os.preadv(self._descriptors[entry.file], [target[: 1 << 30]], offset)
            if count == 0:
                raise BadInput(f"{self.files[entry.file]} ended while {name} was read: {AGAIN}")
            target, offset = target[count:], offset + count

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise LaconicError(f"{self.path} holds no tensor {name!r}") from None

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()


def row_range(name: str, shape: tuple[int, ...], start: int | None, stop: int | None) -> tuple[int, int]:
    """`start` and `stop` with defaults filled in, checked against the rows of `shape`."""
    rows = shape[0] if shape else 0
    start, stop = start or 0, rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"rows {start}:{stop} of {name}, which has shape {tuple(shape)}")
    return start, stop


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None, int | None]:
    """The files that hold the weights of `path`, with the index's weight map and total size if it has one."""
    if path.is_file():
        return [path], None, None
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if (path / SINGLE).is_file():
        return [path / SINGLE], None, None
    if not (path / INDEX).is_file():
        raise BadInput(f"{path} holds neither {SINGLE} nor {INDEX}")
    try:
        index = json.loads((path / INDEX).read_bytes())
        weight_map = index["weight_map"]
        total = index.get("metadata", {}).get("total_size")
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path / INDEX} is not a valid index (no usable weight_map): {AGAIN}") from error
    for file in files:
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise BadInput(f"{path / INDEX} names the shard {file!r}, which is not a plain file name")
        if not (path / file).is_file():
            lost = sum(other == file for other in weight_map.values())
            raise BadInput(f"{path / INDEX} names {file} ({lost} tensors), which is missing: {AGAIN}")
    return [path / file for file in files], weight_map, total if isinstance(total, int) else None


def _read_header(descriptor: int, file: Path, size: int) -> tuple[bytes, int]:
    """The JSON bytes of the header and the offset where the data starts."""
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise BadInput(f"{file} has only {size} bytes and is not a safetensors file: {AGAIN}")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER:
        raise BadInput(
            f"{file} claims a header of {length} bytes, above the format's 100 MB: it is no safetensors file"
        )
    if length > size - 8:
        raise BadInput(
            f"{file} claims a header of {length} bytes but has only {size} bytes: it is cut short, {AGAIN}"
        )
    return os.pread(descriptor, length, 8), 8 + length


def _parse_header(
    raw: bytes, file: Path, number: int, start: int, size: int
) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Check the header of one file entirely; return its metadata and its tensors in file order."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"{file}: the header has the key {twice!r} twice: {AGAIN}")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: the header is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(header, dict):
        raise BadInput(f"{file}: the header is not a JSON object: {AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{file}: __metadata__ in the header is not a map of strings: {AGAIN}")
    entries = [(name, _entry(name, fields, file, number, start)) for name, fields in header.items()]
    entries.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end, before = start, "the header"
    for name, entry in entries:
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else f"leaves a hole of {entry.offset - end} bytes behind"
            raise BadInput(f"{file}: tensor {name} {what} {before}, so the header is wrong: {AGAIN}")
        end, before = entry.offset + entry.nbytes, name
        if end > size:
            raise BadInput(
                f"{file} is cut short: tensor {name} ends at byte {end} but the file has {size} bytes "
                f"(half a checkpoint): {AGAIN}"
            )
    if end != size:
        raise BadInput(
            f"{file} has {size - end} bytes behind its last tensor, unknown to its header: {AGAIN}"
        )
    return metadata, dict(entries)


def _entry(name: str, fields: Any, file: Path, number: int, start: int) -> _Entry:
    """One tensor's entry from its header fields, checked by itself."""
    try:
        code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{file}: tensor {name} lacks dtype, shape or data_offsets: {AGAIN}") from None
    if not isinstance(code, str) or code not in _DTYPES:
        raise BadInput(
            f"{file}: tensor {name} has dtype {code!r}, which laconic does not read: convert it first"
        )
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise BadInput(f"{file}: tensor {name} has shape {shape!r}, which is not a list of sizes: {AGAIN}")
    if not _is_count(begin) or not _is_count(end) or end < begin:
        raise BadInput(f"{file}: tensor {name} has offsets [{begin!r}, {end!r}], not a range: {AGAIN}")
    dtype = _DTYPES[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise BadInput(
            f"{file}: tensor {name} of shape {shape} and dtype {code} takes {nbytes} bytes, but the header "
            f"gives it {end - begin}: {AGAIN}"
        )
    return _Entry(number, dtype, tuple(shape), start + begin, nbytes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_padding(name: str, entry: _Entry) -> bool:
    return _PAD.fullmatch(name) is not None and entry.dtype is torch.uint8 and len(entry.shape) == 1


def _more(names: Sequence[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""


# --- writing ------------------------------------------------------------------------------------------------

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


def file_layout(
    specs: Sequence[Spec], metadata: Mapping[str, str] | None = None, align: int = 64
) -> FileLayout:
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
        if name in sizes or name == "__metadata__" or _PAD.fullmatch(name):
            raise ValueError(f"the tensor name {name!r} is given twice or is reserved")
        if dtype not in _CODES:
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
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
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
            raise LaconicError(
                f"{name}: rows {start}+{tuple(tensor.shape)} do not fit into the shape {shape}"
            )
        offset, nbytes = self.layout.offsets[name]
        row = nbytes // shape[0] if shape[0] else 0
        self._pwrite(bytes_of(tensor.detach().cpu().contiguous()), offset + start * row)
        _add_interval(self._written[name], start * row, (start + len(tensor)) * row)

    def missing(self) -> list[str]:
        """Names of the tensors that are not written, or not entirely."""
        sizes = self.layout.offsets
        return [
            name for name, done in self._written.items() if sizes[name][1] and done != [(0, sizes[name][1])]
        ]

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
