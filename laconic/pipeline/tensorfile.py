"""Read and write safetensors files by `pread` and `pwrite`, with no whole file in memory; or look at one through a map.

The format is `u64 header length | JSON header | data`. Each half of the work has a file of its own:

    tensorfile_format    names, dtypes, limits, digests
    tensorfile_header    which files a folder has, and headers read and checked
    tensorfile_reader    `TensorReader`: tensors, or rows of them, in fresh memory or as views of the mapped file
    tensorfile_layout    `file_layout`: where every byte will go, and how tensors come to be aligned
    tensorfile_writer    `TensorWriter`: written in any order, complete or refused

Users of tensors import from here.
"""

from __future__ import annotations

from .tensorfile_format import AGAIN, CHUNK, INDEX, MAX_HEADER, SINGLE, bytes_of, row_range, tensor_digest
from .tensorfile_layout import FileLayout, Spec, file_layout
from .tensorfile_reader import TensorReader
from .tensorfile_writer import TensorWriter

__all__ = [
    "AGAIN", "CHUNK", "INDEX", "MAX_HEADER", "SINGLE", "FileLayout", "Spec", "TensorReader", "TensorWriter", "bytes_of",
    "file_layout", "row_range", "tensor_digest",
]  # fmt: skip
