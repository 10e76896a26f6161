"""`aging_evolution`: tournaments choose who is varied, and the oldest dies, however good it is.

A population of P candidates, at first drawn at random. Then, again and again:

    parent = argmax f over S members drawn with replacement        f the estimator, evaluated once per member
    child  = parent with one decision changed at random
    the child joins the population, its oldest member leaves

Nothing lives by one lucky evaluation: a good candidate stays in the game only through children that turn out well too,
which matters where the estimator is noisy, as training a network is.

Source: "Regularized Evolution for Image Classifier Architecture Search", Real, Aggarwal, Huang, Le, 2018, arXiv
1802.01548, algorithm 1. Official code: github.com/google-research/google-research, folder `evolution` (Apache-2.0;
not used). We differ from it in that a child always differs from its parent (the paper leaves one in twenty as it is), and
in that a candidate whose result is not finite never joins the population.

Several candidates may be asked for at once (`batch`), for as many workers. Where decisions add up independently of one
another, an integer program finds the optimum in milliseconds: `laconic.core.allocate`. Always look at random search
with as many evaluations, too.

Example:
    >>> from laconic.search import AgingEvolution, Space, study
    >>> space = Space({name: range(4) for name in "abcde"})
    >>> strategy = AgingEvolution(space, seed=0, population=20, tournament=5)
    >>> trials = study(strategy, lambda candidate: -sum((i - 2) ** 2 for i in candidate), 300)
    >>> strategy.best()
    (2, 2, 2, 2, 2)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from laconic.core.card import Card
from laconic.errors import BadInput


class Mutable(Protocol):
    """The space, as far as it is needed; `laconic.search.Space` is one."""

    def sample(self, generator: torch.Generator) -> Any:
        """A candidate."""
        ...

    def mutate(self, candidate: Any, generator: torch.Generator) -> Any:
        """One close to another."""
        ...


def tournament_winner(members: Sequence[tuple[Any, float]], size: int, generator: torch.Generator) -> Any:
    """The best of `size` members (candidate, result), drawn with replacement; the first drawn wins a tie."""
    drawn = torch.randint(len(members), (size,), generator=generator).tolist()
    return max((members[i] for i in drawn), key=lambda member: member[1])[0]


class AgingEvolution:
    """The strategy: ask for candidates, evaluate them, tell the results.

    Args:
        space: to search.
        seed: of all that is drawn.
        population: P.
        tournament: S; 1 is a random walk, many are greedy.
        batch: how many candidates to ask for at once.

    Raises:
        BadInput: one of the numbers is below one.
    """

    def __init__(self, space: Mutable, seed: int = 0, *, population: int = 100, tournament: int = 25, batch: int = 1):
        for name, value in {"population": population, "tournament": tournament, "batch": batch}.items():
            if value < 1:
                raise BadInput(f"the {name} of an aging evolution is at least 1, not {value}")
        self.space, self.population, self.tournament, self.batch = space, population, tournament, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._alive: deque[tuple[Any, float]] = deque()  # the oldest first
        self._pending: list[Any] = []
        self._best: Any = None
        self._result = -math.inf

    def ask(self) -> list[Any]:
        """Candidates to evaluate next: random ones until the population is full, then children."""
        return [self._next() for _ in range(self.batch)]

    def tell(self, candidate: Any, result: float) -> None:
        """What the estimator gave for a candidate; higher is better, and what is not finite is rejected.

        A candidate that was not asked for joins as well: so one begins with designs that are known to be good.
        """
        if candidate in self._pending:
            self._pending.remove(candidate)
        if not math.isfinite(result):
            return
        if self._best is None or result > self._result:
            self._best, self._result = candidate, result
        self._alive.append((candidate, result))
        if len(self._alive) > self.population:
            self._alive.popleft()

    def best(self) -> Any:
        """The best candidate that was evaluated, dead or alive; None before the first."""
        return self._best

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "generator": self._generator.get_state(),
            "alive": [list(member) for member in self._alive],
            "pending": list(self._pending),
            "best": self._best,
            "result": self._result,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; candidates that were pending then are still waited for."""
        self._generator.set_state(state["generator"])
        self._alive = deque((candidate, result) for candidate, result in state["alive"])
        self._pending = list(state["pending"])
        self._best, self._result = state["best"], state["result"]

    def _next(self) -> Any:
        filling = len(self._alive) + len(self._pending) < self.population
        if filling or not self._alive:
            found = self.space.sample(self._generator)
        else:
            parent = tournament_winner(self._alive, self.tournament, self._generator)
            found = self.space.mutate(parent, self._generator)
        self._pending.append(found)
        return found


CARD = Card(
    id="aging_evolution",
    title="Regularized Evolution for Image Classifier Architecture Search",
    authors="Real, Aggarwal, Huang, Le",
    year=2018,
    source="arXiv 1802.01548, algorithm 1",
    family="search",
    summary="Searches a space of decisions by evolution: winners of tournaments are varied, the oldest candidate dies.",
    objects={"AgingEvolution": "Search"},
    use="Some hundred evaluations of a noisy estimator over decisions that depend on one another.",
    avoid="Decisions whose gains add up: an integer program finds the optimum; a handful of evaluations: draw at random.",
    code="github.com/google-research/google-research, evolution, Apache-2.0 (not used)",
    claim={
        "text": "With equally many evaluations, aging evolution finds better cells than random search.",
        "metric": "test accuracy",
        "direction": "higher",
        "margin": 0.001,
        "arms": ("random", "aging"),
        "seeds": 50,
        "minutes": 6,
        "task": "nas-bench-201",
    },
)
