"""Time products and convolutions of bits and bytes against torch in float32: ratios of one alternating run.

    python benchmarks/binary_gemm.py --out benchmarks/records/binary-gemm.json [--threads 1] [--rounds 15]

Every round times each candidate once, in turn, so that a machine that others use slows all of them alike. Ratios are
medians over the rounds of (float32 / candidate) within a round, with the quarters of the rounds around them; times are
the least and the median. Inputs are float32 and random; "signs packed" has both operands as bits, everything else
counts the packing of the input too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from laconic.kernels import binary, conv, native

GEMM = (1024, 4096, 4096)  # rows of x, columns of the result, length of the sums
FEW = (1, 16, 64)
# channels, channels of the output, side, kernel, stride
CONVS = [
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (64, 128, 56, 3, 2),
    (64, 256, 56, 1, 1),
]

Candidates = dict[str, Callable[[], object]]


def main() -> None:
    """Time everything, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the record goes, JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if native.load() is None:
        parser.error(f"the compiled kernels are missing: {native.status()['why']}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record = {
        "command": f"python benchmarks/binary_gemm.py --threads {args.threads} --rounds {args.rounds}",
        "torch": torch.__version__,
        "cpu_threads": args.threads,
        "isa": native.status()["isa"],
        "load_at_start": os.getloadavg(),
        "cases": [],
    }
    for name, candidates in [
        gemm(*GEMM),
        *(gemm(m, *GEMM[1:], widths=()) for m in FEW),
        *(convolution(*c) for c in CONVS),
    ]:
        rows = compare(candidates, args.rounds)
        record["cases"].append({"case": name, "candidates": rows})
        for row in rows:
            ratio = f"{row['ratio']:7.1f}x ({row['ratio_low']:.1f} to {row['ratio_high']:.1f})"
            print(f"{name:38s} {row['name']:22s} {row['least_ms']:9.3f} {row['median_ms']:9.3f} ms {ratio}", flush=True)
    record["load_at_end"] = os.getloadavg()
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def gemm(
    m: int, n: int, k: int, widths: tuple[tuple[int, int], ...] = ((1, 4), (2, 2), (4, 4))
) -> tuple[str, Candidates]:
    """Products (m, k) x (n, k): of signs on every instruction set, and of more bits."""
    x, weight = torch.randn(m, k), torch.randn(n, k)
    codes, one = binary.pack_signs(weight), torch.ones(1)
    planes, signs = codes[None], binary.pack_signs(x)[None]
    found: Candidates = {"torch float32": lambda: F.linear(x, weight)}
    for isa in range(native.module().best_isa(), -1, -1):
        name = native.module().isa(isa)
        found[f"signs packed, {name}"] = lambda isa=isa: binary.bit_product(signs, planes, k, isa=isa)
    found["binary_linear"] = lambda: torch.ops.laconic.binary_linear(x, codes, one)
    for w_bits, x_bits in widths:
        w, scale = binary.quantize_planes(weight, w_bits, "bipolar")
        found[f"bit_serial w{w_bits} a{x_bits}"] = lambda w=w, scale=scale, x_bits=x_bits: (
            torch.ops.laconic.bit_serial_linear(x, w, scale, bits=x_bits)
        )
    return f"linear {m}x{n}x{k}", found


def convolution(channels: int, out: int, side: int, kernel: int, stride: int) -> tuple[str, Candidates]:
    """One image, zero padding."""
    x, weight = torch.randn(1, channels, side, side), torch.randn(out, channels, kernel, kernel)
    scale = weight.abs().amax((1, 2, 3)) / 127
    codes = conv.pack_int8_weight((weight / scale[:, None, None, None]).round().to(torch.int8))
    signs = conv.pack_binary_weight(weight)
    step, how = x.abs().amax() / 127, {"stride": [stride] * 2, "padding": [kernel // 2] * 2}
    found: Candidates = {
        "torch float32": lambda: F.conv2d(x, weight, **how),
        "int8, static": lambda: torch.ops.laconic.int8_conv2d(x, codes, scale, None, step, signed=True, **how),
        "int8, dynamic": lambda: torch.ops.laconic.int8_conv2d(x, codes, scale, **how),
        "binary, padding 0": lambda: torch.ops.laconic.binary_conv2d(x, signs, scale, **how),
        "binary, padding -1": lambda: torch.ops.laconic.binary_conv2d(x, signs, scale, pad_value=-1, **how),
    }
    return f"conv {channels}-{out} {side}x{side} k{kernel} s{stride}", found


def compare(candidates: Candidates, rounds: int) -> list[dict]:
    """One row a candidate; the first is what the others are compared with."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    base = next(iter(times.values()))
    rows = []
    for name, own in times.items():
        ratios = [b / t for b, t in zip(base, own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {"name": name, "least_ms": min(own), "median_ms": statistics.median(own), "ratio": middle, "ratio_low": low, "ratio_high": high}
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
