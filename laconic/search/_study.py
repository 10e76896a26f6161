"""The loop of a search: a strategy asks, an estimator answers, and every answer is written down.

    trials = study(AgingEvolution(space, seed=0), estimate, 300, log="search.jsonl")

The log has one line of JSON per evaluation. A search that was stopped goes on from it: what is written there is told
again instead of being evaluated, so nothing about the strategy has to be saved.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from laconic.errors import BadInput

__all__ = ["Strategy", "Trial", "study"]

CARD = None


class Strategy(Protocol):
    """What every strategy offers."""

    def ask(self) -> list[Any]:
        """Candidates to evaluate next, which may be done at the same time; none when it is done."""
        ...

    def tell(self, candidate: Any, result: float) -> None:
        """What the estimator gave; higher is better, and what is not finite is a failure."""
        ...

    def best(self) -> Any:
        """The best candidate that was evaluated, None before the first."""
        ...


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        candidate: what was evaluated.
        result: of it, NaN if it failed.
        seconds: that the estimator took.
    """

    candidate: Any
    result: float
    seconds: float

    def as_json(self) -> str:
        """As a line of the log; JSON has no NaN, so a failure is null."""
        result = self.result if math.isfinite(self.result) else None
        return json.dumps({"candidate": self.candidate, "result": result, "seconds": round(self.seconds, 6)})


def study(
    strategy: Strategy,
    estimator: Callable[[Any], float],
    evaluations: int,
    *,
    log: str | os.PathLike[str] | None = None,
) -> list[Trial]:
    """Evaluate what a strategy asks for, until it is done or so many evaluations are over.

    Args:
        strategy: a fresh one; for a log to go on from it has to be made as it was at first, with the same seed.
        estimator: the quality of a candidate, higher is better; not finite means that it failed.
        evaluations: at most.
        log: file to which each evaluation is added, and from which an earlier run is taken up.

    Returns:
        All evaluations in order, those from the log too.

    Raises:
        BadInput: the log is of another search, or cannot be read.
    """
    known = _read(Path(log)) if log is not None else []
    trials: list[Trial] = []
    while len(trials) < evaluations:
        batch = strategy.ask()
        if not batch:
            break
        for candidate in batch[: evaluations - len(trials)]:
            trial = _again(known, len(trials), candidate, log) or _evaluated(estimator, candidate)
            strategy.tell(candidate, trial.result)
            trials.append(trial)
            if log is not None and len(trials) > len(known):
                with Path(log).open("a", encoding="utf-8") as file:
                    file.write(trial.as_json() + "\n")
    return trials


def _evaluated(estimator: Callable[[Any], float], candidate: Any) -> Trial:
    begun = time.perf_counter()
    result = float(estimator(candidate))
    return Trial(candidate, result if math.isfinite(result) else math.nan, time.perf_counter() - begun)


def _again(known: list[Trial], number: int, candidate: Any, log: Any) -> Trial | None:
    """The trial of that number in the log, if it goes so far."""
    if number >= len(known):
        return None
    written = known[number]
    if json.dumps(written.candidate) != json.dumps(candidate):
        raise BadInput(
            f"{log}:{number + 1} is of another search: it evaluated {written.candidate}, this one asks for "
            f"{list(candidate) if isinstance(candidate, tuple) else candidate}; use the same space, strategy and seed, "
            "or another file"
        )
    return Trial(candidate, written.result, written.seconds)


def _read(path: Path) -> list[Trial]:
    """The trials of a log; a last line that was cut off in writing is taken away from the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            result = math.nan if entry["result"] is None else float(entry["result"])
            found.append(Trial(entry["candidate"], result, float(entry["seconds"])))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}:{number} is no line of a search's log ({error}): use another file") from None
    return found
