"""Reading safetensors files: tensors by `pread` into fresh memory, or as views of the mapped file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from laconic.errors import BadInput, LaconicError

from .tensorfile_format import AGAIN, CHUNK, INDEX, bytes_of, row_range, tensor_digest
from .tensorfile_header import Entry, is_padding, parse_header, read_header, weight_files

__all__ = ["TensorReader"]


class TensorReader:
    """Tensors of one `.safetensors` file, or of a folder with `model.safetensors` or its shards and index.

    Every header is parsed and checked here before anything is read. `read` is `pread` into fresh memory, so it may
    come from several threads and works under a limit on address space. `view` maps the file and copies nothing.

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
        self._entries: dict[str, Entry] = {}
        self._descriptors: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap | None] = {}
        self.files, weight_map, total = weight_files(self.path)
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

    def _open(self, number: int, file: Path) -> tuple[dict[str, Entry], int]:
        """Parse one file's header; return its tensors and the offset of its data."""
        try:
            self._descriptors[number] = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise BadInput(f"{file} does not exist: {AGAIN}") from None
        except OSError as error:
            raise BadInput(f"{file} cannot be opened: {error.strerror}") from error
        size = os.fstat(self._descriptors[number]).st_size
        self.size += size
        header, start = read_header(self._descriptors[number], file, size)
        metadata, tensors = parse_header(header, file, number, start, size)
        self.metadata.update(metadata)
        self.padding_bytes += sum(entry.nbytes for name, entry in tensors.items() if is_padding(name, entry))
        return {name: entry for name, entry in tensors.items() if not is_padding(name, entry)}, start

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

    def view(self, name: str) -> Tensor:
        """A tensor that lies in the memory-mapped file: bytes come when they are touched, and are never copied.

        The mapping is private and copies on write: who writes to the tensor gets pages of its own, and the file stays
        as it is. The mapping lives as long as a tensor in it, also after `close`; meanwhile nothing may cut the file
        short. Where it cannot be mapped (an unaligned tensor, a limit on address space), the tensor is read.
        """
        entry = self._entry(name)
        mapped = self._mapped(entry.file)
        if mapped is None or entry.nbytes == 0 or entry.offset % entry.dtype.itemsize:
            return self.read(name)
        count = entry.nbytes // entry.dtype.itemsize
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)

    def prefetch(self) -> None:
        """Ask the system to fetch all files into its cache, and do not wait for it: `view` will touch their bytes."""
        for number in range(len(self.files)):
            mapped = self._mapped(number)
            if mapped is not None and hasattr(mmap, "MADV_WILLNEED"):
                mapped.madvise(mmap.MADV_WILLNEED)

    def _mapped(self, number: int) -> mmap.mmap | None:
        """The map of one file, made when it is first asked for; None where the system refuses."""
        if number not in self._maps:
            try:
                self._maps[number] = mmap.mmap(self._descriptors[number], 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):
                self._maps[number] = None
        return self._maps[number]

    def digest(self, name: str) -> str:
        """SHA-256 of the tensor's dtype, shape and bytes, read in bounded chunks."""
        entry = self._entry(name)
        return tensor_digest(entry.dtype, entry.shape, self._chunks(name, entry))

    def _chunks(self, name: str, entry: Entry) -> Iterator[memoryview]:
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

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise LaconicError(f"{self.path} holds no tensor {name!r}") from None

    def close(self) -> None:
        """Close the files; tensors that `view` gave stay valid."""
        self._maps = {}  # each tensor holds on to its map
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


def _more(names: Sequence[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
