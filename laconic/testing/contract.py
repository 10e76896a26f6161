"""`check(example)`: run the contract of an object's kind, and say what passed, what failed and what was expected to.

A check is a function `check_<kind>_<what>(example)` in `laconic.testing.checks.<kind>` that raises when the promise is
broken. Each starts from fresh objects and a fresh seed, so none depends on another.
"""

from __future__ import annotations

import dataclasses
import importlib
import keyword
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from laconic.core.card import KINDS
from laconic.errors import BadInput

from .example import Example
from .traits import TRAITS

__all__ = ["Broken", "LeftOut", "Report", "check", "checks_for", "needs", "require"]

Check = Callable[[Example], None]
C = TypeVar("C", bound=Check)


class Broken(AssertionError):
    """A promise of the contract that an object does not keep."""


class LeftOut(Exception):
    """A check that does not apply to this example, and why."""


def require(kept: object, otherwise: str) -> None:
    """Raise `Broken` with that sentence unless the promise is kept.

    Raises:
        Broken: it is not.
    """
    if not kept:
        raise Broken(otherwise)


def needs(trait: str) -> Callable[[C], C]:
    """Mark a check that applies only to objects which declare a trait."""

    def mark(check: C) -> C:
        check.trait = trait  # type: ignore[attr-defined]
        return check

    return mark


@dataclass
class Report:
    """What a contract found.

    Attributes:
        kind, name: of the object.
        passed: names of the checks that hold.
        failed: name -> what was found.
        expected: name -> the reason that the example gives for a failure that did happen.
        left_out: name -> why the check does not apply.
        seconds: processor time, which other work on the machine does not change much.
    """

    kind: str
    name: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed that was not expected to."""
        return not self.failed

    def raise_if_failed(self) -> None:
        """Raise `Broken` with the whole report if anything failed."""
        require(self.ok, str(self))

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.name}: {len(self.passed)} passed, {len(self.failed)} failed, {self.seconds:.2f} s"]
        lines += [f"  FAILED    {name}: {what}" for name, what in self.failed.items()]
        lines += [f"  expected  {name}: {reason}" for name, reason in self.expected.items()]
        lines += [f"  left out  {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def checks_for(kind: str) -> tuple[Check, ...]:
    """The checks of a kind, in the order in which they stand in their file.

    Raises:
        BadInput: there is no such kind.
    """
    if kind not in TRAITS:
        raise BadInput(f"{kind!r} is no kind; the kinds are {', '.join(KINDS)}")
    name = kind.lower() + "_" * keyword.iskeyword(kind.lower())  # `pass` cannot be imported by its name
    module = importlib.import_module(f"{__package__}.checks.{name}")
    return tuple(value for name, value in vars(module).items() if name.startswith(f"check_{kind.lower()}_"))


def check(example: Example) -> Report:
    """Run every check of the example's kind.

    An expected failure that passes is a failure, so that lists of exceptions shrink as objects are mended.

    Raises:
        BadInput: an expected failure names no check of this kind.
    """
    checks = {function.__name__: function for function in checks_for(example.kind)}
    unknown = sorted(set(example.expected_failures) - set(checks))
    if unknown:
        raise BadInput(f"{unknown[0]} is no check of a {example.kind}; those are: {', '.join(checks)}")
    begun = time.process_time()
    example = dataclasses.replace(example, name=example.title())
    report = Report(example.kind, example.name)
    for name, function in checks.items():
        _run(name, function, example, report)
    report.seconds = time.process_time() - begun
    return report


def _run(name: str, function: Check, example: Example, report: Report) -> None:
    reason = example.expected_failures.get(name)
    trait = getattr(function, "trait", None)
    if trait is not None and trait not in example.traits:
        why, found = f"it does not declare {trait!r}", None
    else:
        why, found = _outcome(function, example)
    if why:
        report.left_out[name] = why
        if reason is not None:
            report.failed[name] = f"is expected to fail but does not apply ({why}): remove it from expected_failures"
    elif found is None and reason is not None:
        report.failed[name] = f"passes, though it is expected to fail ({reason}): remove it from expected_failures"
    elif found is None:
        report.passed.append(name)
    elif reason is not None:
        report.expected[name] = reason
    else:
        report.failed[name] = found


def _outcome(function: Check, example: Example) -> tuple[str, str | None]:
    """Why a check does not apply, or "" and what it found wrong (None: nothing)."""
    try:
        with example.seeded():
            function(example)
    except LeftOut as error:
        return str(error), None
    except Broken as error:
        return "", str(error)
    except Exception as error:  # noqa: BLE001  whatever an object raises where it should not is what the check found
        return "", f"raised {type(error).__name__}: {error}"
    return "", None
