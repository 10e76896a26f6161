"""From a method's id to the verdict on its claim: run what is missing, judge, record, draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from laconic.catalog.read import PACKAGE, read
from laconic.catalog.source import Method
from laconic.core.card import LEAST_SEEDS
from laconic.errors import BadInput

from .plot import draw
from .record import Journal, build, experiment_path, fingerprint, outdated, record_path, write_whole
from .run import OutOfTime, RunResult, execute
from .verdict import Verdict, judge

__all__ = ["QUICK_SEEDS", "Outcome", "claimed", "records", "reproduce"]

QUICK_SEEDS = 2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """A claim that was run.

    Attributes:
        verdict: on it.
        record: all that was measured.
        path: of the record; the plot stands beside it.
    """

    verdict: Verdict
    record: dict[str, Any]
    path: Path

    @property
    def plot(self) -> Path:
        """The file of the plot."""
        return self.path.with_suffix(".svg")


def reproduce(
    id: str,
    *,
    seeds: int | None = None,
    quick: bool = False,
    minutes: float | None = None,
    threads: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    package: Path | None = None,
) -> Outcome:
    """Run the claim of a method and write its record and plot.

    Args:
        id: of the method.
        seeds: how many pairs, from seed 0 up; as many as the card says by default.
        quick: two seeds of a tiny run, recorded apart: shows that the experiment works, gives no verdict.
        minutes: bound of wall time; the card's by default.
        threads: of torch; its own choice by default.
        resume: keep the runs of an attempt that was stopped, if nothing they depend on has changed.
        progress: is called with (what is running, runs done, runs in all).
        package: the folder of the package whose claims are meant; laconic's own by default.

    Raises:
        BadInput: there is no such method, claim or experiment, too few seeds, or data is not fetched.
        OutOfTime: it did not end in time; runs that are done are kept for `resume`.
        LaconicError: a run failed.
    """
    package = package or PACKAGE
    method = read(package).get(id)
    claim = method.card.claim
    if claim is None:
        raise BadInput(f"{id} makes no claim: its card has none to run")
    experiment = experiment_path(method, package)
    count = _count(claim, seeds, quick)
    bound = claim["minutes"] if minutes is None else minutes
    if not bound > 0:
        raise BadInput(f"the minutes of a claim are a positive number, not {bound}")
    runs = [(arm, seed) for seed in range(count) for arm in claim["arms"]]
    sources = fingerprint(method, experiment)
    path = record_path(id, package, quick)
    journal = Journal(path.with_suffix(".journal"), {"sources": sources, "quick": quick, "threads": threads})
    done = [result for result in journal.read() if (result.arm, result.seed) in runs] if resume else []
    journal.start(done)
    results = _run(experiment, runs, done, journal, bound, quick, threads, partial(progress or _silent, id))
    values = {(result.arm, result.seed): result.value for result in results}
    baseline, arm = ([values[name, seed] for seed in range(count)] for name in claim["arms"])
    verdict = judge(baseline, arm, direction=claim["direction"], margin=claim["margin"])
    command = _command(id, seeds, quick, minutes, threads)
    options: dict[str, Any] = {"quick": quick, "threads": threads, "minutes": bound, "package": package}
    record = build(method, verdict, results, sources, command=command, **options)
    write_whole(path.with_suffix(".svg"), draw(record))
    write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    journal.remove()
    return Outcome(verdict, record, path)


def _count(claim: Mapping[str, Any], seeds: int | None, quick: bool) -> int:
    if quick:
        if seeds is not None:
            raise BadInput(f"a quick run has {QUICK_SEEDS} seeds: leave out either --quick or --seeds")
        return QUICK_SEEDS
    if seeds is None:
        return int(claim["seeds"])
    if seeds < LEAST_SEEDS:
        raise BadInput(
            f"a verdict needs at least {LEAST_SEEDS} seeds, not {seeds}; --quick runs {QUICK_SEEDS} without one"
        )
    return seeds


def _run(
    experiment: Path,
    runs: list[tuple[str, int]],
    done: list[RunResult],
    journal: Journal,
    minutes: float,
    quick: bool,
    threads: int | None,
    progress: Callable[[int, int], None],
) -> list[RunResult]:
    """What is done and what is left, in the order of `runs`; time that earlier attempts took counts."""
    finished = {(result.arm, result.seed): result for result in done}
    left = [run for run in runs if run not in finished]
    spent = sum(result.seconds for result in done)

    def told(result: RunResult) -> None:
        journal.add(result)
        finished[result.arm, result.seed] = result
        progress(len(finished), len(runs))

    progress(len(finished), len(runs))
    if left:
        try:
            if spent >= 60 * minutes:
                raise OutOfTime(f"earlier attempts have used the {minutes:.3g} minutes that the claim has")
            execute(experiment, left, seconds=60 * minutes - spent, quick=quick, threads=threads, told=told)
        except OutOfTime as error:
            raise OutOfTime(f"{error}; run again with --resume and more --minutes to go on") from None
    return [finished[run] for run in runs]


def _silent(*_: Any) -> None:
    """Progress that nobody looks at."""


def _command(id: str, seeds: int | None, quick: bool, minutes: float | None, threads: int | None) -> str:
    """The command line that does the same."""
    options = {"--seeds": seeds, "--minutes": minutes, "--threads": threads}
    parts = [f"{name} {value:g}" for name, value in options.items() if value is not None]
    return " ".join(["laconic", "reproduce", id, *(["--quick"] if quick else []), *parts])


def claimed(family: str | None = None, package: Path | None = None) -> list[Method]:
    """The landed methods with a claim, of one family or all."""
    return [method for method in read(package or PACKAGE).select(family=family) if method.card.claim is not None]


def records(
    family: str | None = None, package: Path | None = None
) -> list[tuple[Method, dict[str, Any] | None, list[str]]]:
    """Each claim with its record and what has changed since.

    Returns:
        (method, record or None where it was not run, which of claim, experiment and method are newer).

    Raises:
        BadInput: a record is not JSON.
    """
    from laconic.catalog.records import read_record

    package = package or PACKAGE
    found = []
    for method in claimed(family, package):
        record = read_record(package, method.id)
        changed = []
        if record is not None:
            changed = outdated(record, fingerprint(method, experiment_path(method, package)))
        found.append((method, record, changed))
    return found
