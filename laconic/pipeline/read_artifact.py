"""Read the weights of this folder with numpy alone: neither laconic nor torch is needed.

    python read.py                                     what is stored
    python read.py encoder.layer.0.output.dense.weight statistics of one weight

    from read import Artifact
    weight = Artifact(".").weight("encoder.layer.0.output.dense.weight")

A packed parameter P is stored as `P_packed` (unsigned codes q of b bits, one LSB-first bit stream per row of
its matrix, in little-endian 32-bit words), `P_scale` (s: one a row and group of columns, or one for all), and
perhaps `P_zero_point` (integers z, packed likewise but down the columns) or `P_zero` (real z). Where there is a
`P_order`, column j of the matrix is column order[j] of the weight. Then, in float32,

    w = s * (q - z)        z = 2^(b-1) where nothing is stored

or, for schemes of levels, ternary and binary numbers, w = s * T[q] with a table T. Ternary codes lie five to a byte.

laconic.json says per parameter which it is, and how the matrix lies in the parameter's shape.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "C64": "<c8",
}  # fmt: skip

# What the codes of these schemes stand for; the numbers are those of float32.
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4_BNB = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
TABLES = {
    "levelsnf4": np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32),
    "levelsfp4": np.array([sign * x / 6 for sign in (1, -1) for x in FP4], np.float32),
    "levelsfp4_bnb": np.array([sign * x / 12 for sign in (1, -1) for x in FP4_BNB], np.float32),
    "ternary": np.array([-1, 0, 1], np.float32),
    "binary": np.array([-1, 1], np.float32),
}  # fmt: skip


class Artifact:
    """The tensors of an artifact, as stored and as numbers.

    Args:
        folder: holds `model.safetensors` and `laconic.json`.
    """

    def __init__(self, folder="."):
        self.file = Path(folder) / "model.safetensors"
        with open(self.file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        self.header = {name: entry for name, entry in header.items() if not name.startswith("__pad_")}
        self.bytes = np.memmap(self.file, dtype=np.uint8, mode="r", offset=8 + length)
        manifest = json.loads((Path(folder) / "laconic.json").read_text(encoding="utf-8"))
        self.packed = {row["path"]: row for row in manifest["records"] if row["action"] == "pack"}
        self.owner = {alias: path for path, row in self.packed.items() for alias in row.get("aliases", ())}

    def names(self):
        """Names of all weights: packed parameters and stored tensors, without the parts of the former."""
        parts = {f"{path}_{part}" for path in self.packed for part in
                 ("packed", "scale", "zero_point", "zero", "order", "shape")}  # fmt: skip
        return sorted({*self.packed, *self.owner, *(name for name in self.header if name not in parts)})

    def tensor(self, name):
        """A stored tensor as it lies; bfloat16 comes as the float32 of the same value."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise TypeError(f"{name} is stored as {entry['dtype']}, which numpy has no type for")
        # From a copy: numpy wants items aligned, which small tensors at the end of the file are not.
        values = np.frombuffer(self.bytes[begin:end].tobytes(), DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values.reshape(entry["shape"])

    def weight(self, path):
        """The weight at `path` as float32, recomputed from its codes where it is packed."""
        path = self.owner.get(path, path)
        if path not in self.packed:
            return self.tensor(path).astype(np.float32)
        spec = self.packed[path]["spec"]
        shape, scheme = tuple(spec["shape"]), Scheme(spec["scheme"])
        rows, k = matrix_shape(shape, spec["view"])
        words = self.tensor(f"{path}_packed")
        codes = unpack_ternary(words, k) if scheme.element == "ternary" else unpack(words, scheme.bits, k)
        scale = self.tensor(f"{path}_scale").astype(np.float32)
        if scheme.table is not None:
            matrix = scheme.spread(scale, k) * scheme.table[codes]
        else:
            zero = np.full((1, 1), 2 ** (scheme.bits - 1), np.float32)
            if scheme.zero == "int":
                words = np.ascontiguousarray(self.tensor(f"{path}_zero_point").T)
                zero = unpack(words, scheme.bits, len(scale)).T.astype(np.float32)
            elif scheme.zero == "real":
                zero = self.tensor(f"{path}_zero").astype(np.float32)
            matrix = scheme.spread(scale, k) * (codes.astype(np.float32) - scheme.spread(zero, k))
        if spec.get("order"):
            matrix = matrix[:, np.argsort(self.tensor(f"{path}_order"))]
        return matrix.T if spec["view"] == "transposed" else matrix.reshape(shape)


class Scheme:
    """How numbers are stored, from its text: `v1/int4/group64/float16/minmax/zint/nearest`."""

    def __init__(self, text):
        parts = text.split("/")
        if len(parts) != 7 or parts[0] != "v1" or not (parts[1].startswith("int") or parts[1] in TABLES):
            raise ValueError(f"the scheme {text!r} is newer than this reader: take the one of the newer laconic")
        self.element = parts[1]
        self.table = TABLES.get(self.element)
        self.bits = int(self.element[3:]) if self.table is None else (len(self.table) - 1).bit_length()
        self.group = int(parts[2][5:]) if parts[2].startswith("group") else None
        self.zero = parts[5][1:]

    def spread(self, values, k):
        """One value per column, from one per group of columns; shorter axes broadcast."""
        if self.group is None or values.shape[1] == 1:
            return values
        return np.repeat(values, min(self.group, k), axis=1)[:, :k]


def unpack(words, bits, k):
    """Codes (rows, k) uint8 of words (rows, ceil(k * bits / 32))."""
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)
    stream = np.pad(stream, ((0, 0), (0, 1))).astype(np.uint16)  # the last code may look at a byte behind the end
    start = np.arange(k) * bits
    byte, shift = start // 8, (start % 8).astype(np.uint16)
    pairs = stream[:, byte] | (stream[:, byte + 1] << np.uint16(8))
    return ((pairs >> shift) & np.uint16((1 << bits) - 1)).astype(np.uint8)


def unpack_ternary(words, k):
    """Codes (rows, k) of words (rows, ceil(k / 20)): digits of 3, the first of five leads, in a fraction of 256."""
    rest = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)
    digits = np.stack([(rest * np.uint8(3**i)).astype(np.uint16) * 3 >> 8 for i in range(5)], axis=2)
    return digits.reshape(words.shape[0], -1)[:, :k]


def matrix_shape(shape, view):
    """(rows, k): `rows` flattens all but the first dimension, `last` all but the last one."""
    total = int(np.prod(shape))
    if view == "transposed":
        return shape[1], shape[0]
    if view == "last":
        return (total // shape[-1] if shape[-1] else 0), shape[-1]
    return shape[0], (total // shape[0] if shape[0] else 0)


def main(arguments):
    """List all weights, or describe those that are named."""
    artifact = Artifact(Path(__file__).parent)
    if not arguments:
        for name in artifact.names():
            row = artifact.packed.get(artifact.owner.get(name, name))
            entry = artifact.header.get(name)
            shape = row["spec"]["shape"] if row else entry["shape"]
            how = row["spec"]["scheme"] if row else entry["dtype"]
            tied = f" (tied to {artifact.owner[name]})" if name in artifact.owner else ""
            print(f"{name}  {tuple(shape)}  {how}{tied}")
        return 0
    for name in arguments:
        if name not in artifact.names():
            print(f"there is no weight {name!r} here: run read.py without arguments for a list", file=sys.stderr)
            return 2
        w = artifact.weight(name)
        said = f"mean {w.mean():.6g}, std {w.std():.6g}, min {w.min():.6g}, max {w.max():.6g}" if w.size else "empty"
        print(f"{name}  {w.shape}  {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
