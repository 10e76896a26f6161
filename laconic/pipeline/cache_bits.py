"""The bits of the cache of keys and values: what fits a model, what it takes, what it costs in quality, and which to take.

A model reads a text token by token with `generate`, and sees what it read before through the cache. A task's forward reads
whole windows and has no cache. So the loss of a cache is measured on windows that are fed in chunks: within a chunk tokens
see each other exactly, earlier ones as the cache gives them back,

    drop(options) = how much worse the metric is through the cache than without one, the same weights in both.

`choose_cache` does that for a list of candidates. What a cache takes for n tokens is counted from the shapes of its keys and
values, which one short forward shows.

Example:
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    >>> shapes = cache_shapes(LlamaForCausalLM(LlamaConfig(**sizes)))
    >>> cache_bytes(shapes, None, tokens=1056), cache_bytes(shapes, CacheOptions(4, 4), tokens=1056)
    (1081344, 229376)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.modes import evaluating
from laconic.core.outputs import main_output
from laconic.errors import BadInput
from laconic.kernels.attention import BLOCK
from laconic.nn.default_cache import CacheOptions
from laconic.tasks import Evaluation, Task
from laconic.tasks import compare as compare_evaluations
from laconic.tasks.base import Batch

from .recipe import KVCache
from .source_base import first_line

__all__ = [
    "CANDIDATES", "CacheRow", "LayerShape", "ThroughCache", "cache_bytes", "cache_refusal", "cache_shapes", "calibrated",
    "attention_for", "check_fits", "choose_cache", "measured", "options_of", "step_of", "token_bytes",
]  # fmt: skip

CHUNK = 32  # tokens that are read at once
SINKS = 20  # tokens of a prompt that a rotated cache keeps as floats, at most
CALIBRATION = 4096  # tokens that the order of rotated channels is taken from
# From most bytes to least. None: floats.
CANDIDATES: tuple[CacheOptions | None, ...] = (
    None, CacheOptions(8, 8), CacheOptions(4, 4), CacheOptions(4, 2), CacheOptions(2, 2),
)  # fmt: skip


# --- what fits a model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one layer of a cache.

    Attributes:
        heads, key_dim, value_dim: of keys and values.
        itemsize: bytes of a float of the model.
        window: the most tokens that are kept; None: all, and only such layers are packed.
    """

    heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    window: int | None = None


def cache_refusal(model: nn.Module) -> str:
    """Why a model has no cache of keys and values that could be packed; "" if it has."""
    kind, found = type(model).__name__, model
    if not hasattr(model, "can_generate") or not model.can_generate() or not hasattr(model, "generate"):
        return f"{kind} does not generate, and has no cache of keys and values"
    config: Any = found.config
    if config.is_encoder_decoder:
        return f"{kind} has an encoder and a decoder, whose caches belong together and are not packed"
    if not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return f"{kind} keeps states of its own, and no keys and values"
    return ""


@torch.no_grad()
def cache_shapes(model: Any) -> list[LayerShape]:
    """Keys and values of every layer that has some, seen in a forward on two tokens; the model may be on meta.

    Raises:
        BadInput: it has no cache that is known how to be looked at.
    """
    from transformers import DynamicCache

    why = cache_refusal(model)
    if why:
        raise BadInput(f"{why}: leave kv_cache out of the recipe")
    cache = DynamicCache(config=model.config)
    like = next(model.parameters())
    with evaluating(model):
        try:  # embeddings and no ids, whose values a model may want to look at
            width = model.get_input_embeddings().embedding_dim
            embedded = torch.zeros((1, 2, width), dtype=like.dtype, device=like.device)
            model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"the cache of {type(model).__name__} cannot be looked at: {first_line(error)}") from error
    shapes = []
    for layer in cache.layers:
        k, v = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4:
            window = getattr(layer, "sliding_window", None)
            shapes.append(LayerShape(k.shape[1], k.shape[3], v.shape[3], k.element_size(), window))
    return shapes


def check_fits(options: CacheOptions, shapes: Sequence[LayerShape], name: str) -> None:
    """Refuse a cache of which nothing would be packed, and groups that do not divide what they group.

    Raises:
        BadInput: saying what would fit.
    """
    if all(shape.window is not None for shape in shapes):
        raise BadInput(
            f"{name} has no layer that keeps all keys and values, so nothing grows that could be packed: leave kv_cache out "
            "of the recipe"
        )
    for shape in shapes:
        if shape.window is not None or options.group is None:
            continue
        for what, dim in (("keys", shape.key_dim), ("values", shape.value_dim)):
            width = dim * shape.heads if options.method == "rotatekv" else dim
            fits = width % options.group == 0 and (
                options.method == "rotatekv" or options.group % 16 == 0 or options.group == dim
            )
            if not fits:
                raise BadInput(
                    f"the {what} of {name} have {width} numbers, which groups of {options.group} do not fit: leave the "
                    "group of kv_cache out, or take a divisor that is a multiple of 16"
                )


def options_of(step: KVCache | None) -> CacheOptions | None:
    """What a recipe says of the cache; None: floats."""
    if step is None or step.key_bits is None or step.value_bits is None:
        return None
    return CacheOptions(
        step.key_bits, step.value_bits, step.group, step.residual, step.key_axis, step.method, attention=None
    )


def step_of(options: CacheOptions | None) -> KVCache:
    """The same as a step of a recipe."""
    if options is None:
        return KVCache(key_bits=None, value_bits=None)
    said = {k: v for k, v in options.to_json().items() if k in KVCache.model_fields}
    return KVCache(**said)


def attention_for(model: Any) -> str | None:
    """The attention that computes on packed numbers, where the model takes it; None: its own, which dequantizes."""
    config = model.config.get_text_config(decoder=True)
    extra = getattr(config, "attn_logit_softcapping", None) or any(
        n.endswith(".sinks") for n, _ in model.named_parameters()
    )
    return None if extra or not model._can_set_attn_implementation() else "laconic"


# --- what it takes ----------------------------------------------------------------------------------


def cache_bytes(shapes: Iterable[LayerShape], options: CacheOptions | None, tokens: int, batch: int = 1) -> int:
    """Bytes of a cache that holds so many tokens in each row of a batch; None: floats, as transformers keeps them.

    Room that is taken ahead of what is in use is not counted, nor are positions of a rotated cache that differ by row.
    """
    total = positions = 0
    for shape in shapes:
        floats = shape.itemsize * shape.heads * (shape.key_dim + shape.value_dim)
        if shape.window is not None or options is None:
            total += batch * floats * (tokens if shape.window is None else min(tokens, shape.window - 1))
            continue
        packed = max(0, tokens - options.residual) // BLOCK * BLOCK
        total += batch * floats * max(tokens - packed, options.residual + BLOCK if packed else 0)
        total += batch * _packed_bytes(shape, options, packed)
        if options.method == "rotatekv":
            total += batch * floats * min(tokens, SINKS)
            positions = 2 * shape.key_dim * tokens
    return total + positions


def _packed_bytes(shape: LayerShape, options: CacheOptions, tokens: int) -> int:
    """Codes, and float16 pairs of scale and low, of tokens of one row."""
    found = 0
    parts = ((options.key_bits, shape.key_dim, options.key_axis), (options.value_bits, shape.value_dim, "token"))
    for bits, dim, axis in parts:
        if options.method == "rotatekv":
            width = dim * shape.heads
            group = options.group or next(g for g in range(min(width, 128), 0, -1) if width % g == 0)
            found += tokens * (4 * -(-width * bits // 32) + 4 * width // group)
            continue
        by_channel = (axis or ("channel" if bits == 2 else "token")) == "channel"
        scales = 4 * dim * (tokens // BLOCK) if by_channel else 4 * (dim // (options.group or dim)) * tokens
        found += shape.heads * (tokens * 4 * -(-dim * bits // 32) + scales)
    return found


def token_bytes(shapes: Sequence[LayerShape], options: CacheOptions | None) -> float:
    """Bytes that a further token takes in a long cache; tokens of sliding windows take none."""
    far = 1 << 16
    return (cache_bytes(shapes, options, 2 * far) - cache_bytes(shapes, options, far)) / far


# --- what it costs ----------------------------------------------------------------------------------


class ThroughCache(nn.Module):
    """A language model that reads in chunks, and sees earlier ones through a cache: logits (B, N, V) of ids (B, N).

    Args:
        model: of transformers.
        make: gives an empty cache.
        chunk: tokens read at once.
    """

    def __init__(self, model: nn.Module, make: Callable[[], Any], chunk: int = CHUNK):
        super().__init__()
        self.model, self.make, self.chunk = model, make, chunk

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        """Logits of every token."""
        cache, found = self.make(), []
        for start in range(0, input_ids.shape[1], self.chunk):
            stop = min(start + self.chunk, input_ids.shape[1])
            told = {} if attention_mask is None else {"attention_mask": attention_mask[:, :stop]}
            output = self.model(input_ids=input_ids[:, start:stop], past_key_values=cache, use_cache=True, **told)
            found.append(main_output(output))
        return torch.cat(found, 1)


def measured(
    model: nn.Module, task: Task, split: str, options: CacheOptions, chunk: int = CHUNK, progress: Any = None
) -> Evaluation:
    """A task's metric with keys and values seen through a cache.

    Raises:
        BadInput: its data are no token ids, or its windows are so short that no token is packed.
    """
    from laconic.nn.rotated_cache import announce_inputs

    length = _window(task, split)
    if max(0, (length - 1) // chunk * chunk - options.residual) < BLOCK:
        least = (options.residual + BLOCK) // chunk * chunk + chunk + 1
        raise BadInput(
            f"windows of {length} tokens of {task.id} are too short to see a cache that keeps the newest "
            f"{options.residual} as they are: pass --seq {least} or more"
        )
    handles = announce_inputs(model) if options.method == "rotatekv" else []
    try:
        return task.evaluate(ThroughCache(model, lambda: options.make(model.config), chunk), split, progress)
    finally:
        for handle in handles:
            handle.remove()


def calibrated(options: CacheOptions, model: Any, batches: Sequence[Batch]) -> CacheOptions:
    """The options with orders of rotated key channels, by rising sum over the tokens of batches; plain ones as they are.

    Raises:
        BadInput: there are no ids, or the model's positions are not rotations of the halves of a head.
    """
    if options.method == "plain" or options.orders:
        return options
    from laconic.nn.rotated_cache import announce_inputs

    cache: Any = None
    totals: dict[int, Tensor] = {}
    handles = announce_inputs(model)
    try:
        for batch in batches:
            if not isinstance(batch, dict) or "input_ids" not in batch:
                raise BadInput("kv_cache: the order of rotatekv is taken from token ids, which these data are not")
            cache = _sums(options, model)
            with torch.no_grad(), evaluating(model):
                ids = batch["input_ids"].to(next(model.parameters()).device)
                model(input_ids=ids, past_key_values=cache, use_cache=True)
            for i, total in cache.totals.items():
                totals[i] = totals[i] + total if i in totals else total
    finally:
        for handle in handles:
            handle.remove()
    if not totals:
        raise BadInput("kv_cache: rotatekv orders channels by data: pass --data or --task, or take method: plain")
    return replace(options, orders={i: torch.argsort(t, stable=True).tolist() for i, t in totals.items()})


def _sums(options: CacheOptions, model: Any) -> Any:
    """A rotated cache that packs nothing, and sums its rotated keys over tokens."""
    from laconic.nn.rotated_cache import Positions, RotatedLayer, RotatedQuantizedCache

    class Summing(RotatedLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self._told is None:
                return super().update(key_states, value_states)  # which says what is wrong
            _, cos, sin = self._told
            half = cos.shape[-1] // 2
            if not torch.equal(cos[..., :half], cos[..., half:]):
                raise BadInput(
                    f"{self.name}: positions turn neighbouring channels, and rotatekv takes back those that turn the "
                    "halves of a head: take method: plain"
                )
            self.lazy_initialization(key_states, value_states)
            self.positions = Positions()
            self.positions.add(0, cos, sin)
            found.totals[found.layers.index(self)] = self.rotated_keys(key_states, 0).double().sum((0, 1, 2)).cpu()
            return key_states, value_states

    found: Any = RotatedQuantizedCache(model.config, (options.key_bits, options.value_bits), options.group)
    found.totals = {}
    for i, layer in enumerate(found.layers):
        if isinstance(layer, RotatedLayer):
            found.layers[i] = Summing(layer.key_bits or 2, layer.value_bits or 2, layer.group, name=layer.name)
    return found


def _window(task: Task, split: str) -> int:
    """Tokens of the windows of a split."""
    batches = task.batches(split, 1, limit=1)
    if not batches or not isinstance(batches[0], dict) or set(batches[0]) - {"input_ids", "attention_mask"}:
        raise BadInput(f"the loss of a cache is measured on windows of token ids, which {task.id} has none of")
    return int(batches[0]["input_ids"].shape[1])


# --- which to take ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheRow:
    """What was found out about one candidate.

    Attributes:
        options: None for floats.
        bytes_per_token: that a further token takes in a long cache.
        bytes: for the tokens and rows asked for.
        drop, low, high: as in a `Comparison`, through the cache against without; None where it was not measured, since
            it takes more than there is room for.
        value: of the metric.
    """

    options: CacheOptions | None
    bytes_per_token: float
    bytes: int
    drop: float | None = None
    low: float | None = None
    high: float | None = None
    value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For reports, without orders of channels."""
        said = None if self.options is None else {k: v for k, v in self.options.to_json().items() if k != "orders"}
        return {**asdict(self), "options": said, "name": "floats" if self.options is None else self.options.name}


def choose_cache(
    model: Any,
    task: Task,
    split: str = "select",
    candidates: Sequence[CacheOptions | None] = CANDIDATES,
    allowed_drop: float | None = 1.0,
    *,
    room: int | None = None,
    tokens: int = 4096,
    batch: int = 1,
    before: Evaluation | None = None,
    chunk: int = CHUNK,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CacheOptions | None, list[CacheRow]]:
    """The cache to take, and what was found out about every candidate.

    Of those that have room, the one of the fewest bytes whose drop is allowed; where none is, or none is asked for, the one
    of the least drop.

    Args:
        model: of transformers, on whose weights it is measured, float or packed.
        task: windows of token ids.
        split: that is measured on.
        candidates: None stands for floats, whose drop is 0.
        allowed_drop: in the metric's unit; None: none is asked for.
        room: bytes that `tokens` in each row of a `batch` may take; None: any.
        tokens, batch: what bytes are counted for.
        before: the metric without a cache, where it is known.
        chunk: tokens read at once.
        seed: of the intervals.
        progress: is called with (done, total).

    Raises:
        BadInput: the model has no cache, the data are no windows of ids, or no candidate has room.
    """
    shapes, rows = cache_shapes(model), []
    for number, options in enumerate(candidates):
        if progress is not None:
            progress(number, len(candidates))
        size = cache_bytes(shapes, options, tokens, batch)
        row = CacheRow(options, token_bytes(shapes, options), size)
        if room is None or size <= room:
            if options is None:
                row = replace(row, drop=0.0, low=0.0, high=0.0, value=None if before is None else before.value)
            else:
                check_fits(options, shapes, type(model).__name__)
                if options.method == "rotatekv" and not options.orders:
                    options = calibrated(options, model, _calibration(task))
                before = before or task.evaluate(model, split)
                after = measured(model, task, split, options, chunk)
                found = compare_evaluations(before, after, task.metric, seed)
                row = replace(row, options=options, drop=found.drop, low=found.low, high=found.high, value=found.after)
        rows.append(row)
    tried = [row for row in rows if row.drop is not None]
    if not tried:
        raise BadInput(
            f"no cache of {tokens:,} tokens in {batch} rows fits into {room:,} bytes: the least takes "
            f"{min(row.bytes for row in rows):,}"
        )
    good = [row for row in tried if allowed_drop is not None and row.drop is not None and row.drop <= allowed_drop]
    if good:
        return min(good, key=lambda row: row.bytes).options, rows
    return min(tried, key=lambda row: (row.drop, row.bytes)).options, rows


def _calibration(task: Task) -> list[Batch]:
    """Some windows of the calibrate split, or of what there is."""
    split = "calibrate" if "calibrate" in task.splits else task.splits[0]
    return task.batches(split, limit=max(1, CALIBRATION // _window(task, split)))
