"""A cache of keys and values in 2 bits that are rotated before they are packed, for `generate`: `rotatekv`'s.

    from laconic.nn.rotated_cache import RotatedQuantizedCache, announce_inputs
    announce_inputs(model)
    model.generate(**inputs, past_key_values=RotatedQuantizedCache(model.config, size=64))

What is packed of a token, over all its heads of width D together (`laconic.numerics.kv` has the rounding):

    keys     k' = (R_t^-1 k H)[order]: the encoding R_t of position t is taken back, H mixes `size` channels
    values   v' = v H_D in each head

and what is read is x^ of these with all that undone in reverse. The cache does it, so the weights stay as they are,
packed or not, and a model is right with any other cache too. R_t is a rotation, which the cache knows from cos and sin:
the blocks' hooks (`announce_inputs`) hand them over, with what enters the block, whose largest entries name the sinks,
the tokens of the prompt that stay floats. Newest tokens stay floats as in `QuantizedCache`.

Attention cannot be computed on keys whose position is not in them yet: every step dequantizes the layer, n log n
operations for a token of n channels. It saves the bytes, and costs time.

Source: RotateKV, Su et al. 2025, arXiv 2501.16383. There H of keys and values is in the weights, which gives the same
numbers in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from laconic.errors import BadInput
from laconic.kernels import native
from laconic.nn.kv_cache import QuantizedCache, QuantizedLayer, _grown, _more, _Packed
from laconic.numerics import (
    KVCodes,
    base_order,
    grouped_size,
    hadamard,
    kv_codes,
    kv_values,
    pack,
    rotate_heads,
    sink_mask,
    unpack,
)

__all__ = ["Positions", "RotatedLayer", "RotatedQuantizedCache", "announce_inputs", "blocks_with_caches"]


class Positions:
    """cos and sin of the tokens of a cache, (1 or B, capacity, d / 2) each; layers that are told the same share them.

    They are float16, and are taken back as they are stored: what is rounded off cancels.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.latest: Tensor | None = None  # the tensor of the step, to know that two layers were told the same
        self._cos = self._sin = torch.empty(0)

    def add(self, at: int, cos: Tensor, sin: Tensor) -> None:
        """cos and sin (1 or B, N, d) of the tokens from `at`, of which both halves are the same."""
        if self.latest is cos and self.tokens == at + cos.shape[1]:
            return
        half, n = cos.shape[-1] // 2, at + cos.shape[1]
        if at == 0:
            self._cos, self._sin = (cos.new_empty((x.shape[0], 0, half), dtype=torch.float16) for x in (cos, sin))
        if n > self._cos.shape[1]:
            room = _more(n, self._cos.shape[1])
            self._cos, self._sin = (_grown(x[:, None], room)[:, 0] for x in (self._cos, self._sin))
        self._cos[:, at:n], self._sin[:, at:n] = cos[..., :half], sin[..., :half]
        self.tokens, self.latest = n, cos

    def turned(self, x: Tensor, at: int, back: bool) -> Tensor:
        """x (B, H, N, D) float32, the tokens from `at`, with positions encoded, or taken `back`, on the first d of D."""
        n, half = x.shape[2], self._cos.shape[-1]
        c, s = (part[:, None, at : at + n].float() for part in (self._cos, self._sin))
        if back:  # cos^2 + sin^2 is not 1 for encodings that scale as well
            c, s = (part / (c * c + s * s) for part in (c, -s))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    def select(self, f: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of the batch, where they have positions of their own."""
        if self._cos.shape[0] > 1:
            self._cos, self._sin = f(self._cos), f(self._sin)

    @property
    def nbytes(self) -> int:
        """Bytes, with the room that is not in use yet."""
        return self._cos.nbytes + self._sin.nbytes


class _Clipped(_Packed):
    """Packed tokens (B, 1, N, n) in groups whose range is clipped; `low` holds zero points."""

    def __init__(self, like: Tensor, bits: int, group: int, clip: float | None, scale_dtype: torch.dtype):
        super().__init__(like, bits, group, "token", scale_dtype)
        self.group, self.clip = group, clip

    def append(self, x: Tensor, at: int) -> None:
        found, n = kv_codes(x, self.bits, self.group, self.clip, self.scale.dtype), at + x.shape[2]
        self.codes[:, :, at:n] = pack(found.codes.flatten(0, 2), self.bits).view(*x.shape[:3], -1)
        self.scale[:, :, at:n], self.low[:, :, at:n] = found.scale, found.zero

    def floats(self, n: int, dtype: torch.dtype) -> Tensor:
        rows = self.codes[:, :, :n].reshape(-1, self.codes.shape[-1]).contiguous()
        fast = native.load() is not None and rows.device.type == "cpu"  # both give the same bits
        codes = native.unpack(rows, self.bits, self.dim) if fast else unpack(rows, self.bits, self.dim)
        shape = (*self.codes.shape[:2], n, self.dim)
        return kv_values(KVCodes(codes.view(shape), self.scale[:, :, :n], self.low[:, :, :n]), dtype)


class RotatedLayer(QuantizedLayer):
    """Keys and values of one layer, rotated and packed.

    Args:
        key_bits, value_bits: 8, 4 or 2.
        group: channels of a token, over all heads, that share a scale; None: the largest divisor up to 128.
        residual: newest tokens that stay floats.
        order: of the rotated key channels; None: as they are.
        size: channels that H mixes, a divisor of them all; None: of up to four heads together.
        clip: of the range; None: 0.8 at 2 bits, else 1.
        sinks: entries of what enters the block whose tokens of the prompt stay floats.
        scale_dtype, capacity, name: as in `QuantizedLayer`.
    """

    def __init__(
        self, key_bits: int = 2, value_bits: int = 2, group: int | None = None, residual: int = 32,
        order: Sequence[int] | None = None, size: int | None = None, clip: float | None = None, sinks: int = 20,
        scale_dtype: torch.dtype = torch.float16, capacity: int = 0, name: str = "layer",
    ):  # fmt: skip
        self.order, self.size, self.clip, self.sinks = order, size, clip, sinks
        super().__init__(key_bits, value_bits, group, residual, "token", scale_dtype, capacity, name)

    def _forget(self) -> None:
        super()._forget()
        self.positions: Positions | None = None
        self._told: tuple[Tensor, Tensor, Tensor] | None = None
        self._sink_at = torch.empty((0, 0), dtype=torch.long)  # (B, S) tokens, -1 for none
        self._sink_k = self._sink_v = torch.empty(0)  # (B, S, H, D)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As that of `QuantizedLayer`.

        Raises:
            BadInput: group, size or order do not fit the channels.
        """
        super().lazy_initialization(key_states, value_states)
        heads, dim = key_states.shape[1], key_states.shape[3]
        self._mixed = grouped_size(heads, dim) if self.size is None else self.size
        order = torch.arange(heads * dim) if self.order is None else torch.tensor(self.order)
        if sorted(order.tolist()) != list(range(heads * dim)) or heads * dim % self._mixed:
            raise BadInput(
                f"{self.name}: keys have {heads * dim} channels, and the order or runs of {self._mixed} are of others: "
                "the cache belongs to another model"
            )
        base_order(self._mixed)
        self._order, self._inverse = (x.to(self.device) for x in (order, torch.argsort(order)))

    def _store(self, what: str, x: Tensor, bits: int, axis: Any) -> _Packed:
        width = x.shape[1] * x.shape[3]
        group = next(g for g in range(min(width, 128), 0, -1) if width % g == 0) if self.group is None else self.group
        if width % group:
            raise BadInput(f"{self.name}: groups of {group} do not divide {width} channels of {what}: take a divisor")
        return _Clipped(
            x.detach()[:, :1, :0].new_empty((len(x), 1, 0, width)), bits, group, self.clip, self.scale_dtype
        )

    # --- adding tokens ----------------------------------------------------------------------------------------------

    def announce(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """What enters the block (B, N, d), and cos and sin of the positions, of the tokens that come next."""
        self._told = (hidden.detach(), cos, sin)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens whose positions were announced, and give all keys and values.

        Raises:
            BadInput: they were not.
        """
        at, told, self._told = self.get_seq_length(), self._told, None
        if told is None or told[1].shape[-2] != key_states.shape[2]:
            raise BadInput(
                f"{self.name}: the block did not say at which positions these keys stand: call announce_inputs(model) "
                "before a rotated cache is used, and only on models whose blocks are given cos and sin"
            )
        hidden, cos, sin = told
        if self.positions is None:
            self.positions = Positions()
        self.positions.add(at, cos, sin)
        if at == 0 and self.sinks and key_states.shape[2] > 1:
            self._keep_sinks(sink_mask(hidden, self.sinks), key_states.detach(), value_states.detach())
        return super().update(key_states, value_states, *args, **kwargs)

    def _keep_sinks(self, mask: Tensor, k: Tensor, v: Tensor) -> None:
        at = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
        self._sink_at = torch.where(mask.gather(1, at), at, -1)
        rows = torch.arange(len(at), device=at.device)[:, None]
        self._sink_k, self._sink_v = k[rows, :, at], v[rows, :, at]

    def _pack(self, k: Tensor, v: Tensor) -> None:
        assert self._keys is not None and self._values is not None
        self._keys.append(self.rotated_keys(k, self.packed), self.packed)
        self._values.append(_together(hadamard(v.float())), self.packed)

    def rotated_keys(self, k: Tensor, at: int) -> Tensor:
        """Keys (B, H, N, D) of the tokens from `at`, as they are rounded: (B, 1, N, H D)."""
        assert self.positions is not None
        plain = _together(self.positions.turned(k.float(), at, back=True))
        return rotate_heads(plain, self._mixed).index_select(-1, self._order)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _unpacked(self, keys: _Packed, values: _Packed) -> tuple[Tensor, Tensor]:
        assert self.positions is not None
        n, heads = self.packed, self._k.shape[1]
        k = rotate_heads(keys.floats(n, torch.float32).index_select(-1, self._inverse), self._mixed, transpose=True)
        k = self.positions.turned(_apart(k, heads), 0, back=False).to(self.dtype)
        v = hadamard(_apart(values.floats(n, torch.float32), heads), transpose=True).to(self.dtype)
        row, sink = ((self._sink_at >= 0) & (self._sink_at < n)).nonzero(as_tuple=True)
        if len(row):
            token = self._sink_at[row, sink]
            k[row, :, token], v[row, :, token] = self._sink_k[row, sink], self._sink_v[row, sink]
        return k, v

    def attend(self, query: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
        """softmax(scale q K^T + mask) V on keys and values that are dequantized for it."""
        k, v = (x.contiguous() for x in self.states())
        return torch.ops.laconic.decode_attention(
            query, k, v, mask=mask, recent=k.shape[2], scale=scale, v_dim=v.shape[-1], causal=causal
        )

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        left = self.get_seq_length()
        self._sink_at = torch.where(self._sink_at < left, self._sink_at, -1)
        if self.positions is not None:
            self.positions.tokens, self.positions.latest = min(self.positions.tokens, left), None

    def _select(self, f: Callable[[Tensor], Tensor]) -> None:
        super()._select(f)
        if self._sink_at.numel():
            self._sink_at, self._sink_k, self._sink_v = (f(x) for x in (self._sink_at, self._sink_k, self._sink_v))

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), self._sink_at, self._sink_k, self._sink_v]


class RotatedQuantizedCache(QuantizedCache):
    """Keys and values of a model whose blocks announce positions, rotated and packed.

    Args:
        config: of the model.
        bits: 8, 4 or 2, or a pair for keys and values.
        group, residual, scale_dtype, capacity: as in `RotatedLayer`.
        orders: layer -> order of its rotated key channels.
        size, clip, sinks: as in `RotatedLayer`.

    Raises:
        BadInput: a number is none of these.
    """

    def __init__(
        self, config: PreTrainedConfig, bits: int | tuple[int, int] = 2, group: int | None = None, residual: int = 32,
        orders: Mapping[int, Sequence[int]] | None = None, size: int | None = None, clip: float | None = None,
        sinks: int = 20, scale_dtype: torch.dtype = torch.float16, capacity: int = 0,
    ):  # fmt: skip
        if bits is None:
            raise BadInput("a rotated cache has 8, 4 or 2 bits: floats need no rotation, take QuantizedCache")
        super().__init__(config, bits, group, residual, "token", scale_dtype, capacity)
        found = orders or {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, QuantizedLayer):
                self.layers[i] = RotatedLayer(
                    layer.key_bits or 2, layer.value_bits or 2, group, residual, found.get(i), size, clip, sinks,
                    scale_dtype, capacity, layer.name,
                )  # fmt: skip

    def announce(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Hand over what a block is called with; layers that are told the same tensors share one store of them."""
        layer = self.layers[index]
        if not isinstance(layer, RotatedLayer):
            return
        if layer.positions is None:
            layer.positions = next((p for p in self._stores() if p.latest is cos), None)
        layer.announce(hidden, cos, sin)

    def _stores(self) -> list[Positions]:
        found = [x.positions for x in self.layers if isinstance(x, RotatedLayer) and x.positions is not None]
        return list(dict.fromkeys(found))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As that of `QuantizedCache`, of the positions too."""
        super().reorder_cache(beam_idx)
        self._select_positions(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As that of `QuantizedCache`, of the positions too."""
        super().batch_repeat_interleave(repeats)
        self._select_positions(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As that of `QuantizedCache`, of the positions too."""
        super().batch_select_indices(indices)
        self._select_positions(lambda x: x[indices].contiguous())

    def _select_positions(self, f: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores():
            store.select(f)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layers and their positions now, with the room that is not in use yet."""
        return super().nbytes + sum(store.nbytes for store in self._stores())


# --- the hooks of the blocks ------------------------------------------------------------------------


class _Announce:
    """The hook: tells a rotated cache what a block is called with. Other caches are not touched."""

    def __init__(self, index: int, path: str):
        self.index, self.path = index, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, RotatedQuantizedCache):
            return
        positions, hidden = kwargs.get("position_embeddings"), args[0] if args else kwargs.get("hidden_states")
        if not (isinstance(positions, tuple) and len(positions) == 2) or not isinstance(hidden, Tensor):
            raise BadInput(
                f"{self.path}: is not given cos and sin of its positions, which a rotated cache takes back: take the "
                "plain cache (method: plain)"
            )
        cache.announce(self.index, hidden, *positions)


def blocks_with_caches(model: nn.Module) -> dict[int, str]:
    """Number of a layer in the cache -> path of the block that holds its attention."""
    attentions = {
        path: module.layer_idx
        for path, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and not any(isinstance(getattr(m, "layer_idx", None), int) for m in module.modules() if m is not module)
    }
    return {index: path.rpartition(".")[0] for path, index in attentions.items()}


def announce_inputs(model: nn.Module) -> list[RemovableHandle]:
    """Let every block tell a rotated cache its inputs and positions from now on; again does nothing.

    Returns:
        The hooks that are new, to be removed.

    Raises:
        BadInput: no layer of the model knows its number in a cache.
    """
    blocks = blocks_with_caches(model)
    if not blocks:
        raise BadInput(f"{type(model).__name__} has no attention that knows its layer in a cache: take method: plain")
    handles = []
    for index, path in blocks.items():
        block = model.get_submodule(path)
        if not any(isinstance(hook, _Announce) for hook in block._forward_pre_hooks.values()):
            handles.append(block.register_forward_pre_hook(_Announce(index, path), with_kwargs=True))
    return handles


def _together(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, 1, N, H D)."""
    return x.transpose(1, 2).flatten(2)[:, None]


def _apart(x: Tensor, heads: int) -> Tensor:
    """(B, 1, N, H D) -> (B, H, N, D)."""
    return x[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)
