"""Timing of several callables in turns, so that drift of the machine hits all alike; used by the scripts beside it."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from laconic.kernels import native
from laconic.pipeline.measure import machine, versions

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(
    runs: Mapping[str, Callable[[], Any]], against: str, rounds: int, clock: str = "wall", at_least: float = 2e-3
) -> dict[str, Any]:
    """Median microseconds of each, and how many times faster each is than `against`.

    A ratio is taken in every round; its median is given with the second smallest to second largest part of the rounds
    that holds it with 95 % (order statistics, no shape of the noise assumed).

    Args:
        runs: name -> what to time.
        against: the name that the others are compared with.
        rounds: after one that is not counted.
        clock: "wall", or "cpu": time that this process has worked, which is less disturbed by others on a busy machine,
            and means something with one thread only.
        at_least: seconds that one measurement takes; short calls are repeated.
    """
    now, repeats = CLOCKS[clock], {}
    for name, run in runs.items():
        run()
        start = now()
        run()
        repeats[name] = max(1, math.ceil(at_least / (now() - start + 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = now()
            for _ in range(repeats[name]):
                run()
            times[name].append((now() - start) / repeats[name])
    found: dict[str, Any] = {}
    for name in runs:
        found[name] = {"microseconds": 1e6 * statistics.median(times[name])}
        if name != against:
            ratios = sorted(b / a for a, b in zip(times[name], times[against], strict=True))
            margin = _rank(rounds)
            found[name]["faster"] = statistics.median(ratios)
            found[name]["faster_low"], found[name]["faster_high"] = ratios[margin], ratios[-1 - margin]
    return found


def _rank(rounds: int) -> int:
    """How many of the sorted ratios may go at each end so that the rest holds the median with 95 %."""
    outside, rank = 0.0, 0
    while True:
        outside += math.comb(rounds, rank) / 2**rounds
        if 2 * outside > 0.05 or 2 * rank >= rounds - 2:
            return max(0, rank - 1)
        rank += 1


def setting() -> dict[str, Any]:
    """What a record says of where it was made."""
    return {
        "machine": machine(),
        "versions": versions(),
        "kernels": {key: value for key, value in native.status().items() if key != "path"},
        "threads": torch.get_num_threads(),
        "load_at_start": list(os.getloadavg()),
    }
