"""The contract of a Decoder: log-probabilities in, sequences out.

    Example(lambda: BeamSearch(beams=64, steps=3, end=0), kind="Decoder", inputs=lambda g: [markov(g), torch.tensor([1])],
            stated={"vocabulary": 4, "end": 0, "steps": 3})

`decoder(step, start)` returns a list of (tokens, score), best first: tokens a tensor of what follows the start, up to and
with the end token. `step(tokens)` takes (n, t) prefixes, start included, and gives (n, vocabulary) log-probabilities.
The example's decoder must be wide enough to be exhaustive. `reference(step, start)`: the same list from an obvious
computation, where `brute_force` is not it. With the trait "sampling" it is called with `generator` and draws one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput

from ..contract import LeftOut, require
from ..example import Example

_DRAWS = 400


def brute_force(
    step: Callable[[Tensor], Tensor], start: Tensor, *, end: int, steps: int
) -> list[tuple[tuple[int, ...], float]]:
    """Every sequence that ends with `end` or at the last step, with the sum of its log-probabilities, best first."""
    done: list[tuple[tuple[int, ...], float]] = []
    open_: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for index in range(steps):
        prefixes = torch.stack([torch.cat([start, torch.tensor(tokens, dtype=start.dtype)]) for tokens, _ in open_])
        table = step(prefixes).double()
        longer = [((*t, v), s + float(p)) for (t, s), row in zip(open_, table, strict=True) for v, p in enumerate(row)]
        last = index == steps - 1
        done += [(t, s) for t, s in longer if t[-1] == end or last]
        open_ = [(t, s) for t, s in longer if t[-1] != end]
    return sorted(((t, s) for t, s in done if s > -math.inf), key=lambda pair: -pair[1])


def check_decoder_agrees_with_brute_force(example: Example) -> None:
    """The sequences are those that trying all of them gives, in order of their scores."""
    step, start = _problem(example)
    if "sampling" in example.traits:
        _frequencies(example, step, start)
        return
    found = [(_tokens(t), float(s)) for t, s in example.build()(step, start)]
    require(found, "it returned nothing")
    if example.reference is None:
        require("augmented" not in example.traits, "its scores are augmented: give Example(reference=...)")
        want = brute_force(step, start, end=example.stated["end"], steps=example.stated["steps"])
    else:
        want = [(_tokens(t), float(s)) for t, s in example.reference(step, start)]
    require(len(found) <= len(want), f"it returned {len(found)} sequences, and there are {len(want)}")
    for place, ((tokens, score), (right, best)) in enumerate(zip(found, want, strict=False)):
        require(
            math.isclose(score, best, rel_tol=1e-5, abs_tol=1e-6), f"place {place}: the score is {score}, not {best}"
        )
        tied = [t for t, s in want if math.isclose(s, best, rel_tol=1e-5, abs_tol=1e-6)]
        require(tokens in tied, f"place {place}: the sequence is {tokens}, not {right}")


def check_decoder_scores(example: Example) -> None:
    """A score is the sum of the log-probabilities of its sequence, and they come best first."""
    if {"augmented", "sampling"} & set(example.traits):
        raise LeftOut("its scores are something else")
    step, start = _problem(example)
    scores = []
    for tokens, score in example.build()(step, start):
        total, prefix = 0.0, start
        for token in _tokens(tokens):
            total += float(step(prefix[None])[0, token])
            prefix = torch.cat([prefix, torch.tensor([token], dtype=start.dtype)])
        require(math.isclose(float(score), total, rel_tol=1e-5, abs_tol=1e-6), f"the score is {score}, not {total}")
        scores.append(float(score))
    require(scores == sorted(scores, reverse=True), f"the sequences do not come best first: {scores[:5]}")


def check_decoder_sequences(example: Example) -> None:
    """Tokens are of the vocabulary, nothing follows the end token, and no sequence is longer than stated."""
    end, steps, vocabulary = (example.stated[name] for name in ("end", "steps", "vocabulary"))
    for tokens in _sequences(example):
        require(all(0 <= t < vocabulary for t in tokens), f"{tokens} holds a token outside of the vocabulary")
        require(0 < len(tokens) <= steps, f"{tokens} is not between 1 and {steps} long")
        require(end not in tokens[:-1], f"{tokens} goes on after the end token {end}")
        require(tokens[-1] == end or len(tokens) == steps, f"{tokens} stops before the end token and the last step")


def check_decoder_repeats(example: Example) -> None:
    """The same problem (and seed) gives the same sequences, and the start is not changed."""
    require(_sequences(example) == _sequences(example), "two runs give different sequences")
    step, start = _problem(example)
    before = start.clone()
    _call(example, step, start, 0)
    require(torch.equal(start, before), "the start was changed in place")


def _problem(example: Example) -> tuple[Any, Tensor]:
    missing = [name for name in ("vocabulary", "end", "steps") if name not in example.stated]
    if missing:
        raise BadInput(f"the example {example.name} does not state {', '.join(missing)}: give stated={{...}}")
    step, start = example.arguments()
    return step, start


def _call(example: Example, step: Any, start: Tensor, seed: int) -> Any:
    options = {"generator": example.generator(seed)} if "sampling" in example.traits else {}
    return example.build()(step, start, **options)


def _sequences(example: Example) -> list[tuple[int, ...]]:
    step, start = _problem(example)
    seeds = range(20) if "sampling" in example.traits else range(1)
    return [_tokens(t) for seed in seeds for t, _ in _call(example, step, start, seed)]


def _tokens(tokens: Any) -> tuple[int, ...]:
    return tuple(int(t) for t in tokens)


def _frequencies(example: Example, step: Any, start: Tensor) -> None:
    """The total variation between frequencies and probabilities is what sampling alone gives.

    For n draws and probabilities p its mean is about sum_i sqrt(2 p_i (1 - p_i) / (pi n)) / 2, and it exceeds its mean by
    0.1 with a probability below exp(-n / 50), by McDiarmid's inequality.
    """
    counts = Counter(_tokens(_call(example, step, start, seed)[0][0]) for seed in range(_DRAWS))
    right = {
        t: math.exp(s) for t, s in brute_force(step, start, end=example.stated["end"], steps=example.stated["steps"])
    }
    off = sum(abs(counts.pop(t, 0) / _DRAWS - p) for t, p in right.items()) + sum(counts.values()) / _DRAWS
    limit = 0.1 + sum(math.sqrt(2 * p * (1 - p) / (math.pi * _DRAWS)) for p in right.values()) / 2
    require(off / 2 <= limit, f"frequencies are off by {off / 2:.3f} in total variation (limit {limit:.3f})")
