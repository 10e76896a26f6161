"""`pre_rmsnorm`: a Pre-LN transformer with RMSNorm, or CRMSNorm, in the place of LayerNorm; it computes the same.

All that a Pre-LN block reads of its stream x (..., d) is LN(x), which does not see the mean of x. So that mean may be taken
away where it is written: for every table of embeddings, position, linear layer or convolution that writes to the stream,

    W <- W - mean of W over its outputs        b <- b - mean of b            C = I - 11^T / d at the left of all writers

Then the stream has mean zero, and LN(x) = g x / sqrt(mean(x^2) + eps) + b with the same eps: RMSNorm. Gain and bias go into
the layers that read the norm, W' = W diag(g), b' = b + W beta, where these alone read it (all readers of one norm, or none).
A vector of mean zero has d - 1 free entries, x_d = -sum_{i<d} x_i; CRMSNorm is RMSNorm of these (x (..., d - 1) now):

    y = x / sqrt((sum_i x_i^2 + (sum_i x_i)^2) / d + eps)       writers lose their last output, readers W_i <- W_i - W_d

Source: "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers", Jiang, Gu, Zhu, Pan,
2023, arXiv 2305.14858. Official code: ZixuanJiang/pre-rmsnorm-transformer, MIT. We differ in that weights are folded in
float64, that what writes and reads is seen from the model and not stated, and that a norm whose output the model returns
keeps its gain.

Exact up to rounding in evaluation mode, and in training with `train=True`, which centres the writers anew at each use
(`ZeroMeanOutput`); dropout behind a writer disturbs the mean in training. A head that is tied to the embeddings becomes a
parameter of its own, which costs its bytes. Norms behind the sum (Post-LN: BERT) read what another norm gives, whose mean no
writer can take away: they are left alone, with the reason; `laconic normalize --to rmsnorm` swaps those and trains a little.
d - 1 is odd where d is even, and products of odd sizes may be slower: measure before you take CRMSNorm. Models that have
RMSNorm already (Llama) are left as they are but for gains: `fold_gains`.

Example:
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    >>> model = GPT2LMHeadModel(config).eval()
    >>> ids = torch.arange(8)[None]
    >>> before = model(ids).logits
    >>> to_pre_rmsnorm(model)
    5 norms are rms; lm_head.weight is a parameter of its own now
    >>> model.transformer.ln_f, torch.allclose(model(ids).logits, before, atol=1e-6)
    (StreamNorm(16, eps=1e-05, affine=False), True)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import Record, apply_records
from laconic.core.renorm import fold_gain, foldable, refusal, solve, ties_in_the_way
from laconic.core.renorm import untie as untie_record
from laconic.core.statistics import widened
from laconic.core.structure import Example, Stream, Structure
from laconic.errors import BadInput
from laconic.nn.stream_norm import StreamNorm, short_rms_norm

__all__ = [
    "CRMSNorm", "Converted", "PreRMSNorm", "ZeroMeanOutput", "crms_norm", "example_of", "fold_gains", "to_pre_crmsnorm",
    "to_pre_rmsnorm", "untie", "zero_mean",
]  # fmt: skip

crms_norm = short_rms_norm


class CRMSNorm(StreamNorm):
    """RMSNorm of d values that sum to zero, given the first d - 1: (..., d - 1) -> (..., d - 1).

    Args:
        d_minus_1: how many are given.
        eps: added to the mean square over all d.

    Raises:
        ValueError: none is given.
    """

    def __init__(self, d_minus_1: int, eps: float = 1e-5):
        if d_minus_1 < 1:
            raise ValueError(f"pre_rmsnorm: CRMSNorm of {d_minus_1} values: give 1 or more")
        super().__init__(d_minus_1 + 1, eps, short=True)


def zero_mean(weight: Tensor, axis: int = 0) -> Tensor:
    """W minus its mean over the axis of its outputs; float16 and bfloat16 are computed in float32."""
    wide = widened(weight)
    return (wide - wide.mean(axis, keepdim=True)).to(weight.dtype)


class ZeroMeanOutput(nn.Module):
    """The parametrization, for `torch.nn.utils.parametrize`: whatever the layer reads, what it writes sums to zero.

    Args:
        axis: of the weight's outputs: 0 in `nn.Linear` and in biases, 1 in `nn.Embedding`.
    """

    def __init__(self, axis: int = 0):
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        return zero_mean(weight, self.axis)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Itself: a weight of mean zero stays what it is."""
        return weight

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class PreRMSNorm:
    """The pass: streams that layer norms read get mean zero, and the norms get simpler.

    Args:
        to: "rms", or "crms" for a stream of d - 1 channels.

    Raises:
        BadInput: `to` is something else.
    """

    id: ClassVar = "pre_rmsnorm"
    stage: ClassVar = "fold"
    scope: ClassVar = "model"
    needs: ClassVar = frozenset({"float"})

    def __init__(self, to: str = "rms"):
        if to not in ("rms", "crms"):
            raise BadInput(f"pre_rmsnorm: norms become 'rms' or 'crms', not {to!r}")
        self.to = to

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """First norm of each stream -> its norms; norm -> why it stays."""
        units: dict[str, dict[str, Any]] = {}
        skipped: dict[str, str] = {}
        for stream in structure.streams:
            reason = refusal(structure, model, stream) or _in_the_way(model, stream)
            if reason:
                skipped |= dict.fromkeys(stream.norms, reason)
            else:
                units[stream.norms[0]] = {"to": self.to, "norms": list(stream.norms)}
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """New weights of all writers and readers of the stream whose first norm is at `path`."""
        norms = tuple(decision.units[path]["norms"])
        stream = next(stream for stream in ctx.structure.streams if stream.norms == norms)
        return solve(ctx.structure, ctx.model, stream, self.to, method=self.id)

    def apply(self, model: nn.Module, record: Record) -> None:
        """Replace the norms and give all these weights."""
        apply_records(model, [record])


@dataclass(frozen=True, repr=False)
class Converted:
    """What a conversion did.

    Attributes:
        norms: path of each norm that was changed -> what it is now.
        left: path of each norm that stays -> why.
        untied: names of parameters that were tied and are their own now.
        records: the changes, for an artifact.
    """

    norms: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()

    def __repr__(self) -> str:
        kinds = sorted(set(self.norms.values()))
        parts = [f"{list(self.norms.values()).count(kind)} norms are {kind}" for kind in kinds] or [
            "nothing was changed"
        ]
        if self.untied:
            parts.append(f"{', '.join(self.untied)} is a parameter of its own now")
        parts += [f"left {path}: {reason}" for path, reason in self.left.items()]
        return "; ".join(parts)


def to_pre_rmsnorm(model: nn.Module, example: Example | None = None, *, train: bool = False) -> Converted:
    """Turn every LayerNorm that reads a stream of its own into RMSNorm, in place; the model computes the same.

    Args:
        model: in evaluation mode; what is tied to a writer is untied.
        example: (args, kwargs) of one forward call; models of transformers bring one of their own.
        train: centre the writers at each use, so that training on keeps the equality.

    Raises:
        BadInput: nothing can be converted (the message says why), widths do not match, or an example is needed.
    """
    return _convert(model, PreRMSNorm("rms"), example, train)


def to_pre_crmsnorm(model: nn.Module, example: Example | None = None) -> Converted:
    """The same with a stream of d - 1 channels and CRMSNorm.

    Raises:
        BadInput: as `to_pre_rmsnorm`.
    """
    return _convert(model, PreRMSNorm("crms"), example, False)


def _convert(model: nn.Module, one: PreRMSNorm, example: Example | None, train: bool) -> Converted:
    given = example_of(model) if example is None else example
    structure = Structure.build(model, given)
    untied = untie(model, structure)
    if untied:
        structure = Structure.build(model, given)
    decision = one.plan(structure, model)
    if not decision.units:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(decision.skipped.items())[:3])
        raise BadInput(
            f"no norm of {type(model).__name__} can become {one.to} without changing what it computes: "
            f"{reasons or 'it has no layer norm (Llama has RMSNorm: fold_gains folds its gains)'}"
        )
    ctx = Context(model, structure)
    records = list(untied)
    for path in decision.units:
        record = one.solve(path, decision, ctx)
        one.apply(model, record)
        records.append(record)
    if train:
        _centre_always(model, structure, decision)
    changed = {path: one.to for unit in decision.units.values() for path in unit["norms"]}
    names = tuple(name for record in untied for name in record.data["untie"])
    return Converted(changed, decision.skipped, names, tuple(records))


def _centre_always(model: nn.Module, structure: Structure, decision: Decision) -> None:
    taken = [tuple(unit["norms"]) for unit in decision.units.values()]
    for stream in structure.streams:
        for writer in stream.writers if stream.norms in taken else ():
            path, _, attribute = writer.name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(path), attribute, ZeroMeanOutput(writer.axis))


def untie(model: nn.Module, structure: Structure | None = None) -> list[Record]:
    """Give every parameter that is tied to a writer of a stream values of its own, in place.

    Args:
        model: the model.
        structure: of it; worked out on the model's own example by default.

    Returns:
        A record for each; none where nothing is tied.
    """
    structure = Structure.build(model, example_of(model)) if structure is None else structure
    records = [untie_record(name, others) for name, others in ties_in_the_way(structure).items()]
    apply_records(model, records)
    return records


def fold_gains(model: nn.Module, example: Example | None = None) -> Converted:
    """Fold gain and bias of every norm, LayerNorm or RMSNorm, into the layers that read it, in place.

    Each norm keeps its class with gain 1 and bias 0 (where it stores the gain less one, as Gemma does, 0), so that the
    model is saved and loaded as ever. Norms that other things read, a tied head for one, are left alone.

    Raises:
        BadInput: a reader takes another number of channels than its norm gives.
    """
    structure = Structure.build(model, example_of(model) if example is None else example)
    left: dict[str, str] = {}
    records = []
    for path in structure.norms:
        reason = foldable(structure, model, path)
        norm: Any = model.get_submodule(path)
        if not reason and getattr(norm, "bias", None) is not None:
            bare = [m for m in structure.norms[path].modules if getattr(model.get_submodule(m), "bias", None) is None]
            if bare:
                reason = f"{bare[0]}, which reads it, has no place for its bias"
        if not reason and (parametrize.is_parametrized(norm) or getattr(norm, "weight", None) is None):
            reason = "its gain is not a parameter called weight"
        if reason:
            left[path] = reason
            continue
        record = fold_gain(structure, model, path, method="pre_rmsnorm")
        apply_records(model, [record])
        records.append(record)
    return Converted({record.path: "without gain" for record in records}, left, (), tuple(records))


def example_of(model: Any) -> Example:
    """A forward call of a model of transformers.

    Raises:
        BadInput: it is none of transformers'.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None and getattr(model, "main_input_name", "") == "pixel_values":
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next(model.parameters()).dtype
        return (), {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=dtype)}
    if getattr(config, "vocab_size", None):
        return (), {
            "input_ids": torch.zeros(1, min(4, getattr(config, "max_position_embeddings", 4)), dtype=torch.long)
        }
    raise BadInput(f"{type(model).__name__} brings no example of a call: pass example=(args, kwargs)")


def _in_the_way(model: nn.Module, stream: Stream) -> str:
    """What computes weights or looks at values between the layers, "" where nothing does."""
    owners: Mapping[str, nn.Module] = {
        **{path: model.get_submodule(path) for path in stream.norms},
        **{w.name: model.get_submodule(w.name.rpartition(".")[0]) for w in stream.writers},
    }
    for name, module in owners.items():
        if parametrize.is_parametrized(module):
            return f"a parametrization computes {name}: remove it first (torch.nn.utils.parametrize)"
    return ""


CARD = Card(
    id="pre_rmsnorm",
    title="Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
    authors="Jiang, Gu, Zhu, Pan",
    year=2023,
    source="arXiv 2305.14858",
    family="norm",
    summary="Takes the mean out of the residual stream of a trained Pre-LN transformer, so that RMSNorm, or CRMSNorm on one "
    "channel less, computes what LayerNorm did.",
    objects={"CRMSNorm": "Layer", "PreRMSNorm": "Pass", "ZeroMeanOutput": "Weight"},
    traits={
        "CRMSNorm": ("gradient:exact", "batch_independent_eval"),
        "PreRMSNorm": ("exact",),
        "ZeroMeanOutput": ("gradient:exact", "right_inverse"),
    },
    use="Trained Pre-LN transformers (GPT-2, ViT), before they are quantized or served.",
    avoid="Post-LN transformers (BERT), and models that return their hidden states to a reader without a norm.",
    composes=("rmsnorm", "rtn", "gptq"),
    vectors=("rmsnorm",),
    code="github.com/ZixuanJiang/pre-rmsnorm-transformer, MIT",
    claim={
        "text": "With RMSNorm in the place of LayerNorm, exactly converted, a Pre-LN transformer takes 1 % to 10 % less time: "
        "the natural logarithm of the processor time of a forward falls by more than 0.01.",
        "metric": "log of CPU seconds a forward",
        "direction": "lower",
        "margin": 0.01,
        "arms": ("layernorm", "rmsnorm"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
