"""Read the weights of this folder with numpy alone: neither laconic nor torch is needed.

    python read.py                                     what is stored
    python read.py encoder.layer.0.output.dense.weight statistics of one weight
    from read import Artifact
    weight = Artifact(".").weight("encoder.layer.0.output.dense.weight")

A packed parameter P is stored as `P_packed` (unsigned codes q of b bits, one LSB-first bit stream per row of its matrix, in
little-endian 32-bit words; ternary ones lie five to a byte), `P_scale` (s: one a row and group of columns, or one for all),
and perhaps `P_zero_point` (integers z, packed likewise but down the columns), `P_zero` (real z), or `P_codebook` (C). With a
`P_order`, column j of the matrix is column order[j] of the weight. Then, in float32,

    w = s (q - z)    z = 2^(b-1) where nothing is stored        w = s T[q]    by a table T of the scheme, or the rows of C

Scales in bytes are 2^(byte - 127) (e8m0) or floats of 8 bits over `P_global_scale` (e4m3); in codes (`P_scale_codes`) they
are o + a T[code], a one of `P_scale_absmax` for each run and o `P_scale_offset`. A layer L with an adapter holds its own
weight as L.base.weight, and L.weight is that plus alpha / rank lora_B lora_A. laconic.json says which parameter is what.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "C64": "<c8",
}  # fmt: skip
PARTS = ("packed", "scale", "zero_point", "zero", "order", "shape", "codebook", "global_scale", "scale_codes",
         "scale_absmax", "scale_offset")  # fmt: skip


def normal_float(bits, d=0.9677083):
    """Levels of NormalFloat: quantiles of a normal distribution on both sides of an exact 0."""
    q, half = NormalDist().inv_cdf, 2 ** (bits - 1)
    low, high = ([q(d - i * (d - 0.5) / n) for i in range(n)] for n in (half - 1, half))
    return np.array([*(-x for x in low), 0.0, *high[::-1]]) / q(d)


def small_float(exponent, mantissa):
    """The number of each bit pattern of a sign, an exponent and a mantissa of so many bits."""
    code = np.arange(2 ** (1 + exponent + mantissa))
    size, sign = code % (len(code) // 2), np.where(code < len(code) // 2, 1.0, -1.0)
    field, rest = size >> mantissa, size % 2**mantissa
    steps = rest + np.where(field > 0, 2**mantissa, 0)
    value = sign * np.ldexp(steps.astype(float), np.maximum(field, 1) - 2 ** (exponent - 1) + 1 - mantissa)
    if (exponent, mantissa) == (4, 3):
        value[size == 127] = np.nan
    return np.where(size > 124, np.nan, np.where(size == 124, sign * np.inf, value)) if exponent == 5 else value


def dynamic_map():
    """The 256 levels of scales in 8 bits: in each decade twice as many as in the one below, on both sides of 0."""
    levels = [0.0, 1.0]
    for decade in range(7):
        n = 2**decade
        i, low, high = np.arange(n + 1), float(np.float32(0.1)), 1.0
        step = float(np.float32((high - low) / n))
        edges = np.where(i < (n + 1) // 2, low + step * i, high - step * (n - i)).astype(np.float32)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2).astype(float)
        levels += [*middles, *-middles]
    return np.array(sorted(levels), np.float32)


FP4, FP4_BNB = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
TABLES = {
    "levelsnf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    **{f"levelsnf{bits}": normal_float(bits) for bits in (2, 3, 8)},
    "levelsfp4": [sign * x / 6 for sign in (1, -1) for x in FP4],
    "levelsfp4_bnb": [sign * x / 12 for sign in (1, -1) for x in FP4_BNB],
    **{f"floate{e}m{m}": small_float(e, m) for e, m in ((2, 1), (2, 3), (3, 2), (4, 3), (5, 2))},
    "floatint8": np.arange(256).astype(np.int8) / 64,
    "ternary": [-1, 0, 1],
    "binary": [-1, 1],
}  # fmt: skip
DYNAMIC, E4M3 = dynamic_map(), small_float(4, 3).astype(np.float32)


class Artifact:
    """The tensors of an artifact, as stored and as numbers; `folder` holds `model.safetensors` and `laconic.json`."""

    def __init__(self, folder="."):
        self.file = Path(folder) / "model.safetensors"
        with open(self.file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        self.header = {name: entry for name, entry in header.items() if not name.startswith("__pad_")}
        self.bytes = np.memmap(self.file, dtype=np.uint8, mode="r", offset=8 + length)
        records = json.loads((Path(folder) / "laconic.json").read_text(encoding="utf-8"))["records"]
        self.packed = {row["path"]: row for row in records if row["action"] == "pack"}
        self.owner = {alias: path for path, row in self.packed.items() for alias in row.get("aliases", ())}
        self.adapted = {f"{row['path']}.weight": row for row in records if row["action"] == "adapt"}

    def names(self):
        """Names of all weights: packed parameters and stored tensors, without the parts of the former."""
        parts = {f"{path}_{part}" for path in self.packed for part in PARTS}
        return sorted({*self.packed, *self.owner, *self.adapted, *(name for name in self.header if name not in parts)})

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
        """The weight at `path` as float32, recomputed from its codes where it is packed, its adapter added."""
        path = self.owner.get(path, path)
        if path in self.adapted:
            row, layer = self.adapted[path], path.removesuffix(".weight")
            b, a = (self.tensor(f"{layer}.lora_{side}").astype(np.float32) for side in "BA")
            update = np.float32(row["alpha"] / row["rank"]) * (b @ a)
            return self.weight(f"{layer}.base.weight") + (update.T if row.get("transposed") else update)
        if path not in self.packed:
            return self.tensor(path).astype(np.float32)
        spec = self.packed[path]["spec"]
        shape, scheme = tuple(spec["shape"]), Scheme(spec["scheme"])
        rows, k = matrix_shape(shape, spec["view"])
        words = self.tensor(f"{path}_packed")
        codes = unpack_ternary(words, k) if scheme.element == "ternary" else unpack(words, scheme.bits, k // scheme.run)
        scale = scheme.spread(self.scales(path, scheme, rows, k), k)
        if scheme.element.startswith("codebook"):
            matrix = scale * self.tensor(f"{path}_codebook").astype(np.float32)[codes].reshape(rows, k)
        elif scheme.table is not None:
            matrix = scale * scheme.table[codes]
        else:
            zero = np.full((1, 1), 2 ** (scheme.bits - 1), np.float32)
            if scheme.zero == "int":
                words = np.ascontiguousarray(self.tensor(f"{path}_zero_point").T)
                zero = unpack(words, scheme.bits, 1 if scheme.whole else rows).T.astype(np.float32)
            elif scheme.zero == "real":
                zero = self.tensor(f"{path}_zero").astype(np.float32)
            matrix = scale * (codes.astype(np.float32) - scheme.spread(zero, k))
        if spec.get("order"):
            matrix = matrix[:, np.argsort(self.tensor(f"{path}_order"))]
        return matrix.T if spec["view"] == "transposed" else matrix.reshape(shape)

    def scales(self, path, scheme, rows, k):
        """Scales (rows, groups), or one, as float32."""
        if scheme.nested is None:
            scale = self.tensor(f"{path}_scale")
            if scheme.scales == "e8m0":
                return np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
            if scheme.scales == "e4m3":
                return E4M3[scale] / self.tensor(f"{path}_global_scale")
            return scale.astype(np.float32)
        levels, bits, block = scheme.nested
        count = rows * max(1, -(-k // min(scheme.group or k, k)))
        codes = unpack(self.tensor(f"{path}_scale_codes"), bits, count)[0]
        size = self.tensor(f"{path}_scale_absmax").astype(np.float32)
        size = size if levels == "dynamic" else size / np.float32(2**bits - 1)
        steps = DYNAMIC[codes] if levels == "dynamic" else codes.astype(np.float32)
        found = steps * np.repeat(size, block)[:count] + self.tensor(f"{path}_scale_offset")
        return found.astype(np.float32).reshape(rows, -1)


class Scheme:
    """How numbers are stored, from its text: `v1/int4/group64/float16/minmax/zint/nearest`."""

    def __init__(self, text):
        parts = text.split("/")
        self.element = parts[1] if len(parts) == 7 and parts[0] == "v1" else ""
        book = self.element.startswith("codebook")
        if not (book or self.element.startswith("int") or self.element in TABLES):
            raise ValueError(f"the scheme {text!r} is newer than this reader: take the one of the newer laconic")
        width, _, run = self.element.removeprefix("codebook").partition("x")
        self.run = int(run or 1) if book else 1
        self.table = np.array(TABLES[self.element], np.float32) if self.element in TABLES else None
        self.bits = int(width.removeprefix("int")) if self.table is None else (len(self.table) - 1).bit_length()
        self.group = int(parts[2][5:]) if parts[2].startswith("group") else None
        self.whole, self.scales, self.zero = parts[2] == "tensor", parts[3], parts[5][1:]
        self.nested = None
        for levels in ("dynamic", "linear"):
            if self.scales.startswith(levels):
                bits, _, block = self.scales.removeprefix(levels).partition("x")
                self.nested = levels, int(bits), int(block.removesuffix("bfloat16").removesuffix("float16"))

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
            held = name.removesuffix("weight") + "base.weight" if name in artifact.adapted else name
            row = artifact.packed.get(artifact.owner.get(held, held))
            said, kind = (row["spec"], "scheme") if row else (artifact.header[held], "dtype")
            tied = f" (tied to {artifact.owner[name]})" if name in artifact.owner else ""
            more = f" + an adapter of rank {artifact.adapted[name]['rank']}" if name in artifact.adapted else ""
            print(f"{name}  {tuple(said['shape'])}  {said[kind]}{more}{tied}")
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
