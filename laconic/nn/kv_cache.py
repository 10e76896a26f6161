"""A cache of keys and values that are packed to 8, 4 or 2 bits, for `generate` of any causal language model.

    from laconic.nn.kv_cache import QuantizedCache
    model.set_attn_implementation("laconic")
    model.generate(**inputs, past_key_values=QuantizedCache(model.config, bits=4))

Over each group of a token's numbers (or of a channel's, over 32 tokens) x = low + scale code; see
`laconic.kernels.attention`. The newest tokens stay floats, at least `residual` of them, and older ones are packed 32 at
a time (as KIVI does: Liu et al. 2024, arXiv 2402.02750). A prompt attends to its own exact keys and values.

With the attention "laconic", which importing this module registers with transformers, steps of up to 8 tokens
(decoding, and the drafts of assisted decoding) compute on the packed numbers where they lie, and nothing is dequantized
to memory. With any other attention the same cache works, saves the same bytes between steps, and costs time: every step
dequantizes the whole layer. Longer steps do that under any attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from laconic.errors import BadInput
from laconic.kernels import attention as _ops
from laconic.kernels.attention import BITS, BLOCK, dequantize_tokens
from laconic.numerics import words_per_row

__all__ = ["CachedStates", "QuantizedCache", "QuantizedLayer", "laconic_attention"]

NAME = "laconic"  # of the attention, for `set_attn_implementation`
MAX_QUERIES = 8  # tokens of a step that attends to packed keys and values
GROWTH = 256  # tokens, the least by which a cache grows

Axis = Literal["token", "channel"]


class _Packed:
    """The packed keys or the packed values of a layer: three tensors with room for `capacity` tokens."""

    def __init__(self, like: Tensor, bits: int, group: int, axis: Axis, scale_dtype: torch.dtype):
        self.bits, self.dim, self.by_channel = bits, like.shape[-1], axis == "channel"
        batch, heads = like.shape[:2]
        groups = self.dim if self.by_channel else self.dim // group
        self.codes = like.new_empty((batch, heads, 0, words_per_row(self.dim, bits)), dtype=torch.int32)
        self.scale = like.new_empty((batch, heads, 0, groups), dtype=scale_dtype)
        self.low = torch.empty_like(self.scale)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, a multiple of 32."""
        self.codes = _grown(self.codes, capacity)
        ranges = capacity // BLOCK if self.by_channel else capacity
        self.scale, self.low = _grown(self.scale, ranges), _grown(self.low, ranges)

    def append(self, x: Tensor, at: int) -> None:
        """Pack tokens x (B, H, N, D) into the places from `at`."""
        torch.ops.laconic.cache_append_(x, self.codes, self.scale, self.low, at=at, bits=self.bits)

    def floats(self, n: int, dtype: torch.dtype) -> Tensor:
        """The first n tokens (B, H, n, D)."""
        return dequantize_tokens(self.codes, self.scale, self.low, self.bits, self.dim, n, dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.low

    def replace(self, f: Callable[[Tensor], Tensor]) -> None:
        self.codes, self.scale, self.low = f(self.codes), f(self.scale), f(self.low)


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer: `packed` tokens, and after them `recent` ones as floats.

    Args:
        key_bits, value_bits: 8, 4 or 2, or both None: every token stays a float, in memory that grows in place (where
            transformers' own cache copies itself at every step).
        group: numbers of a token that share a scale: a divisor of the head's size and a multiple of 16; None: all.
        residual: newest tokens that stay floats; between `residual` and `residual` + 31 of them do.
        key_axis: "token", or "channel": keys have a scale for every channel over 32 tokens.
        scale_dtype: of scale and low.
        capacity: tokens to make room for at once.
        name: of the layer, for errors.
    """

    is_sliding = False

    def __init__(
        self, key_bits: int | None = 4, value_bits: int | None = 4, group: int | None = None, residual: int = 32,
        key_axis: Axis = "token", scale_dtype: torch.dtype = torch.float16, capacity: int = 0, name: str = "layer",
    ):  # fmt: skip
        super().__init__()
        self.key_bits, self.value_bits, self.group, self.residual = key_bits, value_bits, group, residual
        self.key_axis, self.scale_dtype, self.capacity, self.name = key_axis, scale_dtype, capacity, name
        self.packs = key_bits is not None
        # What has been packed does not come back exactly, so a rollback may leave a trace.
        self.is_croppable = not self.packs
        self._forget()

    def __repr__(self) -> str:
        if not self.packs:
            return f"QuantizedLayer(float, {self.recent} tokens)"
        bits = f"{self.key_bits}/{self.value_bits} bits"
        return f"QuantizedLayer({bits}, {self.packed} packed + {self.recent} recent tokens)"

    def _forget(self) -> None:
        self.is_initialized, self.packed, self.recent, self.version = False, 0, 0, 0
        self._keys: _Packed | None = None
        self._values: _Packed | None = None
        self._k = self._v = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, sizes, type and device from the first keys and values.

        Raises:
            BadInput: the group does not divide a head.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k, self._v = key_states.detach()[:, :, :0].clone(), value_states.detach()[:, :, :0].clone()
        if self.key_bits is not None and self.value_bits is not None:
            self._keys = self._store("keys", key_states, self.key_bits, self.key_axis)
            self._values = self._store("values", value_states, self.value_bits, "token")
        self._reserve(self.capacity)
        self.is_initialized = True

    def _store(self, what: str, x: Tensor, bits: int, axis: Axis) -> _Packed:
        """Where keys or values like x are packed."""
        dim = x.shape[-1]
        group = dim if self.group is None else self.group
        if dim % group or (group != dim and group % _ops.GROUP):
            raise BadInput(
                f"{self.name}: {what} have {dim} numbers a head, which groups of {group} do not fit; take a "
                f"divisor of {dim} that is a multiple of {_ops.GROUP}, or leave the group out"
            )
        return _Packed(x.detach(), bits, group, axis, self.scale_dtype)

    # --- adding tokens ----------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens (B, H, N, D), and give all keys and values.

        Returns:
            Plain tensors, or, for few new tokens after others, `CachedStates`, which dequantize only when something
            other than laconic's attention computes with them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length() == 0
        differentiable = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        lazy = key_states.shape[2] <= MAX_QUERIES and not differentiable
        whole = None
        if not first and not lazy:  # before the tokens are added, which moves what `states` gives views of
            whole = tuple(torch.cat([old, new], 2) for old, new in zip(self.states(), (key_states, value_states), strict=True))
        self._add(key_states.detach(), value_states.detach())
        if first:
            return key_states, value_states
        if whole is None:
            return CachedStates(self, 0), CachedStates(self, 1)
        return whole[0], whole[1]

    def _add(self, k: Tensor, v: Tensor) -> None:
        self.version += 1
        total = self.recent + k.shape[2]
        full = max(0, total - self.residual) // BLOCK * BLOCK if self.packs else 0
        if not full:
            self._reserve_recent(total)
            self._k[:, :, self.recent : total], self._v[:, :, self.recent : total] = k, v
            self.recent = total
            return
        if self.recent:
            k, v = (torch.cat([old[:, :, : self.recent], x], 2) for old, x in ((self._k, k), (self._v, v)))
        assert self._keys is not None and self._values is not None
        self._reserve(self.packed + full)
        self._pack(k[:, :, :full], v[:, :, :full])
        self.packed += full
        self.recent = total - full
        self._reserve_recent(self.recent)
        self._k[:, :, : self.recent], self._v[:, :, : self.recent] = k[:, :, full:], v[:, :, full:]

    def _pack(self, k: Tensor, v: Tensor) -> None:
        """Pack tokens behind those that are."""
        assert self._keys is not None and self._values is not None
        self._keys.append(k, self.packed)
        self._values.append(v, self.packed)

    def _reserve(self, tokens: int) -> None:
        """Room for `tokens` of those that there will be many of: packed ones, or, where none are, floats."""
        if self._keys is None or self._values is None:
            self._reserve_recent(tokens)
        elif tokens > (room := self._keys.codes.shape[2]):
            capacity = _more(tokens, room)
            self._keys.grow(capacity)
            self._values.grow(capacity)

    def _reserve_recent(self, tokens: int) -> None:
        room = self._k.shape[2]
        if tokens > room:
            capacity = max(tokens, self.residual + BLOCK) if self.packs else _more(tokens, room)
            self._k, self._v = _grown(self._k, capacity), _grown(self._v, capacity)

    # --- reading ----------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
        """softmax(scale q K^T + mask) V, (B, heads, q_len, D), on keys and values as they lie."""
        parts: tuple[Tensor | None, ...] = (None,) * 6
        if self._keys is not None and self._values is not None and self.packed:
            parts = (*self._keys.tensors(), *self._values.tensors())
        return torch.ops.laconic.decode_attention(
            query, self._k, self._v, *parts, mask, recent=self.recent, packed=self.packed, k_bits=self.key_bits or 8,
            v_bits=self.value_bits or 8, scale=scale, v_dim=self._v.shape[-1], causal=causal,
        )  # fmt: skip

    def states(self) -> tuple[Tensor, Tensor]:
        """All keys and all values as floats."""
        recent = self._k[:, :, : self.recent], self._v[:, :, : self.recent]
        if self._keys is None or self._values is None or not self.packed:
            return recent
        keys, values = self._unpacked(self._keys, self._values)
        return torch.cat([keys, recent[0]], 2), torch.cat([values, recent[1]], 2)

    def _unpacked(self, keys: _Packed, values: _Packed) -> tuple[Tensor, Tensor]:
        """The packed tokens as floats."""
        return keys.floats(self.packed, self.dtype), values.floats(self.packed, self.dtype)

    def sizes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of what `states` gives."""
        n = self.get_seq_length()
        keys, values = (torch.Size((*x.shape[:2], n, x.shape[3])) for x in (self._k, self._v))
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds now, with the room that is not in use yet."""
        return sum(x.nbytes for x in self._tensors())

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.packed + self.recent

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask is for, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: the cache grows."""
        return -1

    # --- changing what is there -------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens.

        Raises:
            ValueError: the number is positive, which once meant the size to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: {tokens_to_remove} is positive; give minus the number of tokens to remove")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.version += 1
        left = max(0, self.get_seq_length() + tokens_to_remove)
        self.packed, self.recent = min(self.packed, left), max(0, left - self.packed)
        if self.key_axis == "channel" and self.packed % BLOCK and self._keys is not None and self._values is not None:
            # Half a block cannot be added to: its tokens become recent ones again, with the values that they have.
            whole, n = self.packed // BLOCK * BLOCK, self.packed % BLOCK
            keys, values = (x.floats(self.packed, self.dtype)[:, :, whole:] for x in (self._keys, self._values))
            self.packed, self.recent = whole, n
            self._k[:, :, :n], self._v[:, :, :n] = keys, values

    def reset(self) -> None:
        """Forget every token, and give the memory back."""
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of the batch becomes what row beam_idx[i] is."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows of the batch only."""
        self._select(lambda x: x[indices].contiguous())

    def offload(self) -> None:
        """Refused.

        Raises:
            BadInput: always.
        """
        raise BadInput(f"{self.name}: a packed cache is not offloaded; leave `offloading` out")

    def prefetch(self) -> None:
        """Nothing: the layer stays on its device."""

    def _select(self, f: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.version += 1
        self._k, self._v = f(self._k), f(self._v)
        for part in (self._keys, self._values):
            if part is not None:
                part.replace(f)

    def _tensors(self) -> list[Tensor]:
        parts = [p for p in (self._keys, self._values) if p is not None]
        return [self._k, self._v, *(x for p in parts for x in p.tensors())]


class QuantizedCache(Cache):
    """Keys and values of a causal language model, packed where a layer attends to all that came before.

    Layers of other kinds (sliding windows, chunks, recurrent states) keep what transformers gives them: their memory
    does not grow with the text. `kept` tells which, and why.

    Args:
        config: of the model.
        bits: 8, 4 or 2, or a pair for keys and values; None: floats, in memory that grows in place.
        group: numbers of a token that share a scale; None: a whole head. Smaller costs 4 bytes each, and is closer.
        residual: newest tokens that stay floats.
        key_axis: "token" or "channel"; take "channel" for keys of 2 bits.
        scale_dtype: float16, bfloat16 or float32.
        capacity: tokens to make room for at once, where the length is known: growing copies what is there.

    Raises:
        BadInput: a number is none of these.
    """

    def __init__(
        self, config: PreTrainedConfig, bits: int | tuple[int, int] | None = 4, group: int | None = None,
        residual: int = 32, key_axis: Axis = "token", scale_dtype: torch.dtype = torch.float16, capacity: int = 0,
    ):  # fmt: skip
        key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
        for found in (key_bits, value_bits):
            if found not in BITS and not (found is None and bits is None):
                raise BadInput(f"bits is {bits}: a cache has 8, 4 or 2, or a pair of them, or None for floats")
        if group is not None and group < 1:
            raise BadInput(f"group is {group}: it must be at least 1, or None for a whole head")
        if key_axis not in ("token", "channel"):
            raise BadInput(f"key_axis is {key_axis!r}: keys have their scales by 'token' or by 'channel'")
        if scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise BadInput(f"scale_dtype is {scale_dtype}: scales are float16, bfloat16 or float32")
        if residual < 0 or capacity < 0:
            raise BadInput(f"residual is {residual} and capacity {capacity}: neither may be negative")
        self.kept: dict[int, str] = {}
        layers: list[Any] = []
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        for i, (kind, told) in enumerate(zip(kinds, options, strict=True)):
            if kind == "full_attention":
                layers.append(
                    QuantizedLayer(
                        key_bits, value_bits, group, residual, key_axis, scale_dtype, capacity, name=f"cache layer {i}"
                    )
                )
            else:
                self.kept[i] = f"{kind}: does not keep every token, and stays as transformers has it"
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**told))
        super().__init__(layers=layers)

    def reads_packed(self, tokens: int) -> bool:
        """Whether attention for a step of so many tokens is computed on the packed numbers."""
        return tokens <= MAX_QUERIES and self.get_seq_length() > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layers now, with the room that is not in use yet."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedLayer))


class CachedStates(Tensor):
    """All keys or all values of a layer, before anybody has asked for their numbers.

    laconic's attention computes on the packed ones. Whatever else computes with this gets a tensor dequantized then.
    """

    layer: QuantizedLayer

    @staticmethod
    def __new__(cls, layer: QuantizedLayer, which: int) -> CachedStates:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, layer.sizes()[which], dtype=layer.dtype, device=layer.device
        )

    def __init__(self, layer: QuantizedLayer, which: int):
        self.layer, self._which, self._step = layer, which, layer.version
        self._numbers: Tensor | None = None

    def is_current(self) -> bool:
        """Whether the layer still holds what it held then."""
        return self._step == self.layer.version

    def numbers(self) -> Tensor:
        """The numbers.

        Raises:
            RuntimeError: the cache has moved on, so that they are gone.
        """
        if self._numbers is None:
            if not self.is_current():
                raise RuntimeError(f"{self.layer.name}: these keys or values are of an earlier step, and were not kept")
            self._numbers = self.layer.states()[self._which]
        return self._numbers

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CachedStates({self.layer!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(CachedStates, CachedStates.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)


def laconic_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: on the packed cache for few queries, else torch's own.

    Args:
        query: (B, heads, q_len, D); key and value: what the cache's `update` gave.
        attention_mask: bool or additive, (B, 1 or heads, q_len, tokens).

    Returns:
        (B, q_len, heads, D), and no weights.

    Raises:
        BadInput: the model's attention has a term that this one lacks.
    """
    lacking = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if lacking:
        where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
        raise BadInput(f"{where}: has {lacking[0]}, which attention 'laconic' lacks; use 'eager', with the same cache")
    layer = key.layer if isinstance(key, CachedStates) and key.is_current() else None
    if not isinstance(value, CachedStates) or value.layer is not layer:
        layer = None  # something between the cache and here has changed one of them
    if layer is None or dropout or kwargs.get("position_bias") is not None:
        key, value = (x.numbers() if isinstance(x, CachedStates) else x for x in (key, value))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and bool(is_causal)
    out = layer.attend(query, attention_mask, scaling, causal)
    return out.transpose(1, 2).contiguous(), None


def _more(tokens: int, room: int) -> int:
    """A capacity for at least `tokens`, so much more than `room` that growing stays rare."""
    return -(-max(tokens, room + max(GROWTH, room // 4)) // BLOCK) * BLOCK


def _grown(x: Tensor, n: int) -> Tensor:
    """x with room for n along dim 2."""
    out = x.new_empty((*x.shape[:2], n, x.shape[3]))
    out[:, :, : x.shape[2]] = x
    return out


AttentionInterface.register(NAME, laconic_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
