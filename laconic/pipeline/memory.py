"""A ceiling on resident bytes: the weights as they are packed, and the cache of keys and values of a decoder.

    bytes(weights file) + bytes(cache of T tokens in each of B rows) <= memory

T is `--seq`, or else the longest text that the model reads, B is `--batch`. The runtime itself and what a step computes
with on the way are not in it, since they do not depend on the choices. Models without a cache have their weights alone.

What the cache takes, the weights cannot have. With data and a ceiling on the drop, the cache of the fewest bytes that
costs no more than a quarter of that drop is taken (`choose_cache`); without, the one of most bits that is packed as hard
as the weights beside it have to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from laconic.errors import BadInput, Impossible
from laconic.nn.default_cache import CacheOptions
from laconic.tasks import Evaluation, Task

from .cache_bits import CANDIDATES, CacheRow, LayerShape, cache_bytes, cache_refusal, cache_shapes, choose_cache
from .plan import Ground

__all__ = ["SHARE", "Memory", "memory_of"]

SHARE = 0.25  # of the allowed drop that the cache may cost


@dataclass
class Memory:
    """The bytes that there are, and what they can be spent on.

    Attributes:
        bytes: the ceiling.
        tokens, batch: that the cache holds.
        shapes: of the cache; none for a model without one.
        least_weights: bytes of the smallest weights file.
        floats: bytes of the weights as floats.
        fixed: a recipe's cache, as a list of one; empty where it says nothing.
        rows: what was found out when the cache was chosen.
    """

    bytes: int
    tokens: int
    batch: int
    shapes: list[LayerShape]
    least_weights: int
    floats: int
    fixed: Sequence[CacheOptions | None] = ()
    rows: list[CacheRow] = field(default_factory=list)

    @property
    def candidates(self) -> list[CacheOptions | None]:
        """Caches beside which the smallest weights fit, from most bytes to least."""
        if all(shape.window is not None for shape in self.shapes):  # nothing that grows, or no cache at all
            return [None] if self.cache(None) + self.least_weights <= self.bytes else []
        return [o for o in self.fixed or CANDIDATES if self.cache(o) + self.least_weights <= self.bytes]

    def cache(self, options: CacheOptions | None) -> int:
        """Bytes of a cache."""
        return cache_bytes(self.shapes, options, self.tokens, self.batch)

    def weights(self, options: CacheOptions | None) -> int:
        """Bytes that the weights may have beside a cache."""
        return self.bytes - self.cache(options)

    def ceiling(self, size: int | None, options: CacheOptions | None) -> int:
        """Bytes that the weights file may have beside a cache, under a ceiling of its own too."""
        room = self.weights(options)
        return room if size is None else min(size, room)

    def even(self) -> CacheOptions | None:
        """The cache of most bytes that is packed at least as hard as the weights beside it; else the smallest."""
        found, whole = self.candidates, self.cache(None)
        for options in found:
            if self.weights(options) / self.floats >= self.cache(options) / max(1, whole):
                return options
        return found[-1]

    def measures(self, has_data: bool, drop: float | None) -> bool:
        """Whether the cache to take is found by measuring, and not from shapes alone."""
        return has_data and drop is not None and len(self.candidates) > 1

    def choose(
        self, model: Any, task: Task | None, drop: float | None, before: Callable[[], Evaluation], progress: Any = None
    ) -> CacheOptions | None:
        """The cache to take; what was measured for it stays in `rows`."""
        found = self.candidates
        if task is None or not self.measures("select" in task.splits, drop):
            return self.even()
        assert drop is not None
        chosen, self.rows = choose_cache(
            model, task, "select", found, SHARE * drop, tokens=self.tokens, batch=self.batch, before=before(),
            progress=progress,
        )  # fmt: skip
        return chosen

    def to_json(self, size: int, options: CacheOptions | None) -> dict[str, Any]:
        """For the report, with the bytes of the file that was written."""
        cache = self.cache(options)
        return {
            "bytes": self.bytes, "weights": size, "cache": cache, "tokens": self.tokens, "batch": self.batch,
            "cache_bits": None if options is None else options.name, "met": size + cache <= self.bytes,
            "tried": [row.to_json() for row in self.rows],
        }  # fmt: skip


def memory_of(
    ground: Ground, ceiling: int, seq: int | None, batch: int | None, fixed: Sequence[CacheOptions | None] = ()
) -> Memory:
    """What a ceiling leaves, from shapes alone.

    Args:
        ground: the model, on meta or not.
        ceiling: bytes of weights and cache together.
        seq, batch: tokens in a row of the cache, and rows; by default the longest text that the model reads, and one.
        fixed: the cache that a recipe states.

    Raises:
        Impossible: with the least that can be reached.
        BadInput: the model does not say how long its texts are.
    """
    model: Any = ground.model
    shapes = [] if cache_refusal(model) else cache_shapes(model)
    tokens = seq or (getattr(model.config, "max_position_embeddings", None) if shapes else 0)
    if tokens is None:
        raise BadInput(f"a memory ceiling counts the cache, and {ground.source.name} does not say how long: pass --seq")
    found = Memory(ceiling, tokens, batch or 1, shapes, ground.least(), sum(u.nbytes for u in ground.units), fixed)
    if not found.candidates:
        least = min(found.cache(o) for o in fixed or CANDIDATES) if shapes else 0
        beside = f", and a cache of {least:,} for {found.batch} x {tokens:,} tokens" if shapes else ""
        raise Impossible(
            f"a memory of {ceiling:,} bytes cannot be reached for {ground.source.name}: the least is "
            f"{found.least_weights + least:,} bytes, weights of {found.least_weights:,} at the fewest bits{beside}"
        )
    return found
