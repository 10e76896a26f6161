"""The methods that have landed, and what their tests offer to the contracts and the vectors."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from laconic.catalog.read import read
from laconic.core.card import Card
from laconic.testing import Example

ROOT = Path(__file__).parents[2]


@functools.cache
def cards() -> dict[str, Card]:
    """id -> card."""
    return {method.card.id: method.card for method in read()}


def module_of(card: Card) -> ModuleType:
    """The module `tests/<family>/test_<id>.py`."""
    path = ROOT / "tests" / card.family / f"test_{card.id}.py"
    assert path.is_file(), f"{card.id} has no {path.relative_to(ROOT)}: what has landed is tested"
    return importlib.import_module(f"tests.{card.family}.test_{card.id}")


def examples_of(card: Card) -> list[Example]:
    """`EXAMPLES` of a method's tests; what leaves its traits out takes those of the card."""
    found = getattr(module_of(card), "EXAMPLES", [])
    return [_with_traits(card, dataclasses.replace(example, name=example.title())) for example in found]


def runner_of(card: Card) -> Callable[[Any], Any]:
    """`run_vector` of a method's tests."""
    run = getattr(module_of(card), "run_vector", None)
    assert run is not None, (
        f"tests/{card.family}/test_{card.id}.py has no run_vector(case), and there are vectors for it"
    )
    return run


def _with_traits(card: Card, example: Example) -> Example:
    return example if example.traits else dataclasses.replace(example, traits=tuple(card.traits.get(example.name, ())))
