"""What searches over formats of layers need to know of a space; `laconic.search.Space` is one."""

from __future__ import annotations

from typing import Protocol

CARD = None  # methods share this; it is none itself


class HasSizes(Protocol):
    """A space of decisions, each with some values; a candidate is a tuple with the number of a value for each."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each decision has."""
        ...
