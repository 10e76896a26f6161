"""`mesa`: training with the activations that wait for the backward pass kept in 8 bits or fewer; the forward pass is exact.

What autograd saves, x, is cut into groups along its channels. Each group has a running range a and a running least value b,
which start from the first step and follow every later one before they are used,

    a <- m a + (1 - m) (max x - min x)         b <- m b + (1 - m) min x
    q = clamp(round((x - b) (2^n - 1) / a + u - 1/2), 0, 2^n - 1),   u ~ U(0, 1)        x^ = q a / (2^n - 1) + b

and the backward pass computes with x^ in place of x: dW = g^T x^ of a linear layer, both factors of a product of matrices,
y^ of a softmax, x^ of a GELU or a layer norm. Rounding is stochastic, so x^ is x on average, as long as x lies in its range.
Parameters, buffers, whole numbers, and statistics with a single value to a row are kept as they are. A tensor that several
operations save is packed once.

Groups: with heads (B, H, N, D) each head is one, other tensors are cut along their channels, the last dimension, or the
second of pictures (B, C, h, w).

Source: "Mesa: A Memory-saving Training Framework for Transformers", Pan, Chen, He, Liu, Cai, Zhuang, 2021, arXiv 2111.11124.
Official code: ziplab/Mesa, Apache-2.0. We differ from it: hooks of autograd take the place of a module for each operation,
so any model is taken as it is; a softmax keeps its output alone, where theirs keeps its input too; codes are clamped at
their upper end. The official ReLU keeps x where its sign is enough: `MaskReLU` keeps one bit a number and is exact.

Use it where activations fill the memory, as with long sequences. Recomputing them (torch.utils.checkpoint) is exact and
saves more, for a third more time.

Example:
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    >>> saved = SavedTensorQuant(model)
    >>> with saved:
    ...     loss = model(torch.randn(32, 64)).square().mean()
    >>> loss.backward()
    >>> saved.float_bytes, saved.bytes
    (74752, 18720)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from laconic.core.card import Card
from laconic.core.fake_quant import stochastic_round
from laconic.core.surgery import Swapped, Where, swap
from laconic.errors import BadInput
from laconic.numerics import pack, unpack

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SMALLEST = 256  # elements: of less nothing is gained
LEAST = 1e-30  # range of a group of equal numbers


# --- the numbers ------------------------------------------------------------------------------------


class Packed8:
    """One saved tensor.

    Attributes:
        words: (groups, words) int32 of codes, dense, or (groups, n) uint8 of 8 bits.
        span: a (groups,).
        low: b (groups,).
        shape, dtype: of the tensor.
        axis, groups: how it was cut.
        bits: of a code.
    """

    __slots__ = ("axis", "bits", "dtype", "groups", "low", "shape", "span", "words")

    def __init__(
        self, x: Tensor, span: Tensor, low: Tensor, bits: int, axis: int, groups: int, generator: torch.Generator | None
    ):
        rows = _as_groups(x, axis, groups)
        top = (1 << bits) - 1
        # rint(v + u - 1/2) is floor(v + u), u and 1 - u being drawn alike.
        scaled = stochastic_round((rows.float() - low[:, None]) * (top / span)[:, None], generator)
        codes = scaled.clamp_(0, top).to(torch.uint8)
        self.words = codes if bits == 8 else pack(codes, bits)
        self.span, self.low, self.bits, self.axis, self.groups = span, low, bits, axis, groups
        self.shape, self.dtype = x.shape, x.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.words.nbytes + self.span.nbytes + self.low.nbytes

    def unpack(self) -> Tensor:
        """x^, of the tensor's shape and type."""
        n = self.shape.numel() // self.groups
        codes = self.words if self.bits == 8 else unpack(self.words, self.bits, n)
        rows = codes.float() * (self.span / ((1 << self.bits) - 1))[:, None] + self.low[:, None]
        return _from_groups(rows, self.shape, self.axis, self.groups).to(self.dtype)


def group_axis(shape: torch.Size) -> int:
    """The dimension that groups are cut along: of heads and pictures the second, else the last."""
    return 1 if len(shape) == 4 else len(shape) - 1


def _as_groups(x: Tensor, axis: int, groups: int) -> Tensor:
    """(groups, n): the elements of each group."""
    return x.detach().movedim(axis, 0).reshape(groups, -1)


def _from_groups(rows: Tensor, shape: torch.Size, axis: int, groups: int) -> Tensor:
    rest = [n for i, n in enumerate(shape) if i != axis]
    return rows.reshape(shape[axis], *rest).movedim(0, axis)


# --- the context ------------------------------------------------------------------------------------


class SavedTensorQuant:
    """A context: what the forward pass inside saves for the backward pass is packed.

    The backward pass may come inside or after it. Enter it once a step, with the same computation each time: ranges are known
    by the order in which tensors are saved. Where that changes a range starts anew.

    Args:
        model: whose parameters and buffers are kept as they are.
        bits: of a code.
        groups: to a tensor, at most: the largest divisor of its channels up to this is taken. "head" makes each head one
            and leaves other tensors in one piece; 1 is one for the tensor, None one for each channel.
        momentum: m.
        seed: of the stochastic rounding.

    Attributes:
        bytes: what is kept of the tensors packed since the context was last entered.
        float_bytes: what they would have taken.

    Raises:
        BadInput: bits, groups or momentum that there are not.
    """

    def __init__(
        self, model: nn.Module, bits: int = 8, groups: int | str | None = "head", momentum: float = 0.9, seed: int = 0
    ):
        if bits not in BITS:
            raise BadInput(f"mesa: activations have 1 to 8 bits, not {bits}")
        if groups != "head" and groups is not None and not (isinstance(groups, int) and groups >= 1):
            raise BadInput(f"mesa: groups are 'head', a number, or None for one each channel, not {groups!r}")
        if not 0 <= momentum < 1:
            raise BadInput(f"mesa: momentum={momentum} is not in [0, 1)")
        self.model, self.bits, self.groups, self.momentum = model, bits, groups, momentum
        self._generator = torch.Generator().manual_seed(seed)
        self._ranges: dict[int, tuple[tuple[int, int], Tensor, Tensor]] = {}
        self._hooks: Any = None
        self.bytes = self.float_bytes = 0

    def __enter__(self) -> SavedTensorQuant:
        if self._hooks is not None:
            raise BadInput("mesa: the context is entered already")
        self.bytes = self.float_bytes = self._count = 0
        held = (*self.model.parameters(), *self.model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in held if type(tensor.data) is Tensor}
        self._seen: dict[Any, tuple[StorageWeakRef, Packed8]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        hooks, self._hooks = self._hooks, None
        self._seen = {}
        hooks.__exit__(*error)

    def state_dict(self) -> dict[str, Any]:
        """The running ranges and the state of the generator."""
        ranges = {i: {"cut": list(cut), "span": span, "low": low} for i, (cut, span, low) in self._ranges.items()}
        return {"ranges": ranges, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self._ranges = {
            int(i): ((one["cut"][0], one["cut"][1]), one["span"], one["low"]) for i, one in state["ranges"].items()
        }
        self._generator.set_state(state["generator"])

    def _pack(self, x: Tensor) -> Any:
        if not self._takes(x):
            return x
        storage = StorageWeakRef(x.untyped_storage())  # while it lives no other storage has its address
        key = storage.cdata, x.storage_offset(), tuple(x.shape), x.stride(), x._version, x.dtype
        if key in self._seen:
            return self._seen[key][1]
        axis = group_axis(x.shape)
        groups = self._cut(x.shape)
        span, low = self._range(x, axis, groups)
        made = Packed8(x, span, low, self.bits, axis, groups, self._noise(x.device))
        self._seen[key] = storage, made
        self.bytes += made.nbytes
        self.float_bytes += x.nbytes
        return made

    def _takes(self, x: Tensor) -> bool:
        if type(x) not in (Tensor, nn.Parameter) or x.dtype not in FLOATS or x.is_sparse or x.ndim < 2:
            return False
        if x.numel() < SMALLEST or x.shape[-1] == 1:
            return False
        return not (x.is_leaf and x.requires_grad) and x.untyped_storage()._cdata not in self._own

    def _cut(self, shape: torch.Size) -> int:
        """How many groups."""
        channels = shape[group_axis(shape)]
        if self.groups == "head":
            return channels if len(shape) == 4 else 1
        most = channels if self.groups is None else min(int(self.groups), channels)
        return next(n for n in range(most, 0, -1) if channels % n == 0)

    @torch.no_grad()
    def _range(self, x: Tensor, axis: int, groups: int) -> tuple[Tensor, Tensor]:
        """a and b after this step."""
        rows = _as_groups(x, axis, groups).float()
        low, high = rows.amin(1), rows.amax(1)
        span = high - low
        if not bool(torch.isfinite(span).all()):
            raise BadInput(f"mesa: an activation of shape {tuple(x.shape)} is not finite, and no codes stand for that")
        index, self._count = self._count, self._count + 1
        before = self._ranges.get(index)
        if before is not None and before[0] == (x.ndim, groups):
            span = self.momentum * before[1] + (1 - self.momentum) * span
            low = self.momentum * before[2] + (1 - self.momentum) * low
        self._ranges[index] = (x.ndim, groups), span, low
        return span.clamp(min=LEAST), low

    def _noise(self, device: torch.device) -> torch.Generator | None:
        return self._generator if device.type == "cpu" else None


def _unpack(saved: Any) -> Tensor:
    return saved.unpack() if isinstance(saved, Packed8) else saved


# --- ReLU -------------------------------------------------------------------------------------------


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(pack((x.detach() > 0).reshape(1, -1).to(torch.uint8), 1))
        return x.clamp(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (words,) = ctx.saved_tensors
        return gradient * unpack(words, 1, gradient.numel()).view(gradient.shape)


class MaskReLU(nn.Module):
    """max(x, 0), which keeps one bit of each number for its backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _Masked.apply(x)
        return x.clamp(min=0)


def mask_relus_(model: nn.Module, where: Where = None) -> Swapped:
    """Put `MaskReLU` in the place of every `nn.ReLU`, in place; returns the report of `laconic.swap`."""
    return swap(model, nn.ReLU, lambda old: MaskReLU(), where)


CARD = Card(
    id="mesa",
    title="Mesa: A Memory-saving Training Framework for Transformers",
    authors="Pan, Chen, He, Liu, Cai, Zhuang",
    year=2021,
    source="arXiv 2111.11124",
    family="quant",
    summary="Keeps the activations that wait for the backward pass in 8 bits or fewer, and leaves the forward pass exact.",
    objects={"MaskReLU": "Layer"},
    traits={"MaskReLU": ("batch_independent_eval",)},
    use="Training where activations fill the memory, as with long sequences.",
    avoid="Where a third more time can be had: recomputing activations is exact and saves more.",
    code="github.com/ziplab/Mesa, Apache-2.0",
    claim={
        "text": "With saved activations in 4 bits, the gradient of a language model is nearer to the exact one when each of "
        "32 groups of channels, and each head, has a range of its own than when each tensor has one.",
        "metric": "signal to noise of the gradient in dB",
        "direction": "higher",
        "margin": 1.0,
        "arms": ("layer_wise", "group_wise"),
        "seeds": 5,
        "minutes": 1,
        "task": "chars",
    },
)
