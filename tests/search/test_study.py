"""`study`: every evaluation is written, and a search that was stopped goes on from what was written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from laconic.errors import BadInput
from laconic.search import AgingEvolution, Space, study

SPACE = Space({name: range(5) for name in "abc"})


def fresh(seed: int = 0, batch: int = 1) -> AgingEvolution:
    return AgingEvolution(SPACE, seed, population=6, tournament=3, batch=batch)


def peak(candidate) -> float:
    return -float(sum((i - 3) ** 2 for i in candidate))


def test_it_stops_at_the_number_of_evaluations_whatever_the_batch() -> None:
    for batch in (1, 4, 7):
        assert len(study(fresh(batch=batch), peak, 20)) == 20


def test_it_stops_when_the_strategy_is_done() -> None:
    class Three:
        left = [[(0,)], [(1,), (2,)]]

        def ask(self):
            return self.left.pop(0) if self.left else []

        def tell(self, candidate, result):
            pass

        def best(self):
            return None

    assert [trial.candidate for trial in study(Three(), lambda c: c[0], 10)] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_stopped_search_goes_on_from_its_log(tmp_path: Path, batch: int) -> None:
    log, calls = tmp_path / "log.jsonl", []

    def counted(candidate):
        calls.append(candidate)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return math.nan if candidate[0] == 1 else peak(candidate)

    with pytest.raises(KeyboardInterrupt):
        study(fresh(batch=batch), counted, 30, log=log)
    with log.open("a") as file:
        file.write('{"candidate": [1, ')  # cut off in writing
    trials = study(fresh(batch=batch), counted, 30, log=log)
    assert len(calls) == 31  # the one that was stopped is done again
    whole = study(fresh(batch=batch), lambda c: math.nan if c[0] == 1 else peak(c), 30)
    assert [(t.candidate, repr(t.result)) for t in trials] == [(t.candidate, repr(t.result)) for t in whole]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [tuple(line["candidate"]) for line in lines] == [t.candidate for t in trials]
    assert any(line["result"] is None for line in lines) and all(t.seconds >= 0 for t in trials)


def test_a_log_of_another_search_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    study(fresh(0), peak, 5, log=log)
    with pytest.raises(BadInput, match=r"log.jsonl:1 is of another search: it evaluated \[.*same space"):
        study(fresh(1), peak, 5, log=log)
    log.write_text('{"candidate": [0]}\n')
    with pytest.raises(BadInput, match="log.jsonl:1 is no line of a search's log"):
        study(fresh(0), peak, 5, log=log)
