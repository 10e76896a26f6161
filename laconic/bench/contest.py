"""Who takes part: a contestant is one small function that makes something to time out of a problem.

    @contestant("torch float32", "torch", Product)
    def float32(problem: Product) -> Ready:
        layers = problem.copies(problem.weight)
        return Ready(cycling(layers, lambda w: F.linear(problem.x, w)), stored=layers[0].nbytes)

What it needs is said before (`needs`, `when`), so that `laconic bench --list` knows without setting anything up; what shows
only on the way is raised as `Absent`. Either way the reason stands in the record.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["OURS", "PEERS", "Absent", "Contestant", "Ready", "contestant", "contestants", "cycling"]

OURS = "laconic"
PEERS = ("torch", "torchao", "onnxruntime", "openvino", "llama_cpp", "bitsandbytes")

T = TypeVar("T")


class Absent(Exception):
    """A contestant, or a whole work, cannot take part here; the message says why and what would help."""


@dataclass
class Ready:
    """A contestant that is set up.

    Attributes:
        call: does the work `turns` times, and returns what `answer` understands.
        stored: bytes of the weights that one turn has to read; None where nobody knows.
        turns: how often one call does the work.
        answer: makes the tensor that is compared with the problem's `expected` out of what `call` returned; None where there
            is nothing to compare.
        peak: the peak of the machine that its arithmetic is held against, "float32" or "int8".
        note: how exactly it is done.
        close: gives back what the garbage collector would not.
    """

    call: Callable[[], Any]
    stored: float | None = None
    turns: int = 1
    answer: Callable[[Any], Tensor] | None = lambda found: found
    peak: str = "float32"
    note: str = ""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """One way to solve problems of one type.

    Attributes:
        name: unique among the contestants of a problem.
        peer: whose it is, `OURS` or one of `PEERS`.
        problem: the type of problem that it solves.
        prepare: sets it up for a problem.
        needs: modules that have to be installed.
        when: why it does not take part in a problem, or None; looks at sizes alone.
    """

    name: str
    peer: str
    problem: type
    prepare: Callable[[Any], Ready]
    needs: tuple[str, ...] = ()
    when: Callable[[Any], str | None] = lambda problem: None

    def why_not(self, problem: Any) -> str | None:
        """The reason that it cannot take part in this problem, or None."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed (pip install 'laconic[bench]')"
        return self.when(problem)


_registered: list[Contestant] = []


def contestant(
    name: str,
    peer: str,
    *problems: type,
    needs: Sequence[str] = (),
    when: Callable[[Any], str | None] = lambda problem: None,
) -> Callable[[Callable[[Any], Ready]], Callable[[Any], Ready]]:
    """Register a function that sets a contestant up; arguments are those of `Contestant`.

    Raises:
        ValueError: the name is taken for a type of problem, or the peer is not known.
    """
    if peer != OURS and peer not in PEERS:
        raise ValueError(f"{name}: the peer {peer!r} is none of {', '.join((OURS, *PEERS))}")

    def register(prepare: Callable[[Any], Ready]) -> Callable[[Any], Ready]:
        for problem in problems:
            if any(one.name == name and one.problem is problem for one in _registered):
                raise ValueError(f"there is a contestant {name!r} for {problem.__name__} already")
            _registered.append(Contestant(name, peer, problem, prepare, tuple(needs), when))
        return prepare

    return register


def contestants(problem: Any, peers: Sequence[str] | None = None) -> list[Contestant]:
    """Everyone for a problem, whether it can take part or not: ours first, then the peers' in their order.

    Args:
        problem: an instance.
        peers: whose; all by default. Ours always take part.
    """
    for peer in PEERS:
        importlib.import_module(f"laconic.bench.peers.{peer}")
    importlib.import_module("laconic.bench.ours")
    order = (OURS, *PEERS)
    found = [one for one in _registered if one.problem is type(problem)]
    found = [one for one in found if peers is None or one.peer == OURS or one.peer in peers]
    return sorted(found, key=lambda one: order.index(one.peer))


def cycling(copies: Sequence[T], call: Callable[[T], Any]) -> Callable[[], Any]:
    """A function that calls with the next copy each time, so that weights come from memory as in a real model."""
    following = cycle(copies)
    return lambda: call(next(following))
