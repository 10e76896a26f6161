"""GGUF files: a header of named values, a table of tensors, and their bytes; read by mapping, written whole.

    "GGUF", version, number of tensors, number of values
    values: name, type, value                       strings are a length and UTF-8; arrays a type, a length and items
    tensors: name, number of dimensions, sizes (the fastest first), type, offset
    bytes of the tensors, each at a multiple of general.alignment (32)

All numbers are little endian. Of types that are neither floats nor blocks of `ggml_blocks` (K-quants and others) the sizes
and values come from the package gguf, if it is installed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laconic.errors import BadInput

from .ggml_blocks import BLOCKS, FLOATS, NUMBERS, decode

__all__ = ["GgufFile", "GgufTensor", "write_gguf"]

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
AGAIN = "copy or download it again"
# Type of a value in the header -> struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# No header needs more; a file that asks for it is broken, and would be believed for minutes.
_MOST = 1 << 26


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file: its type by name, shape (slowest dimension first), and where its bytes lie."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file, its header parsed and checked, its tensors mapped.

    Args:
        file: the path.

    Attributes:
        values: of the header, by name.
        tensors: by name, in the order of the file.

    Raises:
        BadInput: it is no GGUF file that is whole and of a version and byte order that we read.
    """

    def __init__(self, file: str | os.PathLike[str]):
        self.path = Path(file)
        try:
            with open(self.path, "rb") as stream:
                self.size = os.fstat(stream.fileno()).st_size
                self._bytes: Any = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise BadInput(f"{self.path} cannot be read: {error.strerror}") from error
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
            raise self._broken(f"its header does not parse ({error})") from error

    def _broken(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is a broken GGUF file: {what}; {AGAIN}")

    def _read_header(self) -> None:
        if self._bytes[:4] != MAGIC:
            raise BadInput(f"{self.path} is no GGUF file: it begins with {bytes(self._bytes[:4])!r}")
        self._at = 4
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise BadInput(f"{self.path} is a big-endian GGUF file: convert it with gguf_convert_endian.py first")
        if version not in (2, VERSION):
            raise BadInput(f"{self.path} has version {version} of GGUF, versions 2 and 3 are read: convert it again")
        count, values = self._scalar("Q"), self._scalar("Q")
        if max(count, values) > _MOST:
            raise self._broken(f"it counts {count} tensors and {values} values")
        self.values: dict[str, Any] = {}
        for _ in range(values):
            name = self._string()
            self.values[name] = self._value(self._scalar("I"))
        self.tensors: dict[str, GgufTensor] = {}
        found = []
        for _ in range(count):
            name, dims = self._string(), self._scalar("I")
            if dims > 4:
                raise self._broken(f"tensor {name} has {dims} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
            found.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = self.values.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._broken(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for name, shape, number, offset in found:
            tensor = self._tensor(name, shape, number, start + offset)
            self.tensors[name] = tensor

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        kind, (length, size) = self._sizes(name, number)
        row = shape[-1] if shape else 1
        if row % length:
            raise self._broken(f"tensor {name} of type {kind} has rows of {row}, no multiple of {length}")
        count = 1
        for n in shape:
            count *= n
        nbytes = count // length * size
        if offset + nbytes > self.size:
            raise self._broken(f"tensor {name} ends at byte {offset + nbytes} and the file has {self.size}")
        return GgufTensor(name, kind, shape, offset, nbytes)

    def _sizes(self, name: str, number: int) -> tuple[str, tuple[int, int]]:
        kind = NUMBERS.get(number)
        if kind in BLOCKS:
            return kind, (BLOCKS[kind].length, BLOCKS[kind].nbytes)
        if kind in FLOATS:
            return kind, (1, np.dtype(FLOATS[kind][1]).itemsize)
        gguf = self._package(name, kind or f"number {number}")
        try:
            known = gguf.GGMLQuantizationType(number)
            return known.name, gguf.GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            raise BadInput(
                f"{self.path}: tensor {name} has the type number {number}, which neither laconic nor the installed gguf "
                "knows: update gguf, or convert the file to Q8_0 with llama.cpp's llama-quantize"
            ) from None

    def _package(self, name: str, kind: str) -> Any:
        try:
            import gguf
        except ImportError:
            raise BadInput(
                f"{self.path}: tensor {name} has the type {kind}, which the package gguf reads: run `pip install gguf`, or "
                "convert the file with llama.cpp's llama-quantize --allow-requantize to Q8_0"
            ) from None
        return gguf

    def _take(self, count: int) -> bytes:
        if count > self.size - self._at:
            raise self._broken(f"its header ends at byte {self.size}, in the middle of a value")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            if count > _MOST:
                raise self._broken(f"it has an array of {count} items")
            if inner in _SCALARS:
                code = f"{count}{_SCALARS[inner]}"
                return list(struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"))))
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._broken(f"a value has the type {kind}")
        return self._scalar(_SCALARS[kind])

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 (rows, bytes of a row); rows are what lies before the last dimension."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.offset)
        rows = 1
        for n in tensor.shape[:-1]:
            rows *= n
        return flat.reshape(rows, -1) if rows else flat.reshape(0, 0)

    def decoded(self, name: str, raw: np.ndarray) -> np.ndarray:
        """Rows of a tensor's bytes as float32.

        Raises:
            BadInput: its type is read by gguf, which is not installed.
        """
        kind = self.tensors[name].type
        if kind in BLOCKS:
            return decode(raw, kind)
        raw = np.ascontiguousarray(raw)
        if kind == "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if kind in FLOATS:
            return raw.view(FLOATS[kind][1]).astype(np.float32)
        gguf = self._package(name, kind)
        try:
            return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float32)
        except NotImplementedError as error:
            raise BadInput(
                f"{self.path}: tensor {name} has the type {kind}, which gguf does not dequantize: convert the file with "
                "llama.cpp's llama-quantize --allow-requantize to Q8_0"
            ) from error


# --- writing ---------------------------------------------------------------------------------------------------------


def write_gguf(
    file: str | os.PathLike[str],
    values: Mapping[str, Any],
    tensors: Sequence[tuple[str, str, tuple[int, ...], np.ndarray]],
) -> None:
    """Write a GGUF file, put in place by a rename.

    Args:
        file: the path.
        values: of the header: strings, bools, ints (uint32), floats (float32), and lists of one of these (ints in lists
            are int32).
        tensors: name, type, shape (slowest dimension first) and bytes (or floats of the type) of each.
    """
    path = Path(file)
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for name, value in values.items():
        head.append(_packed_string(name) + _packed_value(value))
    offset = 0
    for name, kind, shape, data in tensors:
        number = BLOCKS[kind].number if kind in BLOCKS else FLOATS[kind][0]
        head.append(_packed_string(name) + struct.pack("<I", len(shape)))
        head.append(struct.pack(f"<{len(shape)}QIQ", *shape[::-1], number, offset))
        offset += data.nbytes + -data.nbytes % ALIGNMENT
    header = b"".join(head)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as stream:
        stream.write(header + bytes(-len(header) % ALIGNMENT))
        for _, _, _, data in tensors:
            stream.write(np.ascontiguousarray(data).data)
            stream.write(bytes(-data.nbytes % ALIGNMENT))
    os.replace(part, path)


def _packed_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _packed_value(value: Any) -> bytes:
    if isinstance(value, list):
        first = value[0] if value else ""
        kind = (
            _STRING
            if isinstance(first, str)
            else 6
            if isinstance(first, float)
            else 7
            if isinstance(first, bool)
            else 5
        )
        head = struct.pack("<IIQ", _ARRAY, kind, len(value))
        if kind == _STRING:
            return head + b"".join(map(_packed_string, value))
        return head + struct.pack(f"<{len(value)}{_SCALARS[kind]}", *value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)
