"""`rsq`: rounds a model's weights for the tokens that matter: GPTQ whose Hessian counts important tokens for more.

Each token x_t of a calibration sequence (T tokens) gets a weight r_t, the same for all layers of a block, and the
layer-wise objective becomes sum_t w_t ||(W - W^) x_t||^2, so that GPTQ works on

    H = 2/n sum over n sequences of sum_t w_t x_t x_t^T             w = T r^p / sum r^p         (p = `power`)
    r = r_min + (c - min c) / (max c - min c) (r_max - r_min)    over one sequence; r_max if all c are equal

What importance c is:

    attention     c_j = sum over heads h and queries t of P[h, t, j]: how much token j is looked at in this block
    norm          |x_j| of what enters the block
    difference    |y_j - x_j| between what leaves and enters it
    frequency     minus how often the token occurs in the calibration data: rare ones count
    distance      mean squared distance to the other tokens of the sequence, as they enter the block
    positions     1 for the first tokens (`first`), 0 for the others
    uniform       all are one: plain GPTQ

Blocks are done in order, each on what the rounded ones before it give, its weights taken before it is rounded itself.
Before all that the model is rotated (`rotate`), which changes nothing but evens out the columns.

Source: "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", Sung, Yadav, Li, Yoon, Bansal, 2025, arXiv
2503.01820. Official code: ylsung/rsq, Apache-2.0. We differ from it: attention is watched at the call of the softmax or
of the fused attention, whatever the class, so no eager attention is needed; equal importances give equal weights
(official divides by zero); the paper's text multiplies features by r (`power` 2), its code by sqrt(r), which is our
default.

Nothing remains at inference but the online transforms of `rotate`. Use it at 3 bits and below on language models; with
one token or data unlike the later use it cannot help. The first token takes most of the attention, so r_min decides how
much the others count.

Example:
    >>> import torch
    >>> c = torch.tensor([4.0, 1.0, 2.0, 1.0])
    >>> token_weights(c, r_min=0.5).tolist()
    [1.0, 0.5, 0.6666666865348816, 0.5]
    >>> mean_one(token_weights(c, r_min=0.5)).mean().item()
    1.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from laconic.core.calls import Stop, capture
from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import Record
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.numerics import Int, Scale, Scheme, check_finite

from ._batches import Batch, example_of, first_tensor, run_batch
from ._gptq import GPTQ, Hessian
from ._rotate import rotate

__all__ = [
    "RSQ", "Importance", "Quantized", "attention_concentration", "attention_weights", "mean_one", "rsq",
    "token_importance", "token_weights", "weighted_hessian", "weighted_hessians",
]  # fmt: skip

Importance = Literal["attention", "norm", "difference", "frequency", "distance", "positions", "uniform"]
IMPORTANCES = ("attention", "norm", "difference", "frequency", "distance", "positions", "uniform")
# Queries of an attention whose probabilities are held at once.
QUERIES = 256


# --- mathematics ------------------------------------------------------------------------------------


def attention_concentration(probabilities: Tensor) -> Tensor:
    """c (..., keys) of attention probabilities (..., heads, queries, keys)."""
    return probabilities.float().sum((-3, -2))


def token_importance(kind: Importance, x: Tensor, *, y: Tensor | None = None, first: int | None = None) -> Tensor:
    """c (..., T) of what is seen from a block's inputs (and outputs) alone.

    Args:
        kind: norm, difference, distance, positions or uniform.
        x: (..., T, d) what enters the block.
        y: (..., T, d) what leaves it, for `difference`.
        first: tokens that count, for `positions`; half of them by default.

    Raises:
        BadInput: another kind, or no outputs for `difference`.
    """
    wide = x.float()
    if kind == "norm":
        return wide.norm(dim=-1)
    if kind == "difference":
        if y is None:
            raise BadInput("token_importance: 'difference' needs what leaves the block")
        return (y.float() - wide).norm(dim=-1)
    if kind == "distance":
        return torch.cdist(wide, wide).square().sum(-1) / max(1, x.shape[-2] - 1)
    ones = torch.ones(x.shape[:-1], device=x.device)
    if kind == "positions":
        ones[..., x.shape[-2] // 2 if first is None else first :] = 0
        return ones
    if kind == "uniform":
        return ones
    raise BadInput(f"token_importance: {kind!r} is none of norm, difference, distance, positions, uniform")


def token_weights(importance: Tensor, r_min: float = 0.005, r_max: float = 1.0) -> Tensor:
    """r (..., T) of importances c (..., T): from r_min to r_max over each sequence, r_max where all are equal.

    Raises:
        BadInput: not 0 <= r_min <= r_max, or r_max is 0.
    """
    if not 0 <= r_min <= r_max or r_max == 0:
        raise BadInput(f"token_weights: r_min={r_min} and r_max={r_max}: 0 <= r_min <= r_max, and r_max above 0")
    c = importance.float()
    low, high = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    share = torch.where(high > low, (c - low) / torch.where(high > low, high - low, 1.0), 1.0)
    return r_min + share * (r_max - r_min)


def mean_one(r: Tensor, power: float = 1.0) -> Tensor:
    """w = T r^p / sum r^p (..., T): weights of mean one over each sequence."""
    raised = r.float() ** power
    return raised * (r.shape[-1] / raised.sum(-1, keepdim=True))


def weighted_hessian(hessian: Hessian, x: Tensor, r: Tensor | None, power: float = 1.0) -> None:
    """Add sequences x (N, T, K) to a Hessian, tokens counted by r (N, T), or all alike.

    Raises:
        BadInput: the weights are of another shape.
    """
    if r is None:
        hessian.add(x)
        return
    if r.shape != x.shape[:-1]:
        raise BadInput(f"token weights of shape {tuple(r.shape)} do not fit inputs of shape {tuple(x.shape)}")
    hessian.add(x.float() * mean_one(r, power).sqrt()[..., None])


# --- watching attention -----------------------------------------------------------------------------


class _Attention(TorchFunctionMode):
    """Adds up c (N, T) over the attentions that run: at each fused attention, or softmax of square scores."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._note(_fused_concentration(*args, **kwargs))
            return func(*args, **kwargs)
        y = func(*args, **kwargs)
        softmax = func in (F.softmax, torch.softmax, Tensor.softmax) and isinstance(y, Tensor)
        if softmax and y.ndim == 4 and y.shape[-1] == y.shape[-2]:
            self._note(attention_concentration(y.detach()))
        return y

    def _note(self, c: Tensor) -> None:
        self.found = c if self.found is None else self.found + c


def attention_weights(run: Callable[[], Any], r_min: float = 0.005, r_max: float = 1.0) -> Tensor | None:
    """r (N, T) by the attention that tokens get while `run` runs; None where no attention over tokens was seen."""
    with _Attention() as mode:
        run()
    return None if mode.found is None else token_weights(mode.found, r_min, r_max)


def _fused_concentration(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """c (N, keys) of a fused attention, its probabilities made a few queries at a time."""
    q, k = query.detach().float(), key.detach().float()
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    total = q.new_zeros(*q.shape[:-3], k.shape[-2])
    keys = torch.arange(k.shape[-2], device=q.device)
    for begin in range(0, q.shape[-2], QUERIES):
        scores = (q[..., begin : begin + QUERIES, :] @ k.mT) * factor
        rows = torch.arange(begin, begin + scores.shape[-2], device=q.device)
        if is_causal:
            scores = scores.masked_fill(keys > rows[:, None], -torch.inf)
        if attn_mask is not None:
            part = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., begin : begin + QUERIES, :]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
        total += attention_concentration(scores.softmax(-1).nan_to_num(0.0))
    return total


# --- the pass ---------------------------------------------------------------------------------------


def weighted_hessians(
    model: nn.Module, block: str, layers: Sequence[str], batches: Sequence[Batch], *,
    token_weight: Importance | Callable[[Tensor], Tensor] = "attention", r_min: float = 0.005, r_max: float = 1.0,
    power: float = 1.0, first: int | None = None,
) -> dict[str, Hessian]:  # fmt: skip
    """Second moments of the inputs of a block's layers, tokens counted by their importance in that block.

    Args:
        model: in evaluation mode; it runs on every batch until the block has ended, twice.
        block: its path.
        layers: paths of the layers inside it.
        batches: ids (N, T), or the arguments of the model as a mapping or a sequence; ids are its first tensor.
        token_weight: what importance is, or a function of what enters the block (N, T, d) that gives it (N, T).
        r_min, r_max: range of the weights.
        power: p.
        first: see `token_importance`.

    Raises:
        BadInput: no batch, one token, inputs of another form, or no attention in the block.
    """
    if not batches:
        raise BadInput("rsq: no calibration data: give batches of ids")
    counts = _counts(batches) if token_weight == "frequency" else None
    found: dict[str, Hessian] = {}
    for batch in batches:
        x, y, c = _seen(model, block, batch, attention=token_weight == "attention")
        if x.ndim != 3 or x.shape[1] < 2:
            raise BadInput(
                f"{block}: inputs of shape {tuple(x.shape)}: rsq needs sequences (N, T, d) of two tokens or more"
            )
        check_finite(x, f"inputs of {block}")
        if callable(token_weight):
            c = token_weight(x)
        elif token_weight == "frequency":
            assert counts is not None
            c = -counts[_ids(batch)].float()
        elif token_weight == "attention":
            if c is None or c.shape != x.shape[:2]:
                raise BadInput(f"{block}: no attention over its tokens was seen: take token_weight='norm'")
        else:
            c = token_importance(token_weight, x, y=y, first=first)
        r = token_weights(c, r_min, r_max)
        plain = token_weight == "uniform"

        def note(module: nn.Module, args: tuple, *, path: str, r: Tensor = r, plain: bool = plain) -> None:
            given = args[0]
            whole = given.ndim == 3 and given.shape[:2] == r.shape
            if not whole and not plain and given.shape[:-1].numel() != r.numel():
                raise BadInput(f"{path}: its inputs {tuple(given.shape)} are not the block's tokens {tuple(r.shape)}")
            rows = given if whole else given.reshape(*r.shape, -1) if given.shape[:-1].numel() == r.numel() else given
            hessian = found.setdefault(path, Hessian(given.shape[-1], device=given.device))
            weighted_hessian(hessian, rows, None if plain else r, power)

        with _watching({path: model.get_submodule(path) for path in layers}, note):
            capture(model, partial(run_batch, model, batch), [block], last=block)
    return found


@contextmanager
def _watching(modules: Mapping[str, nn.Module], note: Callable[..., None]) -> Iterator[None]:
    """`note` sees what each module reads, after whatever turns its input."""
    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: note(m, args, path=path))
        for path, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seen(model: nn.Module, block: str, batch: Batch, *, attention: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What enters and leaves a block, and c of its attention."""
    mode, kept = _Attention(), []
    module = model.get_submodule(block)

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append(first_tensor((args, kwargs)).detach())
        if attention:
            mode.__enter__()

    def leave(_: nn.Module, args: tuple, output: Any) -> None:
        if attention:
            mode.__exit__(None, None, None)
        kept.append(first_tensor(output).detach())
        raise Stop

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave, prepend=False),
    ]  # fmt: skip
    try:
        run_batch(model, batch)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(kept) != 2:
        raise BadInput(f"{block} was not reached: it is no block of this model's forward")
    return kept[0], kept[1], mode.found


def _ids(batch: Batch) -> Tensor:
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return batch["input_ids"]
    return first_tensor(batch)


def _counts(batches: Sequence[Batch]) -> Tensor:
    ids = torch.cat([_ids(batch).reshape(-1) for batch in batches])
    if ids.is_floating_point():
        raise BadInput("rsq: token_weight='frequency' needs ids, and the batches hold floats")
    return torch.bincount(ids)


class RSQ(GPTQ):
    """The pass: as `GPTQ`, from second moments that `weighted_hessians` gathers. All options are those of `GPTQ`."""

    id: ClassVar = "rsq"
    ops: ClassVar = ("linear",)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Codes and scales of the parameter at `path`, from `ctx.hessians` of its module."""
        record = super().solve(path, decision, ctx)
        record.data["method"] = self.id
        return record


@dataclass(frozen=True)
class Quantized:
    """What was done to a model.

    Attributes:
        records: the rotation's and the weights', for an artifact.
        left: path of what stays float -> why.
        blocks: paths of the blocks, in order.
    """

    records: tuple[Record, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()


def rsq(
    model: nn.Module, batches: Sequence[Batch], scheme: Scheme | str | None = None, *,
    token_weight: Importance | Callable[[Tensor], Tensor] = "attention", r_min: float = 0.005, r_max: float = 1.0,
    power: float = 1.0, first: int | None = None, rotated: bool = True, damp: float = 0.01, act_order: bool = False,
    seed: int = 0,
) -> Quantized:  # fmt: skip
    """Rotate a model and round the linear layers of its blocks, in place.

    Args:
        model: a language model in evaluation mode.
        batches: calibration data, see `weighted_hessians`.
        scheme: of the weights; by default 3 bits, a scale for each row, chosen by a search.
        token_weight, r_min, r_max, power, first: see `weighted_hessians`.
        rotated: whether to rotate first.
        damp, act_order: see `GPTQ`.
        seed: of the rotation.

    Raises:
        BadInput: no data, no chain of blocks, an unknown importance, or nothing to round.
    """
    if not callable(token_weight) and token_weight not in IMPORTANCES:
        raise BadInput(f"rsq: token_weight={token_weight!r}: one of {', '.join(IMPORTANCES)}, or a function")
    if not batches:
        raise BadInput("rsq: no calibration data: give batches of ids")
    token_weights(torch.zeros(1), r_min, r_max)
    chosen = Scheme(Int(3), Scale("channel", rule="mse")) if scheme is None else scheme
    example = example_of(batches[0])
    records: list[Record] = []
    if rotated:
        records += rotate(model, example, seed=seed).records
    structure = Structure.build(model, example)
    if not structure.blocks:
        raise BadInput(f"{type(model).__name__} has no chain of blocks that rsq could go through")
    one = RSQ(chosen, damp=damp, act_order=act_order)
    decision = one.plan(structure, model)
    left = dict(decision.skipped)
    inside = tuple(f"{block}." for block in structure.blocks)
    left |= {name: "it lies outside the blocks" for name in decision.units if not name.startswith(inside)}
    for block in structure.blocks:
        names = {n: n.rpartition(".")[0] for n in decision.units if n.startswith(f"{block}.")}
        hessians = weighted_hessians(
            model, block, list(names.values()), batches, token_weight=token_weight, r_min=r_min, r_max=r_max,
            power=power, first=first,
        )  # fmt: skip
        ctx = Context(model, structure, hessians=hessians, seed=seed)
        for name, layer in names.items():
            if layer not in hessians:
                left[name] = f"{layer} is not called, what reads its weight does so by itself"
                continue
            record = one.solve(name, decision, ctx)
            one.apply(model, record)
            records.append(record)
    if not any(record.action == "pack" for record in records):
        raise BadInput(f"nothing in the blocks of {type(model).__name__} can be rounded")
    return Quantized(tuple(records), left, structure.blocks)


CARD = Card(
    id="rsq",
    title="RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
    authors="Sung, Yadav, Li, Yoon, Bansal",
    year=2025,
    source="arXiv 2503.01820",
    family="quant",
    summary="Rounds a rotated model by GPTQ, with a Hessian that counts tokens by how much attention they get.",
    objects={"RSQ": "Pass"},
    use="Weights of language models at 3 bits and below, where calibration data are like those of later use.",
    avoid="At 4 bits and above, where plain gptq is as good; models without attention.",
    composes=("rotate", "scale_tuning"),
    vectors=("rsq",),
    code="ylsung/rsq, Apache-2.0",
    claim={
        "text": "At 2 bits, counting tokens by the attention that they get loses less of a rotated language model than "
        "counting all alike.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.01,
        "arms": ("uniform", "attention"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
