"""The record of a claim: what was run, on what, what came out; and the journal that an interrupted run leaves.

A record is `experiments/records/<id>.json`, with its plot beside it. A quick run, which proves that the
experiment works and nothing else, writes to `experiments/records/quick/` and so never over a full one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laconic.catalog.source import Method
from laconic.errors import BadInput

from .run import RunResult
from .verdict import LEVEL, Verdict

__all__ = ["Journal", "build", "experiment_path", "fingerprint", "outdated", "record_path", "write_whole"]

VERSION = 1


def experiment_path(method: Method, package: Path) -> Path:
    """The file of a method's claim.

    Raises:
        BadInput: there is none.
    """
    path = package.parent / "experiments" / method.card.family / f"{method.id}.py"
    if not path.is_file():
        raise BadInput(
            f"the claim of {method.id} has no experiment: {path} is missing (experiments are part of the source tree, "
            "not of an installed package)"
        )
    return path


def record_path(id: str, package: Path, quick: bool = False) -> Path:
    """Where the record of a claim stands; the plot has the same name with `.svg`."""
    folder = package.parent / "experiments" / "records"
    return (folder / "quick" if quick else folder) / f"{id}.json"


def fingerprint(method: Method, experiment: Path) -> dict[str, str]:
    """What a result depends on in the source tree, as SHA-256: the claim, the experiment, the method's file."""
    claim = json.dumps(method.card.claim, sort_keys=True)
    contents = {"claim": claim.encode(), "experiment": experiment.read_bytes(), "method": method.path.read_bytes()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def outdated(record: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Which of claim, experiment and method have changed since the record was made."""
    then = record.get("sources")
    if not isinstance(then, Mapping):
        return list(now)
    return [name for name, digest in now.items() if then.get(name) != digest]


def build(
    method: Method,
    verdict: Verdict,
    results: Sequence[RunResult],
    sources: Mapping[str, str],
    *,
    quick: bool,
    threads: int | None,
    minutes: float,
    command: str,
    package: Path,
) -> dict[str, Any]:
    """The record of a finished run, ready for JSON."""
    from laconic.pipeline.measure import machine, versions

    claim = method.card.claim
    assert claim is not None  # whoever has a verdict had a claim
    return {
        "version": VERSION,
        "id": method.id,
        "family": method.card.family,
        "quick": quick,
        "verdict": verdict.word,
        "sentence": verdict.sentence,
        "effect": verdict.effect,
        "interval": _finite([verdict.low, verdict.high]),
        "level": LEVEL,
        "smallest_effect": _finite(verdict.smallest),
        "seeds": verdict.n,
        "claim": dict(claim),
        "runs": [result.as_dict() for result in results],
        "seconds": sum(result.seconds for result in results),
        "cpu_seconds": sum(result.cpu_seconds for result in results),
        "minutes": minutes,
        "command": command,
        "threads": threads,
        "machine": machine(),
        "versions": versions(),
        "sources": dict(sources),
        **_commit(package),
    }


def _finite(value: Any) -> Any:
    """Infinity as null, which strict JSON has."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if abs(value) != float("inf") else None


def _commit(package: Path) -> dict[str, Any]:
    """The commit of the source tree, and whether files that matter differ from it; null outside of git."""
    git = ["git", "-C", str(package.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "laconic", "experiments"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"commit": None, "modified": None}
    if head.returncode:
        return {"commit": None, "modified": None}
    paths = [line[3:] for line in changed.stdout.splitlines() if not line[3:].startswith("experiments/records/")]
    return {"commit": head.stdout.strip(), "modified": bool(paths)}


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class Journal:
    """The runs that are done, one line each, so that a claim that was stopped can go on.

    Args:
        path: of the file; its first line says what the runs belong to.
        key: the fingerprint and options of the run.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self.path, self._key = path, json.dumps(key, sort_keys=True)

    def read(self) -> list[RunResult]:
        """The runs of an earlier attempt with the same key; none where anything differs."""
        if not self.path.is_file():
            return []
        first, *lines = self.path.read_text(encoding="utf-8").split("\n")
        if first != self._key:
            return []
        # What follows the last line break was cut off while it was written.
        return [RunResult(**json.loads(line)) for line in lines[:-1]]

    def start(self, results: Iterable[RunResult] = ()) -> None:
        """Begin the file anew with runs that are kept."""
        lines = [self._key, *(json.dumps(result.as_dict()) for result in results)]
        write_whole(self.path, "".join(f"{line}\n" for line in lines))

    def add(self, result: RunResult) -> None:
        """Note a run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.as_dict()) + "\n")

    def remove(self) -> None:
        """The record is written: the journal has served."""
        self.path.unlink(missing_ok=True)
