"""The cache that a model's `generate` uses by itself: `use_cache(model, options)`, and `new_cache(model)`.

    use_cache(model, CacheOptions(key_bits=4, value_bits=4))
    model.generate(**inputs)                          # keys and values are packed
    model.generate(**inputs, use_cache=False)         # none
    model.generate(**inputs, past_key_values=mine)    # the caller's wins, and so does cache_implementation=

The model's class changes, in place, to one that makes this cache where transformers would make its own; its name,
modules and tensors stay as they are. Only `generate` asks for a cache by itself: whoever calls the model in a loop of
their own passes `past_key_values=new_cache(model)`.

Example:
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> use_cache(model, CacheOptions(key_bits=4, value_bits=4))
    >>> new_cache(model).layers
    [QuantizedLayer(4/4 bits, 0 packed + 0 recent tokens)]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from laconic.errors import BadInput

__all__ = ["CacheOptions", "CachesPacked", "default_cache", "new_cache", "use_cache"]

METHODS = ("plain", "rotatekv")


@dataclass(frozen=True)
class CacheOptions:
    """How keys and values are stored.

    Attributes:
        key_bits, value_bits: 8, 4 or 2.
        group: numbers that share a scale; None: a head, or, rotated, up to 128 channels over all heads.
        residual: newest tokens that stay floats.
        key_axis: "token" or "channel"; None: "channel" at 2 bits, where tokens are hardly enough.
        method: "plain", or "rotatekv" (`laconic.nn.rotated_cache`).
        attention: of transformers, to be set on the model; None: the model's stays.
        orders: of a rotated cache, layer -> order of its rotated key channels.

    Raises:
        BadInput: a method that is not known.
    """

    key_bits: int = 4
    value_bits: int = 4
    group: int | None = None
    residual: int = 32
    key_axis: str | None = None
    method: str = "plain"
    attention: str | None = "laconic"
    orders: Mapping[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput(f"method is {self.method!r}: a cache is one of {', '.join(METHODS)}")

    @property
    def name(self) -> str:
        """For tables, as "4/2 bits, rotatekv"."""
        bits = (
            f"{self.key_bits} bits" if self.key_bits == self.value_bits else f"{self.key_bits}/{self.value_bits} bits"
        )
        return bits if self.method == "plain" else f"{bits}, {self.method}"

    def make(self, config: Any, capacity: int = 0) -> Any:
        """An empty cache for a model with this config, with room for so many tokens."""
        from .kv_cache import QuantizedCache

        bits = (self.key_bits, self.value_bits)
        if self.method == "rotatekv":
            from .rotated_cache import RotatedQuantizedCache

            return RotatedQuantizedCache(config, bits, self.group, self.residual, self.orders, capacity=capacity)
        axis: Any = self.key_axis or ("channel" if self.key_bits == 2 else "token")
        return QuantizedCache(config, bits, self.group, self.residual, axis, capacity=capacity)

    def to_json(self) -> dict[str, Any]:
        """As a record holds it."""
        return {**asdict(self), "orders": {str(i): list(order) for i, order in self.orders.items()}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CacheOptions:
        """Options of a record.

        Raises:
            KeyError, TypeError, ValueError: they do not parse.
        """
        orders = {int(i): [int(c) for c in order] for i, order in data.get("orders", {}).items()}
        return CacheOptions(**{**data, "orders": orders})


class CachesPacked:
    """Common part of every model that makes a packed cache; comes first in the method resolution order."""

    _laconic_cache: CacheOptions

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """Where transformers would make a cache of its own kind, ours."""
        asked = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        if asked or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **more)  # type: ignore[misc]
        model_kwargs["past_key_values"] = new_cache(self)
        return None


_CLASSES: dict[type, type] = {}


def use_cache(model: nn.Module, options: CacheOptions) -> None:
    """Let `generate` of a model make this cache where the caller names none, in place.

    Raises:
        BadInput: it is no model of transformers that generates.
    """
    found: Any = model
    if not hasattr(model, "_prepare_cache_for_generation"):
        raise BadInput(f"{type(model).__name__} has no `generate` of transformers, and so no cache of keys and values")
    cls = type(model)
    if not isinstance(model, CachesPacked):
        if cls not in _CLASSES:
            _CLASSES[cls] = type(cls.__name__, (CachesPacked, cls), {"__module__": cls.__module__})
        model.__class__ = _CLASSES[cls]
    found._laconic_cache = options
    if options.attention is not None:
        from . import kv_cache  # noqa: F401 - registers the attention

        found.set_attn_implementation(options.attention)
    if options.method == "rotatekv":
        from .rotated_cache import announce_inputs

        announce_inputs(model)


def default_cache(model: Any) -> CacheOptions | None:
    """The options of the cache that `generate` uses by itself; None: transformers' own, in floats."""
    return getattr(model, "_laconic_cache", None)


def new_cache(model: Any, capacity: int = 0) -> Any:
    """An empty cache of the kind that the model's `generate` uses by itself.

    Args:
        model: of transformers.
        capacity: tokens to make room for at once.
    """
    options = default_cache(model)
    if options is None:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)
    return options.make(model.config, capacity)
