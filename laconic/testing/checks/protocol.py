"""The contract of a Protocol: a loop over tasks, clients or a stream that keeps state between them.

    Example(lambda: NMC(classes=3, features=8), kind="Protocol", traits=("order:independent",),
            inputs=lambda g: [stream(g), query(g)])

`protocol.update(*batch)` takes the next of the stream, `predict(*query)` gives what is known by now, `state_dict()` and
`load_state_dict(state)` stop and resume. `inputs`: the stream (a list of tuples, four or more), then the query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput

from ..contract import Broken, require
from ..example import Example
from ..tensors import close, copied, deep, floats, plain, same, tensors


def check_protocol_repeats(example: Example) -> None:
    """The same stream gives the same result, and `predict` changes nothing."""
    stream, query = _stream(example)
    first, second = _run(example, stream), _run(example, stream)
    want = copied(first.predict(*query))
    same(second.predict(*query), want, "the same stream gives another result")
    same(first.predict(*query), want, "predicting twice gives another result")


def check_protocol_learns(example: Example) -> None:
    """The stream matters: what is predicted after half of it is finite and not what is predicted after all."""
    stream, query = _stream(example)
    half, whole = _run(example, stream[: len(stream) // 2]), _run(example, stream)
    early, late = tensors(half.predict(*query)), tensors(whole.predict(*query))
    for tensor in floats(late):
        require(bool(torch.isfinite(tensor).all()), "the result is not finite")
    alike = len(early) == len(late) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(early, late, strict=True)
    )
    require(not alike, "the second half of the stream changes nothing")


def check_protocol_resumes(example: Example) -> None:
    """Stopped anywhere and resumed from its state, it ends with the same bits; the state needs no pickle."""
    stream, query = _stream(example)
    want = _run(example, stream).predict(*query)
    for stop in range(1, len(stream)):
        state = deep(_run(example, stream[:stop]).state_dict())
        require(plain(state), "the state holds what cannot be written without pickle")
        resumed = example.build()
        resumed.load_state_dict(state)
        for batch in stream[stop:]:
            resumed.update(*batch)
        same(resumed.predict(*query), want, f"resumed after {stop} of {len(stream)}, the result is another")


def check_protocol_order(example: Example) -> None:
    """The result depends on the order of the stream just where that is declared."""
    stream, query = _stream(example)
    want = _run(example, stream).predict(*query)
    orders = [stream[::-1], stream[1:] + stream[:1]]
    differs = []
    for order in orders:
        try:
            close(_run(example, order).predict(*query), want, "another order of the stream gives another result")
        except Broken as error:
            differs.append(error)
    if "order:independent" in example.traits and differs:
        raise differs[0]
    if "order:dependent" in example.traits:
        require(differs, "it declares 'order:dependent', and two other orders give the same result")


def check_protocol_keeps_stream(example: Example) -> None:
    """The stream is not changed in place."""
    stream, _ = _stream(example)
    before = copied(stream)
    _run(example, stream)
    same(copied(stream), before, "the stream was changed in place")


def _stream(example: Example) -> tuple[list[tuple[Any, ...]], tuple[Tensor, ...]]:
    stream, *query = example.arguments()
    if not isinstance(stream, list) or len(stream) < 4:
        raise BadInput(f"the stream of the example {example.name} must be a list of at least four tuples")
    return stream, tuple(query)


def _run(example: Example, stream: list[tuple[Any, ...]]) -> Any:
    with example.seeded():
        protocol = example.build()
        for batch in stream:
            protocol.update(*batch)
    return protocol
