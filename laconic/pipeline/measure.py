"""What is measured of the machine and of running models: memory, latency, versions."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

UNSTEADY = 1.5  # quartiles of the same run further apart than this: something else was running


def peak_rss() -> int:
    """Peak resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tight_heap() -> None:
    """Let the C library give large buffers back as soon as they are freed.

    glibc by default keeps freed blocks of up to 32 MiB, and after some hundred layers of different shapes the gaps between
    them are a good part of a bound. Other C libraries are left as they are.
    """
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option in (threshold, trim):
        mallopt(option, 8 << 20)  # smaller ones are made and dropped by the thousand: keeping those is faster


class Times(dict[str, float]):
    """Median milliseconds by name.

    Attributes:
        spread: the upper quartile over the lower one, of the run that varied most.
    """

    spread: float = 1.0


def latency_ms(
    runs: Mapping[str, Callable[[], Any]], rounds: int = 7, seconds: float = 20.0, at_least: float = 1.0
) -> Times:
    """Median milliseconds of each callable; they alternate, so drift of the machine hits all alike.

    Args:
        runs: name -> what to time.
        rounds: of each, after one that is not counted.
        seconds: stop early (after two rounds at least) when this much time is gone.
        at_least: go on (for eight times `rounds` at most) until this many seconds are gone: short runs need more rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(8 * rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # else only the launch would be timed
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
        gone = time.perf_counter() - begin
        if (number >= 2 and gone > seconds) or (number >= rounds and gone > at_least):
            break
    medians = Times({name: statistics.median(found) for name, found in times.items()})
    quartiles = [statistics.quantiles(found, n=4, method="inclusive") for found in times.values()]
    medians.spread = max((high / low for low, _, high in quartiles if low > 0), default=1.0)
    return medians


def run_batch(task: Any, model: nn.Module, batch: Any) -> Tensor:
    """One forward without gradients."""
    with torch.inference_mode():
        return task.forward(model, batch)


def machine() -> dict[str, Any]:
    """The machine that figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    from laconic import __version__

    found = {"laconic": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "safetensors", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
