"""Run the arms and seeds of an experiment in a process of its own, within a bound of wall time.

The process is what makes the bound certain: a training that never ends, or a kernel that holds Python's lock,
is killed with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from laconic.errors import BadInput, LaconicError

__all__ = ["OutOfTime", "RunResult", "execute"]

Told = Callable[["RunResult"], None]


class OutOfTime(LaconicError):
    """A claim did not end within its minutes."""


@dataclass(frozen=True)
class RunResult:
    """One arm, trained with one seed.

    Attributes:
        arm: its name.
        seed: of it.
        value: the metric.
        seconds: wall time.
        cpu_seconds: processor time, all threads together.
    """

    arm: str
    seed: int
    value: float
    seconds: float
    cpu_seconds: float

    def as_dict(self) -> dict:
        """As records keep it."""
        return asdict(self)


def execute(
    experiment: Path,
    runs: Sequence[tuple[str, int]],
    *,
    seconds: float,
    quick: bool = False,
    threads: int | None = None,
    told: Told | None = None,
) -> list[RunResult]:
    """Do the runs in order and return their results.

    Args:
        experiment: a file with `run(arm, seed, quick=False) -> float`.
        runs: (arm, seed) of each.
        seconds: of wall time for all of them.
        quick: passed on.
        threads: of torch; its own choice by default.
        told: is called with each result when it is there.

    Raises:
        OutOfTime: the time is over; the message says what is missing.
        BadInput: the experiment cannot be run with what there is (its data is not fetched, ...), or a value is
            not finite.
        LaconicError: a run failed.
    """
    job = {"experiment": str(experiment.resolve()), "runs": list(runs), "quick": quick, "threads": threads}
    process = subprocess.Popen(
        [sys.executable, "-m", "laconic.claims.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what the experiment starts is killed with it
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    lines: queue.Queue[str | None] = queue.Queue()
    noise: list[str] = []
    readers = [
        threading.Thread(target=_collect, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=_keep_last, args=(process.stderr, noise), daemon=True),
    ]
    for reader in readers:
        reader.start()
    results: list[RunResult] = []
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended already; that is told below
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        deadline = time.monotonic() + seconds
        while len(results) < len(runs):
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise OutOfTime(_missing(experiment, runs, len(results), seconds)) from None
            results.append(_result(line, experiment, runs[len(results)], noise))
            if told is not None:
                told(results[-1])
    finally:
        _end(process)
        for reader in readers:
            reader.join(timeout=5)
    return results


def _result(line: str | None, experiment: Path, expected: tuple[str, int], noise: list[str]) -> RunResult:
    arm, seed = expected
    if line is None:
        last = f": {noise[-1].strip()}" if noise else ""
        raise LaconicError(f"the process of {experiment} ended in the run of {arm}, seed {seed}{last}")
    found = json.loads(line)
    if "error" in found:
        where = "" if found["arm"] is None else f" in the run of {arm}, seed {seed}"
        if found["bad_input"]:
            raise BadInput(found["error"])
        raise LaconicError(f"{experiment} failed{where}: {found['error']}\n{found['traceback'].rstrip()}")
    if found["value"] - found["value"] != 0:  # neither infinite nor a number that is none
        raise BadInput(
            f"{experiment} gave {found['value']} for {arm}, seed {seed}: the metric of a claim has to be finite, "
            "also for a training that diverged"
        )
    return RunResult(**found)


def _missing(experiment: Path, runs: Sequence[tuple[str, int]], done: int, seconds: float) -> str:
    left = ", ".join(f"{arm} seed {seed}" for arm, seed in runs[done : done + 4])
    more = f" and {len(runs) - done - 4} more" if len(runs) - done > 4 else ""
    return (
        f"{experiment} was stopped at its bound of {seconds / 60:.3g} minutes with {done} of {len(runs)} runs done; "
        f"missing are {left}{more}: no verdict is given"
    )


def _collect(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _keep_last(stream: IO[str], noise: list[str]) -> None:
    for line in stream:
        if line.strip():
            noise[:] = [*noise[-19:], line]


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its children; it has nothing to lose."""
    with contextlib.suppress(ProcessLookupError):  # it and its children have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
