"""Sparse weights at half of their elements against the dense product of torch in float32, alternating in one run.

    python benchmarks/sparse.py [--rounds 15] [--shapes 4096x4096 4096x11008] [--rows 1 4 16 64 512]
                                [--formats 2:4 block4x16 block16x1 block1x16] [--clock cpu] [--out FILE]

A shape is OUTxIN. Prints how many times faster than dense each is, with an interval, and writes a JSON record. The
dense weight in bfloat16 stands beside them, since it saves as many bytes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from alternate import CLOCKS, alternate, setting

from laconic.kernels import sparse as _sparse  # noqa: F401 - registers torch.ops.laconic.sparse_linear
from laconic.numerics import BlockSparse, Sparse24, mask_24, mask_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def sparse_of(weight: torch.Tensor, format: str, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """Operands of the op."""
    if format == "2:4":
        two = Sparse24.pack(weight * mask_24(weight), dtype)
        return two.values, two.positions, None, two.scale
    block = tuple(int(size) for size in format.removeprefix("block").split("x"))
    some = BlockSparse.pack(weight * mask_blocks(weight, block, 0.5), block, dtype)
    return some.values, some.columns, some.starts, some.scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--formats", nargs="+", default=["2:4", "block4x16", "block16x1", "block1x16"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "int8"])
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine, one thread")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    record = {"setting": setting(), "rounds": options.rounds, "clock": options.clock, "cases": []}
    for shape in options.shapes:
        out, k = (int(size) for size in shape.split("x"))
        weight = torch.randn(out, k, generator=generator)
        stored = {
            f"{format} {name}": (format, sparse_of(weight, format, DTYPES[name]))
            for format in options.formats
            for name in options.dtypes
        }
        half = weight.to(torch.bfloat16)
        for m in options.rows:
            x = torch.randn(m, k, generator=generator)
            runs = {
                "dense": partial(F.linear, x, weight),
                "dense bfloat16": partial(F.linear, x.to(torch.bfloat16), half),
            }
            for name, (format, operands) in stored.items():
                runs[name] = partial(torch.ops.laconic.sparse_linear, x, *operands, format=format)
            with torch.inference_mode():
                found = alternate(runs, "dense", options.rounds, options.clock)
            print(f"{shape}, {m} rows of x: dense {found['dense']['microseconds']:.0f} us", flush=True)
            for name, row in found.items():
                if name != "dense":
                    print(
                        f"  {name:22} {row['faster']:5.2f} x  [{row['faster_low']:.2f}, {row['faster_high']:.2f}]",
                        flush=True,
                    )
            record["cases"].append({"shape": [out, k], "rows_of_x": m, "found": found})
            if options.out is not None:
                options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
