"""The space of a search: named decisions with a few values each, and candidates as tuples of indices.

    space = Space({"depth": (2, 4, 8), "norm": ("batch", "layer")}, allowed=lambda values: values["depth"] < 8)
    space.values((1, 0))                                    # {"depth": 4, "norm": "batch"}

A candidate is plain, hashable and JSON; it means something through `values` alone. What is drawn is drawn from a
generator that the caller holds. A constraint is held by drawing again, so it should leave a fair part of the space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput

__all__ = ["Candidate", "Space"]

CARD = None

Candidate = tuple[int, ...]

# Draws that a constraint may refuse one after another. At one allowed candidate in a hundred, as many in a row are
# refused once in 20,000 times.
TRIES = 1000


class Space:
    """All combinations of some decisions that a constraint allows.

    Args:
        choices: name of a decision -> its values, in an order that means something where there is one.
        allowed: tells from the values, by name, whether a combination counts; all do by default.

    Raises:
        BadInput: there is no decision, or one has no values or the same value twice.
    """

    def __init__(
        self, choices: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool] | None = None
    ):
        if not choices:
            raise BadInput("a space to search needs at least one decision")
        for name, values in choices.items():
            if isinstance(values, str) or not len(values):
                raise BadInput(f"the decision {name!r} needs a sequence of values, not {values!r}")
            if any(value in values[:i] for i, value in enumerate(values)):
                raise BadInput(f"the decision {name!r} has a value twice: {values!r}")
        self.choices = {name: tuple(values) for name, values in choices.items()}
        self.allowed = allowed

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each decision has."""
        return tuple(len(values) for values in self.choices.values())

    def __len__(self) -> int:
        """Combinations, those that the constraint refuses too."""
        return math.prod(self.sizes)

    def __contains__(self, candidate: object) -> bool:
        return (
            isinstance(candidate, tuple)
            and len(candidate) == len(self.choices)
            and all(type(i) is int and 0 <= i < size for i, size in zip(candidate, self.sizes, strict=True))
            and self._counts(candidate)
        )

    def values(self, candidate: Candidate) -> dict[str, Any]:
        """What a candidate means: the value of each decision, by name."""
        return {name: values[i] for (name, values), i in zip(self.choices.items(), candidate, strict=True)}

    def candidate(self, **values: Any) -> Candidate:
        """The candidate with these values.

        Raises:
            BadInput: a decision is missing or unknown, a value is not among its own, or the constraint refuses it.
        """
        if set(values) != set(self.choices):
            raise BadInput(f"the decisions are {', '.join(self.choices)}, not {', '.join(values) or 'none'}")
        for name, value in values.items():
            if value not in self.choices[name]:
                raise BadInput(f"{name} is one of {self.choices[name]}, not {value!r}")
        found = tuple(options.index(values[name]) for name, options in self.choices.items())
        if found not in self:
            raise BadInput(f"the space does not allow {values}")
        return found

    def sample(self, generator: torch.Generator) -> Candidate:
        """A candidate, uniform among those allowed.

        Raises:
            BadInput: the constraint refuses nearly all.
        """
        return self._drawn(lambda: tuple(_below(size, generator) for size in self.sizes))

    def mutate(self, candidate: Candidate, generator: torch.Generator) -> Candidate:
        """The candidate with one decision changed: which one and to what is uniform.

        Raises:
            BadInput: there is nothing to change, or the constraint refuses nearly all.
        """
        free = [place for place, size in enumerate(self.sizes) if size > 1]
        if not free:
            raise BadInput("every decision of the space has one value: there is nothing to search")

        def changed() -> Candidate:
            place = free[_below(len(free), generator)]
            other = _below(self.sizes[place] - 1, generator)
            return _with(candidate, place, other + (other >= candidate[place]))

        return self._drawn(changed)

    def crossover(self, first: Candidate, second: Candidate, generator: torch.Generator) -> Candidate:
        """Each decision from one of two candidates, either with the same chance.

        Raises:
            BadInput: the constraint refuses nearly all.
        """
        pairs = list(zip(first, second, strict=True))
        return self._drawn(lambda: tuple(pair[_below(2, generator)] for pair in pairs))

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """All candidates that differ in one decision."""
        for place, size in enumerate(self.sizes):
            for other in range(size):
                changed = _with(candidate, place, other)
                if other != candidate[place] and self._counts(changed):
                    yield changed

    def onehot(self, candidate: Candidate) -> Tensor:
        """The decisions one after another, each as zeros with a one: (sum of sizes,)."""
        parts = zip(candidate, self.sizes, strict=True)
        return torch.cat([torch.nn.functional.one_hot(torch.tensor(i), size) for i, size in parts]).float()

    def __repr__(self) -> str:
        """The decisions and how many combinations they have."""
        inner = ", ".join(f"{name}: {len(values)}" for name, values in self.choices.items())
        return f"Space({inner}; {len(self):,} combinations{', constrained' if self.allowed else ''})"

    def _counts(self, candidate: Candidate) -> bool:
        return self.allowed is None or bool(self.allowed(self.values(candidate)))

    def _drawn(self, draw: Callable[[], Candidate]) -> Candidate:
        for _ in range(TRIES):
            found = draw()
            if self._counts(found):
                return found
        raise BadInput(f"the constraint of the space refused {TRIES} draws in a row: build it into the choices instead")


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _with(candidate: Candidate, place: int, value: int) -> Candidate:
    return (*candidate[:place], value, *candidate[place + 1 :])
