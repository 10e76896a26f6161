"""`rotatekv`: keys and values in 2 bits, after rotations that even out their channels.

Per token, n channels (heads of keys times their width D) are stored in groups of g, with clip c and b bits:

    s = c (max - min) / (2^b - 1)   z = round(-c min / s)   q = clamp(round(x / s) + z, 0, 2^b - 1)      x^ = s (q - z)

    keys      before positions are encoded: K' = (K H)[order], H a Hadamard matrix over G heads together, fused into the
              key layer; `order` sorts the rotated channels by their sum over calibration tokens, so that a group holds
              similar offsets. Read: dequantize, undo the order, undo H, then encode positions (n log n a token)
    values    V' = V H_D in each head, fused into the value and the output layer: nothing is left online
    sinks     of each sequence the tokens that hold the `sinks` largest |entries| of what enters the block stay floats
              while a prompt is read

Source: "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations", Su,
Chen, Shen, Wei, Li, Yu, Yuan, 2025, arXiv 2501.16383. Official code: ZunhaiSu/RotateKV, without a licence (not used).
We differ from it: 2^b - 1 at every b (its code has b^2 - 1, which is 8 at 3 bits); a group of one value comes back as
it is; heads are taken together only as far as G and their number have a common divisor.

`RotatedCache` holds one layer's packed keys and values, 2 + 32 / g bits a number at 2 bits. The pass `RotateKV` fuses
the rotations, and lets the key and value layers of any model give what that cache would give back: that is a
simulation, it saves no memory. The cache for `generate` is `laconic.nn.rotated_cache`, which rotates what comes to it and
leaves the weights alone (`pass: kv_cache, method: rotatekv` in a recipe). Use it where a long cache decides the memory; at
4 bits and above plain groups do (`QuantizedCache`).

Example:
    >>> import torch
    >>> x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]])
    >>> kv_round(x, bits=2, group=4, clip=1.0).tolist()
    [[0.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]]
    >>> cache = RotatedCache(channels=64, bits=(2, 2), group=64, sinks=0)
    >>> cache.append(torch.randn(1, 10, 64), torch.randn(1, 10, 64))
    >>> cache.nbytes, cache.keys().shape
    (400, torch.Size([1, 10, 64]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import Record, apply_records
from laconic.core.rotation import input_refusal, solve_output, solve_values, values_refusal
from laconic.core.structure import Mixer, Structure
from laconic.errors import BadInput
from laconic.nn.rotated import RestoreOutput
from laconic.numerics import (
    KVCodes,
    check_finite,
    grouped_size,
    kv_codes,
    kv_round,
    kv_values,
    pack,
    rotate_heads,
    sink_mask,
    sink_tokens,  # noqa: F401 - a name of this family
    unpack,
)

from ._batches import Batch, example_of, first_tensor, run_batch

# --- mathematics ------------------------------------------------------------------------------------


def channel_order(total: Tensor) -> Tensor:
    """Rotated channels by rising sum over tokens: (n,) int64."""
    return torch.argsort(total, stable=True)


# --- the cache --------------------------------------------------------------------------------------


class RotatedCache:
    """Keys and values of one layer, packed; as the key and value layers give them (rotated and in order).

    Args:
        channels: n of keys, and of values.
        bits: of keys and of values.
        group: g.
        clip: c of both; by default 0.8 at 2 bits and 1 at others.
        sinks: entries whose tokens stay floats in the first `append`.
        restore: undoes rotation and order of keys, as the hook of the key layer does; None: `keys` gives them stored.
        dtype: of scales and zeros.
    """

    def __init__(
        self, channels: int, bits: tuple[int, int] = (2, 2), group: int = 128, clip: float | None = None,
        sinks: int = 20, restore: RestoreOutput | None = None, dtype: torch.dtype = torch.float16,
    ):  # fmt: skip
        self.channels, self.bits, self.group, self.clip, self.sinks = channels, bits, group, clip, sinks
        self.restore, self.dtype = restore, dtype
        self._parts: list[tuple[list[Tensor], list[Tensor]]] = []
        self._floats: list[tuple[Tensor, Tensor, Tensor]] = []  # (N, T) mask, kept keys, kept values

    def append(self, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> None:
        """Add tokens (N, T, n); of the first ones those that `hidden` (N, T, d) shows to be sinks stay floats.

        Raises:
            BadInput: shapes do not belong together, or inf or nan.
        """
        if keys.shape != values.shape or keys.shape[-1] != self.channels or keys.ndim != 3:
            raise BadInput(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are not (N, T, {self.channels})")
        check_finite(keys, "keys")
        check_finite(values, "values")
        first = not self._parts
        self._parts.append((self._packed(keys, self.bits[0]), self._packed(values, self.bits[1])))
        if first and hidden is not None and self.sinks:
            mask = sink_mask(hidden, self.sinks)
            self._floats.append((mask, keys[mask].clone(), values[mask].clone()))

    def keys(self) -> Tensor:
        """All keys (N, T, n) float32, restored."""
        found = self._all(0)
        return found if self.restore is None else self.restore.restored(found)

    def values(self) -> Tensor:
        """All values (N, T, n) float32, rotated still: the output layer undoes that."""
        return self._all(1)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held; the mask of sinks counts as bits."""
        held = sum(t.nbytes for pair in self._parts for part in pair for t in part)
        return held + sum(-(-m.numel() // 8) + k.nbytes + v.nbytes for m, k, v in self._floats)

    def _packed(self, x: Tensor, bits: int) -> list[Tensor]:
        stored = kv_codes(x, bits, self.group, self.clip, self.dtype)
        words = pack(stored.codes.flatten(0, 1), bits).unflatten(0, x.shape[:2])
        return [words, stored.scale, stored.zero]

    def _all(self, which: int) -> Tensor:
        if not self._parts:
            raise BadInput("the cache is empty: append keys and values first")
        made = []
        for pair in self._parts:
            words, scale, zero = pair[which]
            codes = unpack(words.flatten(0, 1), self.bits[which], self.channels).unflatten(0, words.shape[:2])
            made.append(kv_values(KVCodes(codes, scale, zero)))
        for mask, *kept in self._floats:
            made[0][mask] = kept[which].float()
        return torch.cat(made, 1)


# --- the pass ---------------------------------------------------------------------------------------


def calibrate_kv(model: nn.Module, batches: Sequence[Batch], head_group: int = 4) -> dict[str, list[int]]:
    """Path of each key layer -> the order of its rotated channels.

    Args:
        model: as it is before the pass.
        batches: ids, or arguments of the model.
        head_group: G.

    Raises:
        BadInput: no data, or no attention whose keys and values could be told.
    """
    if not batches:
        raise BadInput("rotatekv: no calibration data: give batches of ids")
    structure = Structure.build(model, example_of(batches[0]))
    mixers = [mixer for mixer in structure.mixers if mixer.key]
    if not mixers:
        raise BadInput(f"rotatekv: no attention of {type(model).__name__} has layers for keys and values of its own")
    totals: dict[str, Tensor] = {}
    handles = []
    for mixer in mixers:
        size = _size(model, mixer, head_group)

        def note(module: nn.Module, args: Any, y: Tensor, path: str = mixer.key, size: int = size) -> None:
            check_finite(y, f"keys of {path}")
            found = rotate_heads(y.detach().double(), size).flatten(0, -2).sum(0)
            totals[path] = totals[path] + found if path in totals else found

        handles.append(model.get_submodule(mixer.key).register_forward_hook(note))
    try:
        for batch in batches:
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: channel_order(total).tolist() for path, total in totals.items()}


def _outputs(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1])


def _size(model: nn.Module, mixer: Mixer, head_group: int) -> int:
    return grouped_size(_outputs(model.get_submodule(mixer.key)) // mixer.width, mixer.width, head_group)


class _Stored:
    """What the cache of one layer gives back; knows the sinks of the prompt that is being read."""

    def __init__(self, bits: int, group: int, clip: float | None, sinks: _Sinks):
        self.bits, self.group, self.clip, self.sinks = bits, group, clip, sinks

    def __call__(self, x: Tensor) -> Tensor:
        y = kv_round(x, self.bits, self.group, self.clip)
        mask = self.sinks.mask
        return y if mask is None or mask.shape != x.shape[:-1] else torch.where(mask[..., None], x, y)


@dataclass
class _Sinks:
    """The sinks of what enters a block."""

    top: int
    mask: Tensor | None = field(default=None, repr=False)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = first_tensor((args, kwargs)).detach()
        self.mask = sink_mask(hidden, self.top) if self.top and hidden.ndim == 3 and hidden.shape[1] > 1 else None


class RotateKV:
    """The pass: rotations fused, keys and values rounded as the cache would.

    Args:
        bits_k, bits_v: bits.
        group: g, a divisor of the channels of keys and of values.
        clip: c; by default 0.8 at 2 bits and 1 at others.
        head_group: G.
        sinks: see the module.
        orders: of rotated key channels (`calibrate_kv`); as they are by default.
        rotate_values: whether values are rotated.

    Raises:
        BadInput: bits that cannot be.
    """

    id: ClassVar = "rotatekv"
    stage: ClassVar = "cache"
    scope: ClassVar = "model"
    needs: ClassVar = frozenset({"data", "float"})

    def __init__(
        self, bits_k: int = 2, bits_v: int = 2, *, group: int = 128, clip: float | None = None, head_group: int = 4,
        sinks: int = 20, orders: Mapping[str, Sequence[int]] | None = None, rotate_values: bool = True,
    ):  # fmt: skip
        for bits in (bits_k, bits_v):
            if not 1 <= bits <= 8:
                raise BadInput(f"rotatekv: {bits} bits: keys and values have 1 to 8")
        if sinks < 0 or head_group < 1:
            raise BadInput(f"rotatekv: sinks={sinks} and head_group={head_group}: 0 or more, and 1 or more")
        self.bits_k, self.bits_v, self.group, self.clip, self.head_group = bits_k, bits_v, group, clip, head_group
        self.sinks, self.orders, self.rotate_values = sinks, dict(orders or {}), rotate_values

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Key layer, and value layer, of each attention -> how they are stored; path -> why not."""
        units: dict[str, dict[str, Any]] = {}
        skipped: dict[str, str] = {}
        for mixer in structure.mixers:
            why = "its keys could not be told" if not mixer.key else input_refusal(structure, model, mixer.key)
            why = why or values_refusal(structure, model, mixer)
            widths = [_outputs(model.get_submodule(path)) for path in (mixer.key or mixer.value, mixer.value)]
            if not why and any(width % self.group or width % mixer.width for width in widths):
                why = (
                    f"groups of {self.group} do not divide its {widths[0]} and {widths[1]} channels of keys and values"
                )
            if why:
                skipped[mixer.value] = why
                continue
            block = max((b for b in structure.blocks if mixer.key.startswith(f"{b}.")), key=len, default="")
            told = {"group": self.group, "clip": self.clip, "sinks": self.sinks, "block": block}
            units[mixer.value] = {"what": "values", "bits": self.bits_v, "rotated": self.rotate_values, **told}
            size = _size(model, mixer, self.head_group)
            units[mixer.key] = {"what": "keys", "bits": self.bits_k, "size": size, **told}
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """New weights of the layers that make and read what is stored."""
        said, structure, model = decision.units[path], ctx.structure, ctx.model
        if said["what"] == "values":
            mixer = next(one for one in structure.mixers if one.value == path)
            one = torch.eye(mixer.width)
            record = solve_values(structure, model, mixer, None if said["rotated"] else one, method=self.id)
        else:
            count = _outputs(model.get_submodule(path))
            order = torch.tensor(self.orders.get(path, list(range(count))))
            record = solve_output(structure, model, path, size=said["size"], order=order, method=self.id)
        record.data["kv"] = said
        return record

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the new weights, and let the layer give what a cache would give back."""
        apply_records(model, [record])
        said, module = record.data["kv"], model.get_submodule(record.path)
        stored = _Stored(said["bits"], said["group"], said["clip"], self._sinks_of(model, said))
        if said["what"] == "keys":
            hooks = [h for h in module._forward_hooks.values() if isinstance(h, RestoreOutput)]
            hooks[-1].stored = stored
        else:
            module.register_forward_hook(lambda _, args, y: stored(y))

    @staticmethod
    def _sinks_of(model: nn.Module, said: Mapping[str, Any]) -> _Sinks:
        """The watcher of a block, one for its keys and values."""
        if not said["block"]:
            return _Sinks(0)
        block = model.get_submodule(said["block"])
        held = [hook for hook in block._forward_pre_hooks.values() if isinstance(hook, _Sinks)]
        if held:
            return held[0]
        sinks = _Sinks(said["sinks"])
        block.register_forward_pre_hook(sinks, with_kwargs=True)
        return sinks


CARD = Card(
    id="rotatekv",
    title="RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations",
    authors="Su, Chen, Shen, Wei, Li, Yu, Yuan",
    year=2025,
    source="arXiv 2501.16383",
    family="quant",
    summary="Stores keys and values in 2 bits, after rotating heads together and sorting channels by their offsets.",
    objects={"RotateKV": "Pass"},
    use="Long contexts, where the cache decides the memory, at 2 and 3 bits.",
    avoid="At 4 bits and above, or where the transform of all cached keys at each step costs too much.",
    composes=("rotate", "gptq"),
    vectors=("rotatekv",),
    code="ZunhaiSu/RotateKV, no licence (not used)",
    claim={
        "text": "Where two key channels are large, 2-bit keys and values lose less of a language model after rotation, "
        "reordering and with sinks kept than by plain groups of each token.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.02,
        "arms": ("plain", "rotatekv"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
