"""A run: works in their order, each with everyone who is here, in alternating rounds; and the record that comes out."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from laconic.errors import BadInput

from . import machine
from .contest import OURS, PEERS, Absent, Contestant, Ready, contestants
from .measure import ROUNDS, Ratio, Timed, alternate, ratio
from .problems import Problem, agreement
from .quiet import quietly
from .record import build
from .work import Aim, Work, find

__all__ = ["Progress", "run"]

Progress = Callable[[str, int, int], None]


def run(
    names: Sequence[str] = (),
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    threads: int | None = None,
    peers: Sequence[str] | None = None,
    works: Sequence[Work] | None = None,
    command: str = "",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure works, and return the record, ready for JSON.

    Args:
        names: of works or beginnings of names; all by default.
        rounds: alternating rounds of each work.
        seed: of the order in the rounds and of the bootstrap.
        threads: of torch and of every peer; as torch has them by default.
        peers: which peers take part; all that are installed by default.
        works: instead of `names`, works of one's own.
        command: what the record says it was called with.
        progress: is called with (what is done, how much of it, of how much).

    Raises:
        BadInput: a name or a peer is not known.
    """
    unknown = sorted(set(peers or ()) - set(PEERS))
    if unknown:
        raise BadInput(f"no peer is called {unknown[0]!r}: they are {', '.join(PEERS)}")
    chosen = find(names) if works is None else list(works)
    before, load = torch.get_num_threads(), _load()
    torch.set_num_threads(threads or before)
    try:
        probes = machine.probes()
        found = [_work(work, probes, rounds, seed, peers, progress) for work in chosen]
        return build(found, rounds=rounds, seed=seed, command=command, load=(load, _load()))
    finally:
        torch.set_num_threads(before)


def _load() -> float | None:
    """Processes that wanted the processor in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _work(
    work: Work, probes: Mapping[str, tuple[Timed, float]], rounds: int, seed: int, peers: Sequence[str] | None,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The part of the record about a work."""
    problem = work.problem()
    record: dict[str, Any] = {"name": work.name, "text": work.text, "baseline": work.baseline}
    try:
        problem.check()
    except Absent as why:
        return {**record, "absent": str(why), "contestants": [], "missing": [], "aims": []}
    with ExitStack() as stack:
        stack.callback(problem.release)
        entered, missing = _enter(problem, peers, stack, work.name, progress)
        timed = {name: one.timed for name, one in entered.items()}
        timed |= {_probe_name(name): probe for name, (probe, _) in probes.items()}
        stage = f"{work.name}: rounds"
        times = alternate(timed, rounds, seed, tick=lambda done: progress(stage, done, rounds))
        record |= _summary(work, problem, entered, times, probes, seed)
    record["missing"] = missing
    entered.clear()
    gc.collect()
    return record


@dataclass
class _Entered:
    """A contestant that takes part."""

    contestant: Contestant
    ready: Ready
    agreement: dict[str, float]

    @property
    def timed(self) -> Timed:
        return Timed(self.ready.call, self.ready.turns)


def _enter(
    problem: Problem, peers: Sequence[str] | None, stack: ExitStack, name: str, progress: Progress
) -> tuple[dict[str, _Entered], list[dict[str, str]]]:
    """Everyone who can be set up and answers, and the others with the reason."""
    entered, missing = {}, []
    everyone = contestants(problem, peers)
    for number, one in enumerate(everyone):
        progress(f"{name}: setting up", number, len(everyone))
        reason = one.why_not(problem)
        if reason is None:
            try:
                with quietly():
                    ready = one.prepare(problem)
                    stack.callback(ready.close)
                    said = ready.answer(ready.call()) if ready.answer is not None else None
                    found = agreement(said, problem.expected) if said is not None else {}
                entered[one.name] = _Entered(one, ready, found)
                gc.collect()  # what it took to set up a model may be larger than the model
                continue
            except Absent as why:
                reason = str(why)
            except Exception as error:  # a peer that breaks must not take the others with it; the record says it
                first = next(iter(str(error).strip().splitlines()), "")
                reason = f"failed with {type(error).__name__}: {first}"
        missing.append({"name": one.name, "peer": one.peer, "reason": reason})
    progress(f"{name}: setting up", len(everyone), len(everyone))
    return entered, missing


def _probe_name(name: str) -> str:
    return f"machine: {name}"


def _summary(
    work: Work, problem: Problem, entered: Mapping[str, _Entered], times: Mapping[str, list[float]],
    probes: Mapping[str, tuple[Timed, float]], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Medians, ratios and shares."""
    can = {name: (amount, times[_probe_name(name)]) for name, (_, amount) in probes.items()}
    rows = []
    for name, one in entered.items():
        own = times[name]
        row: dict[str, Any] = {"name": name, "peer": one.contestant.peer, "note": one.ready.note}
        row["seconds"] = median(own)
        if work.baseline in times:
            row["speedup"] = ratio(times[work.baseline], own, seed).as_list()
        if one.contestant.peer == OURS:
            rivals = {rival: times[rival] for rival in entered if rival != name}
            row["times_as_fast_as"] = {rival: ratio(theirs, own, seed).as_list() for rival, theirs in rivals.items()}
        if one.ready.stored is not None:
            nbytes = one.ready.stored + problem.traffic
            row |= {"stored": one.ready.stored, "bytes": nbytes, "bytes_per_second": nbytes / row["seconds"]}
            row["share_of_read"] = _share(nbytes, own, *can[machine.READ], seed).as_list()
        row["operations_per_second"] = problem.operations / row["seconds"]
        row["peak"] = one.ready.peak
        row["share_of_peak"] = _share(problem.operations, own, *can[one.ready.peak], seed).as_list()
        rows.append(row | one.agreement | {"rounds": own})
    rows.sort(key=lambda row: row["seconds"])
    measured = {name: {"per_second": amount / median(t), "rounds": t} for name, (amount, t) in can.items()}
    return {
        "operations": problem.operations,
        "traffic": problem.traffic,
        "contestants": rows,
        "machine": measured,
        "aims": [_judged(aim, _champion(work.aims, rows), rows) for aim in work.aims],
    }


def _share(amount: float, own: Sequence[float], can: float, times: Sequence[float], seed: int) -> Ratio:
    """amount / own over can / times: which part of what the machine can do a contestant did, by rounds in pairs."""
    found = ratio(times, own, seed)
    scale = amount / can
    return Ratio(found.value * scale, found.low * scale, found.high * scale)


def _champion(aims: Sequence[Aim], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest of ours, of those that are near enough to float where an aim says how near; rows are the fastest first."""
    least = max((aim.least for aim in aims if aim.what == "cosine"), default=-1.0)
    ours = [row for row in rows if row["peer"] == OURS]
    near = [row for row in ours if row.get("cosine", 1.0) >= least]
    return next(iter(near or ours), None)


def _judged(aim: Aim, ours: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An aim, and what ours reached; null where that cannot be said."""
    rivals = [row["name"] for row in rows if row["name"].startswith(aim.rivals)] if aim.rivals else []
    found = None
    if ours is not None and aim.what == "times" and rivals:
        found = ours["times_as_fast_as"][rivals[0]]
    elif ours is not None and aim.what == machine.READ:
        found = ours.get("share_of_read")
    elif ours is not None and aim.what == machine.INT8:
        found = ours["share_of_peak"] if ours["peak"] == machine.INT8 else None
    elif ours is not None and aim.what == "cosine":
        found = [ours["cosine"]] * 3
    met = None if found is None else found[0] >= aim.least
    by, against = ours["name"] if ours is not None else None, rivals[0] if rivals else None
    return {"aim": aim.text, "least": aim.least, "found": found, "met": met, "by": by, "against": against}
