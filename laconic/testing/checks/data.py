"""The contract of Data: a sampler of indices, or a transform of examples.

    Example(lambda seed: Curriculum(100, seed=seed), kind="Data", traits=("sampler",), stated={"size": 100})
    Example(lambda: RandomErase(), kind="Data", traits=("transform",), inputs=[(3, 8, 8)],
            stated={"range": (-5, 5)})

A sampler yields indices, or lists of them, and has a length; `make` gets the seed; `stated["size"]` is how many examples
there are; `stated["ordered"]`: it draws nothing, so that seeds do not matter.
A transform is called as `transform(*inputs, generator=g)`; `stated["range"]` bounds its values, `stated["output"]` is the
shape of the first output where it is not that of the first input; `stated["fixed"]`: it draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from laconic.errors import BadInput

from ..contract import require
from ..example import Example
from ..tensors import copied, same, tensors


def check_data_repeats_from_seed(example: Example) -> None:
    """The same seed gives the same, whatever was drawn globally before."""
    first = _drawn(example, 0)
    torch.rand(3)
    require(_alike(_drawn(example, 0), first), "the same seed gives something else")


def check_data_depends_on_seed(example: Example) -> None:
    """Another seed gives something else, unless nothing is drawn."""
    fixed = bool(example.stated.get("ordered") or example.stated.get("fixed"))
    alike = all(_alike(_drawn(example, seed), _drawn(example, 0)) for seed in (1, 2, 3))
    require(
        alike == fixed, "every seed gives the same: say so" if alike else "seeds matter, and it is stated they do not"
    )


def check_data_bounded(example: Example) -> None:
    """Indices are those of examples; transformed values lie in the stated range."""
    if "sampler" in example.traits:
        size = _stated(example, "size")
        for index in _flat(_drawn(example, 0)):
            require(0 <= index < size, f"the index {index} is none of {size} examples")
        return
    low, high = _stated(example, "range")
    for seed in range(5):
        for tensor in tensors(_drawn(example, seed)):
            require(bool(torch.isfinite(tensor.double()).all()), "a transformed value is not finite")
            least, most = float(tensor.min()), float(tensor.max())
            require(low <= least and most <= high, f"values from {least:.3g} to {most:.3g} leave [{low}, {high}]")


def check_data_length(example: Example) -> None:
    """A sampler yields as much as its length says; a transform gives the stated shape."""
    if "sampler" in example.traits:
        sampler = example.build(example.seed)
        for epoch in range(2):
            count = len(list(sampler))
            require(count == len(sampler), f"its length is {len(sampler)}, and epoch {epoch} yields {count}")
        return
    arguments = example.arguments()
    want = tuple(example.stated.get("output", tuple(arguments[0].shape)))
    got = tuple(tensors(_drawn(example, 0))[0].shape)
    require(got == want, f"the output is {got}, and {want} is stated")


def check_data_keeps_input(example: Example) -> None:
    """A transform does not change its input; a sampler draws no global random numbers."""
    state = torch.get_rng_state()
    if "sampler" in example.traits:
        list(example.build(example.seed))
    else:
        arguments = example.arguments()
        before = copied(arguments)
        example.build()(*arguments, generator=example.generator())
        same(copied(arguments), before, "the input was changed in place")
    require(torch.equal(torch.get_rng_state(), state), "global random numbers were drawn")


def _drawn(example: Example, seed: int) -> Any:
    if "sampler" in example.traits:
        return list(example.build(example.seed + seed))
    return example.build()(*example.arguments(), generator=example.generator(seed))


def _alike(a: Any, b: Any) -> bool:
    if not tensors(a):
        return a == b
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _flat(value: Any) -> list[int]:
    if isinstance(value, Iterable):
        return [i for v in value for i in _flat(v)]
    return [int(value)]


def _stated(example: Example, name: str) -> Any:
    if name not in example.stated:
        raise BadInput(f"the example {example.name} does not state {name!r}: give stated={{{name!r}: ...}}")
    return example.stated[name]
