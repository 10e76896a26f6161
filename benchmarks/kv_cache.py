"""Time attention of one token over a long cache: torch's own in float32 against ours on floats and on packed numbers.

    python benchmarks/kv_cache.py [--tokens 4096 16384] [--heads 8 32] [--threads N] [--cpu-time] [--out FILE]

One layer with 8 heads of keys and values of 128 numbers, batch 1. Every round runs every arm once, one after the other,
so that what else the machine does falls on all of them. An arm's ratio is torch's time over its own in the same round:
the median over rounds, with the interval between its quartiles. `--cpu-time` counts the time that the calling thread
ran (use it with one thread) and not what passed, for a machine that others use too. GB/s are bytes of the cache over
the median. The error is relative to torch's output for random numbers, a mean of many that nearly cancel: it says that
an arm computes what it should, and not what a model loses.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.kernels import native
from laconic.kernels.attention import BLOCK, quantize_tokens
from laconic.pipeline.measure import machine, versions

KV_HEADS, DIM = 8, 128
REFERENCE = "torch float32"
# Arm: bits, group, keys by channel.
PACKED = {
    "8 bits": (8, DIM, False),
    "4 bits": (4, DIM, False),
    "4 bits, group 32": (4, 32, False),
    "4 bits, keys by channel": (4, DIM, True),
    "2 bits": (2, DIM, False),
    "2 bits, group 32": (2, 32, False),
    "2 bits, keys by channel": (2, DIM, True),
}

Arm = tuple[Callable[[], Tensor], int]  # what is timed, and the bytes of the cache that it reads


def arms(heads: int, tokens: int) -> dict[str, Arm]:
    """Every arm on the same random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, DIM, generator=generator) for h, n in ((heads, 1), *[(KV_HEADS, tokens)] * 2))
    attend = torch.ops.laconic.decode_attention
    made: dict[str, Arm] = {
        REFERENCE: (lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != KV_HEADS), 2 * k.nbytes),
        # As transformers calls it for one token: heads that share keys become rows of one product.
        "torch float32, heads as rows": (
            lambda: F.scaled_dot_product_attention(q.view(1, KV_HEADS, -1, DIM), k, v).view_as(q), 2 * k.nbytes,
        ),
        "float32": (lambda: attend(q, k, v, recent=tokens), 2 * k.nbytes),
    }  # fmt: skip
    k16, v16 = k.bfloat16(), v.bfloat16()
    made["bfloat16"] = lambda: attend(q, k16, v16, recent=tokens), 2 * k16.nbytes
    for name, (bits, group, by_channel) in PACKED.items():
        keys = [x.contiguous() for x in quantize_tokens(k, bits, group, torch.float16, by_channel)]
        values = [x.contiguous() for x in quantize_tokens(v, bits, group, torch.float16)]

        run = functools.partial(
            attend, q, None, None, *keys, *values, packed=tokens, k_bits=bits, v_bits=bits
        )  # fmt: skip
        made[name] = run, sum(x.nbytes for x in (*keys, *values))
    return made


def measure(made: dict[str, Arm], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every round after a first that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        for name, (run, _) in made.items():
            start = clock()
            run()
            if number:
                times[name].append(clock() - start)
    return times


def rows(made: dict[str, Arm], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What the record says of every arm."""
    found = []
    want = made[REFERENCE][0]()
    for name, (run, size) in made.items():
        ratios = sorted(a / b for a, b in zip(times[REFERENCE], times[name], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        median = statistics.median(times[name])
        found.append(
            {
                "arm": name,
                "ms": 1000 * median,
                "bytes": size,
                "gb_per_s": size / median / 1e9,
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "relative_error": float((run() - want).square().mean().sqrt() / want.square().mean().sqrt()),
            }  # fmt: skip
        )
    return found


def main() -> None:
    """Time every arm at every length and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help=f"multiples of {BLOCK}")
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 32], help="of queries")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    runs, load = [], os.getloadavg()
    for heads in options.heads:
        for tokens in options.tokens:
            made = arms(heads, tokens)
            found = rows(made, measure(made, options.rounds, clock))
            runs.append({"heads": heads, "tokens": tokens, "rows": found})
            print(f"{tokens} tokens, {heads} heads of queries on {KV_HEADS} of keys and values")
            for row in found:
                low, high = row["ratio_quartiles"]
                print(
                    f"  {row['arm']:<30} {row['ms']:8.3f} ms  {row['gb_per_s']:6.1f} GB/s  "
                    f"{row['ratio']:5.2f}x [{low:.2f}, {high:.2f}]  error {row['relative_error']:.1e}",
                    flush=True,
                )
    record = {
        "command": " ".join(["python", *sys.argv]), "kv_heads": KV_HEADS, "dim": DIM, "rounds": options.rounds,
        "clock": "time of the calling thread" if options.cpu_time else "time passed", "load_at_start": load,
        "isa": native.status()["isa"], "runs": runs, "machine": machine(), "versions": versions(),
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
