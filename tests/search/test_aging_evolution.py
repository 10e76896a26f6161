"""`aging_evolution`: who is varied, who dies, and that it beats drawing at random where that can be beaten."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.errors import BadInput
from laconic.search import AgingEvolution, Space, study
from laconic.search._aging_evolution import tournament_winner
from laconic.testing import Example

SPACE = Space({name: range(4) for name in "abcde"})
OPTIMUM = (3, 1, 0, 2, 1)


def agreement(candidate) -> float:
    """How near the optimum it is; the first two decisions count only together."""
    away = [abs(a - b) for a, b in zip(candidate, OPTIMUM, strict=True)]
    return 2.0 * (away[:2] == [0, 0]) + away[2:].count(0) - 0.1 * sum(away)


EXAMPLES = [
    Example(
        lambda space, seed: AgingEvolution(space, seed, population=20, tournament=5),
        kind="Search",
        inputs=[SPACE, agreement],
        stated={"optimum": OPTIMUM, "evaluations": 300},
    ),
    Example(
        lambda space, seed: AgingEvolution(space, seed, population=20, tournament=5, batch=7),
        kind="Search",
        inputs=[SPACE, agreement],
        stated={"optimum": OPTIMUM, "evaluations": 300},
    ),
]


def test_the_oldest_dies_even_if_it_is_the_best() -> None:
    strategy = AgingEvolution(SPACE, population=3, tournament=3)
    for number, result in enumerate((9.0, 1.0, 2.0, 3.0)):
        strategy.tell((number, 0, 0, 0, 0), result)
    assert [candidate[0] for candidate, _ in strategy.state_dict()["alive"]] == [1, 2, 3]
    assert strategy.best() == (0, 0, 0, 0, 0)
    # The dead have no children: none differs from it in one place and from all others in two.
    children = [strategy.ask()[0] for _ in range(50)]
    alive = [(i, 0, 0, 0, 0) for i in (1, 2, 3)]
    assert all(any(sum(a != b for a, b in zip(c, parent, strict=True)) == 1 for parent in alive) for c in children)


def test_children_are_one_decision_from_the_winner_of_a_tournament() -> None:
    strategy = AgingEvolution(SPACE, population=4, tournament=500)  # as good as everyone
    for number in range(4):
        strategy.tell((number,) * 5, float(number == 2))
    for _ in range(50):
        assert sum(i != 2 for i in strategy.ask()[0]) == 1


def test_a_tournament_is_drawn_with_replacement() -> None:
    members = [("bad", 0.0), ("good", 1.0)]
    generator = torch.Generator().manual_seed(0)
    wins = sum(tournament_winner(members, 2, generator) == "good" for _ in range(2000))
    assert wins / 2000 == pytest.approx(3 / 4, abs=0.04)  # without replacement it would be 1


def test_the_first_population_is_random_and_complete_also_when_asked_in_batches() -> None:
    strategy = AgingEvolution(SPACE, population=8, tournament=2, batch=5)
    first = strategy.ask()
    assert len(first) == 5 and first != [first[0]] * 5
    strategy.tell(first[0], 1.0)
    second = strategy.ask()  # three founders more, then children of the only one that is known
    assert all(sum(a != b for a, b in zip(child, first[0], strict=True)) == 1 for child in second[3:])


def test_failures_are_rejected_and_replaced() -> None:
    strategy = AgingEvolution(SPACE, population=4, tournament=2)
    for result in (math.nan, math.inf, -math.inf, 0.5):
        (candidate,) = strategy.ask()
        strategy.tell(candidate, result)
    assert len(strategy.state_dict()["alive"]) == 1 and strategy.best() == candidate
    assert strategy.state_dict()["pending"] == []
    assert AgingEvolution(SPACE).best() is None


def test_it_beats_random_search_on_a_rugged_space() -> None:
    space = Space({str(i): range(5) for i in range(8)})
    target = tuple(i % 5 for i in range(8))

    def rugged(candidate) -> float:  # pairs of neighbours count together
        hits = [a == b for a, b in zip(candidate, target, strict=True)]
        return float(sum(hits) + 3 * sum(a and b for a, b in zip(hits, hits[1:], strict=False)))

    gains = []
    for seed in range(5):
        strategy = AgingEvolution(space, seed, population=20, tournament=5)
        evolved = max(trial.result for trial in study(strategy, rugged, 400))
        generator = torch.Generator().manual_seed(seed)
        gains.append(evolved - max(rugged(space.sample(generator)) for _ in range(400)))
    assert min(gains) > 0


def test_bad_input() -> None:
    for name in ("population", "tournament", "batch"):
        with pytest.raises(BadInput, match=f"the {name} of an aging evolution is at least 1, not 0"):
            AgingEvolution(SPACE, **{name: 0})
