"""`Example`: one object made ready for its kind's contract, with the inputs and the promises that the checks need.

    EXAMPLES = [
        Example(
            lambda: RMSNorm(16),
            kind="Layer",
            traits=("gradient:exact", "batch_independent_eval"),
            inputs=[(3, 5, 16)],
            wrong=[(3, 5, 15)],
        )
    ]

What `make` is called with, what `inputs` are, and which promises a kind needs stands in the docstring of its module
in `laconic.testing.checks`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput

from .traits import known_traits

__all__ = ["Example", "Ints"]


@dataclass(frozen=True)
class Ints:
    """An input of whole numbers, uniform in [low, high): tokens, labels, indices."""

    shape: tuple[int, ...]
    high: int
    low: int = 0

    def draw(self, generator: torch.Generator) -> Tensor:
        """A tensor of int64."""
        return torch.randint(self.low, self.high, self.shape, generator=generator)


@dataclass(frozen=True)
class Example:
    """An object of some kind, and what its contract needs to know.

    Args:
        make: Gives a fresh object each time. It is offered what its kind's objects are built from (an optimizer: the
            parameters; a schedule: the optimizer; a parametrization: the weight) and may take it or not.
        kind: One of the kinds of `laconic.core.card.KINDS`.
        name: The public name of the object, where `make()`'s class is not it (functions, closures, fake classes).
        traits: What it declares, from `laconic.testing.TRAITS`.
        inputs: One entry per argument: a shape (a float32 tensor, standard normal), `Ints`, or anything else as it is;
            or a function of a `torch.Generator` that returns them.
        wrong: Inputs that must be refused, in the same form.
        holds: What must be true afterwards: `holds(p)` of a constraint, `holds(module)` of an initialization.
        reference: A slow and obvious second computation, as the kind's module says.
        stated: Published figures by name, as the kind's module says: `{"parameters": 1234}`.
        expected_failures: Names of checks that fail, each with the reason. One that passes is an error.
        seed: Of all random numbers in the checks.
    """

    make: Callable[..., Any]
    kind: str = field(kw_only=True)
    name: str = field(default="", kw_only=True)
    traits: tuple[str, ...] = field(default=(), kw_only=True)
    inputs: Sequence[Any] | Callable[[torch.Generator], Sequence[Any]] | None = field(default=None, kw_only=True)
    wrong: Sequence[Any] | Callable[[torch.Generator], Sequence[Any]] | None = field(default=None, kw_only=True)
    holds: Callable[..., Any] | None = field(default=None, kw_only=True)
    reference: Callable[..., Any] | None = field(default=None, kw_only=True)
    stated: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    expected_failures: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        known_traits(self.kind, self.traits, f"the example {self.name or 'of a ' + self.kind}")
        for check, reason in self.expected_failures.items():
            if not reason.strip():
                raise BadInput(f"the expected failure of {check} has no reason: say why it fails")

    def build(self, *offered: Any, **options: Any) -> Any:
        """A fresh object; `make` gets as many of the offered values as it asks for."""
        return self.make(*offered[: _positional(self.make)], **options)

    def takes(self, option: str) -> bool:
        """Whether `make` has that keyword."""
        parameters = inspect.signature(self.make).parameters
        return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def arguments(
        self, default: Sequence[Any] | None = None, *, seed: int = 0, dtype: torch.dtype | None = None
    ) -> tuple:
        """Fresh inputs; floating-point ones in `dtype` where it is given."""
        spec = self.inputs if self.inputs is not None else default
        if spec is None:
            raise BadInput(f"the example {self.title()} has no inputs: give Example(inputs=...)")
        return self._drawn(spec, seed, dtype)

    def wrong_arguments(self) -> tuple:
        """Fresh inputs that must be refused."""
        if self.wrong is None:
            raise BadInput(f"the example {self.title()} names nothing that must be refused: give Example(wrong=...)")
        return self._drawn(self.wrong, 0, None)

    def title(self) -> str:
        """The public name that the example is for."""
        if self.name:
            return self.name
        with self.seeded():
            made = self.build(*_materials(self.kind))
        return getattr(made, "__name__", type(made).__name__)

    @contextmanager
    def seeded(self, seed: int = 0) -> Iterator[None]:
        """Global random numbers from the example's seed, and the caller's state back afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + seed)
            yield

    def generator(self, seed: int = 0) -> torch.Generator:
        """A seeded generator."""
        return torch.Generator().manual_seed(self.seed + seed)

    def _drawn(self, spec: Any, seed: int, dtype: torch.dtype | None) -> tuple:
        generator = self.generator(seed)
        with self.seeded(seed):  # a model among the inputs draws its first weights globally
            entries = spec(generator) if callable(spec) else spec
        return tuple(_drawn(entry, generator, dtype) for entry in entries)


def _drawn(entry: Any, generator: torch.Generator, dtype: torch.dtype | None) -> Any:
    if isinstance(entry, Ints):
        return entry.draw(generator)
    if isinstance(entry, tuple) and all(isinstance(size, int) for size in entry):
        entry = torch.randn(entry, generator=generator)
    elif isinstance(entry, Tensor):
        entry = entry.detach().clone()
    else:
        return copy.deepcopy(entry)
    return entry.to(dtype) if dtype is not None and entry.is_floating_point() else entry


def _materials(kind: str) -> tuple[Any, ...]:
    """Something that an object of that kind can be built from, where only its class is of interest."""
    weight = torch.nn.Parameter(torch.ones(6, 4))
    if kind == "Optimizer":
        return ([weight],)
    if kind == "Schedule":
        return (torch.optim.SGD([weight], lr=0.1),)
    if kind == "Weight":
        return (weight.detach(),)
    return (None, 0) if kind == "Search" else ()


def _positional(function: Callable[..., Any]) -> int:
    """How many positional arguments a function needs, those with a default not counted."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in places and p.default is p.empty for p in parameters)
