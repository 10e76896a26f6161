"""The contract of a Search: a strategy that asks for candidates of a space and is told what an estimator says of them.

    Example(lambda space, seed: AgingEvolution(space, seed=seed), kind="Search", inputs=[space, estimator],
            stated={"optimum": (1, 1, 0), "evaluations": 200})

A space has `sample(generator)` and `candidate in space`; a candidate is plain and hashable (a tuple). An estimator is a
function of a candidate. A strategy has `ask() -> list` of candidates (empty when it is done), `tell(candidate, result)`,
`best()`, `state_dict()` and `load_state_dict(state)`. `make` gets the space and the seed.
`stated["optimum"]`: the best candidate of the toy space. `stated["evaluations"]`: enough to find it (200).
"""

from __future__ import annotations

import json
from typing import Any

from laconic.errors import BadInput

from ..contract import require
from ..example import Example
from ..tensors import deep, plain


def check_search_space_samples_inside(example: Example) -> None:
    """The space samples candidates of its own, which are plain and hashable, the same for the same seed."""
    space = _space(example)[0]
    generator, again = example.generator(), example.generator()
    for _ in range(20):
        candidate = space.sample(generator)
        require(candidate in space, f"the space sampled {candidate!r}, which is not in it")
        require(space.sample(again) == candidate, "the same seed samples other candidates")
        hash(candidate)
        json.dumps(candidate)


def check_search_repeats_from_seed(example: Example) -> None:
    """The same seed asks for the same candidates in the same order."""
    first, second = _run(example, 0)[1], _run(example, 0)[1]
    require(first == second, "the same seed asks for other candidates")


def check_search_resumes(example: Example) -> None:
    """Stopped half way and resumed from its state, it goes on as if nothing had happened."""
    whole = _run(example, 0)[1]
    strategy, asked = _run(example, 0, stop=len(whole) // 2)
    state = deep(strategy.state_dict())
    require(plain(state), "the state holds what cannot be written without pickle")
    space, _ = _space(example)
    resumed = example.build(space, example.seed)
    resumed.load_state_dict(state)
    rest = _go(example, resumed, _evaluations(example) - len(asked))
    require(asked + rest == whole, "a resumed search asks for other candidates")


def check_search_stays_inside(example: Example) -> None:
    """Every candidate it asks for, and its best, are in the space."""
    for seed in range(3):
        space, _ = _space(example)
        strategy, asked = _run(example, seed)
        for candidate in [*asked, strategy.best()]:
            require(candidate in space, f"it asked for {candidate!r}, which is not in the space")


def check_search_finds_optimum(example: Example) -> None:
    """It finds the optimum of the toy space within the stated number of evaluations."""
    if "optimum" not in example.stated:
        raise BadInput(f"the example {example.name} does not state the optimum: give stated={{'optimum': ...}}")
    for seed in range(3):
        strategy, asked = _run(example, seed)
        best = strategy.best()
        found = f"after {len(asked)} evaluations it found {best!r}, not {example.stated['optimum']!r}"
        require(best == example.stated["optimum"], found)
        require(best in asked, "its best was never evaluated")


def check_search_keeps_budget(example: Example) -> None:
    """It asks for something until it is done: the list is empty only at the end, and stays empty."""
    strategy, asked = _run(example, 0)
    require(asked, "it asks for nothing")
    if len(asked) < _evaluations(example):
        require(strategy.ask() == [], "it said that it was done, and asks again")


def _space(example: Example) -> tuple[Any, Any]:
    space, estimator = example.arguments()
    return space, estimator


def _evaluations(example: Example) -> int:
    return int(example.stated.get("evaluations", 200))


def _run(example: Example, seed: int, stop: int | None = None) -> tuple[Any, list[Any]]:
    space, _ = _space(example)
    strategy = example.build(space, example.seed + seed)
    return strategy, _go(example, strategy, _evaluations(example) if stop is None else stop, whole=stop is None)


def _go(example: Example, strategy: Any, count: int, *, whole: bool = True) -> list[Any]:
    """Ask and tell until `count` candidates have been evaluated; unless `whole`, stop only between two asks."""
    _, estimator = _space(example)
    asked: list[Any] = []
    while len(asked) < count:
        batch = strategy.ask()
        if not batch:
            break
        for candidate in batch[: count - len(asked)] if whole else batch:
            asked.append(candidate)
            strategy.tell(candidate, estimator(candidate))
    return asked
