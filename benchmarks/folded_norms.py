"""Time transformers whose norms are folded against the same with LayerNorm, and a norm by deviations against variances.

    python benchmarks/folded_norms.py [--width 192] [--layers 12] [--tokens 197] [--batch 1 8] [--threads N] [--cpu-time]
                                      [--out FILE]

**Models.** An encoder of pre-norm blocks with fused queries, keys and values, of random weights and the size of DeiT-T by
default. The arms have the same weights but for the norms: LayerNorm; RMSNorm; RepBN and UnifiedNorm as they are in
evaluation mode; the same two after `laconic.norm.fold`; and no norm at all, the bound on what folding can give. The
largest difference of a folded model's output from the unfolded one's, relative to its largest value, stands beside it.

**L1 against L2.** (x - mean) / spread over the last axis, the spread being the mean magnitude (L1) or the root of the mean
square (L2) of what is left, both of the same elementary operations, each in a call of its own. torch's fused LayerNorm
stands beside them: what a kernel of one's own gains is more than the choice of the power.

Every round runs every arm once, one after the other, so that what else the machine does falls on all of them. An arm's
ratio is the baseline's time over its own in the same round: the median over rounds, with the interval between its
quartiles. `--cpu-time` counts the time that the calling thread ran (use it with one thread) and not what passed, for a
machine that others use too.
"""

from __future__ import annotations

import argparse
import copy
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
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.norm import RepBN, UnifiedNorm, fold
from laconic.pipeline.measure import machine, versions
from laconic.tasks.small.networks import Block

LAYER_NORM, L2 = "LayerNorm", "L2"
PASSES = 60  # in training mode, for running statistics
Arm = Callable[[], Tensor]


def encoder(width: int, heads: int, layers: int) -> nn.Sequential:
    """Pre-norm blocks and a linear head, which reads the last norm; of random weights."""
    blocks = [Block(width, heads, causal=False) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, 10)).eval()


def with_norms(model: nn.Module, norm: Callable[[int], nn.Module]) -> nn.Module:
    """A copy of a model with other norms, of gains and shifts that are not trivial and the statistics of its own streams.

    With statistics of other streams nothing would be normalized: the streams of 12 blocks grow until softmaxes are hard, and
    a rounding error of folding turns into another answer.
    """
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for path, module in list(made.named_modules()):
        if isinstance(module, nn.LayerNorm):
            other = norm(module.normalized_shape[0])
            for tensor in other.parameters():
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
            made.set_submodule(path, other)
    width = next(module.in_features for module in made.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        for _ in range(PASSES if any(True for _ in made.buffers()) else 0):
            made.train()(torch.randn(2, 32, width, generator=generator))
    return made.eval()


def model_arms(width: int, heads: int, layers: int, tokens: int, batch: int) -> tuple[dict[str, Arm], dict[str, float]]:
    """Every model on the same tokens, and how far the folded ones are off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, x = encoder(width, heads, layers), torch.randn(batch, tokens, width)
    models = {
        LAYER_NORM: with_norms(base, nn.LayerNorm),
        "RMSNorm": with_norms(base, nn.RMSNorm),
        "RepBN": with_norms(base, RepBN),
        "UnifiedNorm": with_norms(base, UnifiedNorm),
        "no norms": with_norms(base, lambda width: nn.Identity()),
    }
    off = {}
    for name in ("RepBN", "UnifiedNorm"):
        folded = copy.deepcopy(models[name])
        left = fold(folded, ((x,), {})).left
        if left:
            raise SystemExit(f"{name}: {len(left)} norms were not folded: {next(iter(left.values()))}")
        with torch.inference_mode():
            want = models[name](x)
            off[f"{name}, folded"] = float((folded(x) - want).abs().max() / want.abs().max())
        models[f"{name}, folded"] = folded
    return {name: functools.partial(model, x) for name, model in models.items()}, off


def l2_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(mean square + eps), by elementary operations."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def l1_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / (mean magnitude + eps), by elementary operations."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.abs().mean(-1, keepdim=True) + eps)


def norm_arms(rows: int, width: int) -> dict[str, Arm]:
    """Both powers and torch's own on the same numbers."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return {
        L2: functools.partial(l2_norm, x),
        "L1": functools.partial(l1_norm, x),
        "torch LayerNorm": functools.partial(F.layer_norm, x, (width,)),
    }


def measure(arms: dict[str, Arm], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every round after two that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for number in range(-2, rounds):
            for name, run in arms.items():
                start = clock()
                run()
                if number >= 0:
                    times[name].append(clock() - start)
    return times


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of every arm, and the ratio of the baseline's time to its own with its quartiles."""
    found = {}
    for name, seconds in times.items():
        ratios = [base / own for base, own in zip(times[baseline], seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {"ms": 1e3 * statistics.median(seconds), "ratio": middle, "low": low, "high": high}
    return found


def shown(title: str, found: dict[str, dict[str, float]], baseline: str, off: dict[str, float]) -> str:
    """A table for people."""
    lines = [title, f"  {'':22} {'ms':>9}   {baseline} / arm (quartiles)"]
    for name, row in found.items():
        error = f"   off by {off[name]:.1e}" if name in off else ""
        lines.append(
            f"  {name:22} {row['ms']:9.3f}   {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}){error}"
        )
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="time that the calling thread ran")
    parser.add_argument("--out", type=Path, help="write the record, a JSON file, here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the record where that is asked."""
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    record: dict[str, Any] = {"models": {}, "norms": {}}
    for batch in options.batch:
        arms, off = model_arms(options.width, options.heads, options.layers, options.tokens, batch)
        times = measure(arms, options.rounds, clock)
        found = summary(times, LAYER_NORM)
        print(shown(f"batch {batch}, {options.tokens} tokens, {options.layers} blocks", found, LAYER_NORM, off))
        record["models"][str(batch)] = {"arms": found, "off": off, "seconds": times}
        rows = batch * options.tokens
        times = measure(norm_arms(rows, options.width), 5 * options.rounds, clock)
        found = summary(times, L2)
        print(shown(f"one norm of {rows} x {options.width}", found, L2, {}))
        record["norms"][f"{rows}x{options.width}"] = {"arms": found}
    record |= {
        "command": " ".join(sys.argv),
        "threads": torch.get_num_threads(),
        "clock": "thread" if options.cpu_time else "wall",
        "load": os.getloadavg(),
        "machine": machine(),
        "versions": versions(),
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
