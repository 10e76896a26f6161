"""`rotate`: turns a model's activations by orthogonal matrices, which changes nothing but spreads outliers evenly.

A vector x with one large entry among n has, after a rotation by a Hadamard matrix, entries of about |x| / sqrt(n) each:
a range that few bits cover. Three places of a transformer can be turned so that it computes the same:

    stream    writers write x Q, and each norm reads it: RMS(x Q) = RMS(x). Gains are folded into readers before,
              W <- W diag(g) Q; LayerNorms become RMS norms, their means taken out of the writers
    values    v <- v H_D in each head of D channels, and the output layer W_o <- W_o H_D head by head: no cost
              with `heads` in addition across heads, online: W_o <- W_o (H (x) I_D), its input is turned as it comes
    ffn       W_down <- W_down H, online on the input of the last layer of each perceptron: n log n additions

Q = diag(+-1) H / sqrt(d), or a random orthogonal matrix, or one that is given (KLT:
`laconic.core.rotation.klt_rotation`). Where a width has no Hadamard matrix, Q is made of the largest blocks that have.

Source: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi,
Alistarh, Hoefler, Hensman, 2024, arXiv 2404.00456. Official code: spcl/QuaRot, Apache-2.0. We differ from it: which
layers write and read a stream is seen from a trace of the model; the mean of the embeddings is taken out only where a
LayerNorm follows (official does so for RMSNorm too, which changes the function); keys and queries are not turned; the
Hadamard across heads is an option.

A head that is tied to the embeddings absorbs a gain that the embeddings do not, so the two are untied, which costs
bytes. Use it before weights and activations, or a cache, are rounded to 4 bits and below, and before calibration.
Weights alone at 8 bits gain nothing. What is turned online hangs on the layers as hooks, which an artifact of laconic
keeps and `save_pretrained` loses: with `heads` and `ffn` off nothing is left online. Streams between norms and sums
(Post-LN, Gemma's second norms) cannot be turned and stay.

Example:
    >>> import torch
    >>> from torch import nn
    >>> class Perceptron(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table, self.norm, self.head = nn.Embedding(9, 12), nn.RMSNorm(12), nn.Linear(12, 9)
    ...     def forward(self, ids):
    ...         return self.head(self.norm(self.table(ids)))
    >>> model, ids = Perceptron().eval(), torch.arange(9)[None]
    >>> before = model(ids)
    >>> rotate(model, ((ids,), {}))
    Rotated(streams=1, values=0, inputs=0)
    >>> torch.allclose(model(ids), before, atol=1e-5)
    True
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import Record, apply_records
from laconic.core.rotation import (
    Kind,
    input_refusal,
    rotation,
    solve_input,
    solve_stream,
    solve_values,
    stream_refusal,
    ties_in_the_way,
    untie,
    values_refusal,
)
from laconic.core.structure import Example, Structure
from laconic.errors import BadInput
from laconic.numerics import hadamard_block


class Rotate:
    """The pass: residual streams, values of attention, and inputs of perceptrons' last layers.

    Args:
        kind: "hadamard", "orthogonal", or a matrix Q (d, d), of streams.
        stream: whether streams are turned.
        value: whether values are.
        heads: whether inputs of attentions' output layers are turned across heads, online.
        ffn: whether inputs of other layers that write to a stream are turned, online.

    Raises:
        BadInput: another kind.
    """

    id: ClassVar = "rotate"
    stage: ClassVar = "rewrite"
    scope: ClassVar = "model"
    needs: ClassVar = frozenset({"float"})

    def __init__(
        self, kind: Kind | Tensor = "hadamard", *, stream: bool = True, value: bool = True, heads: bool = False,
        ffn: bool = True,
    ):  # fmt: skip
        if not isinstance(kind, Tensor) and kind not in ("hadamard", "orthogonal"):
            raise BadInput(f"rotate: kind={kind!r}: 'hadamard', 'orthogonal' or a matrix")
        self.kind, self.stream, self.value, self.heads, self.ffn = kind, stream, value, heads, ffn

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """First norm of each stream, value layer, or layer whose input is turned -> what is done; path -> why not."""
        units: dict[str, dict[str, Any]] = {}
        skipped: dict[str, str] = {}
        if self.stream:
            for residual in structure.residuals:
                reason = stream_refusal(structure, model, residual)
                if reason:
                    skipped |= dict.fromkeys(residual.norms, reason)
                else:
                    units[next(iter(residual.norms))] = {"what": "stream", "norms": list(residual.norms)}
        heads = {mixer.output: mixer for mixer in structure.mixers}
        if self.value:
            for mixer in structure.mixers:
                reason = values_refusal(structure, model, mixer)
                if reason:
                    skipped[mixer.value] = reason
                else:
                    units[mixer.value] = {"what": "values", "output": mixer.output}
        for path in self._last_layers(structure, model):
            wanted, stride = (self.heads, heads[path].width) if path in heads else (self.ffn, 1)
            reason = input_refusal(structure, model, path) if wanted else ""
            module: Any = model.get_submodule(path)
            size = hadamard_block(_inputs(module) // stride) if wanted and not reason else 0
            if reason:
                skipped[path] = reason
            elif size > 1:
                units[path] = {"what": "input", "size": size, "stride": stride}
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """New weights of what is turned together."""
        said, structure, model = decision.units[path], ctx.structure, ctx.model
        if said["what"] == "stream":
            residual = next(one for one in structure.residuals if path in one.norms)
            generator = torch.Generator().manual_seed(ctx.seed)
            q = self.kind if isinstance(self.kind, Tensor) else rotation(residual.width, self.kind, generator)
            return solve_stream(structure, model, residual, q, method=self.id)
        if said["what"] == "values":
            mixer = next(one for one in structure.mixers if one.value == path)
            return solve_values(structure, model, mixer, method=self.id)
        return solve_input(structure, model, path, size=said["size"], stride=said["stride"], method=self.id)

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the new weights, and let layers turn their inputs."""
        apply_records(model, [record])

    @staticmethod
    def _last_layers(structure: Structure, model: nn.Module) -> Iterator[str]:
        """Layers that write to a stream by a matrix of their own."""
        seen = set()
        for residual in structure.residuals:
            for writer in residual.writers:
                module: Any = model.get_submodule(writer.module)
                linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
                if linear and writer.name == f"{writer.module}.weight" and writer.module not in seen:
                    seen.add(writer.module)
                    yield writer.module


def _inputs(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])


@dataclass(frozen=True, repr=False)
class Rotated:
    """What was turned.

    Attributes:
        units: path -> "stream", "values" or "input".
        left: path of what stays as it is -> why.
        untied: names of parameters that were tied and are their own now.
        records: the changes, for an artifact.
    """

    units: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()

    def __repr__(self) -> str:
        kinds = list(self.units.values())
        return (
            f"Rotated(streams={kinds.count('stream')}, values={kinds.count('values')}, inputs={kinds.count('input')})"
        )


def rotate(
    model: nn.Module, example: Example, kind: Kind | Tensor = "hadamard", *, stream: bool = True, value: bool = True,
    heads: bool = False, ffn: bool = True, seed: int = 0,
) -> Rotated:  # fmt: skip
    """Turn what can be turned, in place; the model computes the same up to rounding.

    Args:
        model: in evaluation mode; what is tied to a writer or a reader of a stream is untied.
        example: (args, kwargs) of one forward call.
        kind, stream, value, heads, ffn: see `Rotate`.
        seed: of signs and matrices.

    Raises:
        BadInput: nothing can be turned (the message says why), or the matrix is not orthogonal.
    """
    one = Rotate(kind, stream=stream, value=value, heads=heads, ffn=ffn)
    structure = Structure.build(model, example)
    untied: list[Record] = []
    if stream:
        untied = [untie(name, others) for name, others in ties_in_the_way(structure).items()]
        if untied:
            apply_records(model, untied)
            structure = Structure.build(model, example)
    decision = one.plan(structure, model)
    if not decision.units:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(decision.skipped.items())[:3])
        raise BadInput(
            f"nothing in {type(model).__name__} can be rotated: {reasons or 'it has no stream that norms read'}"
        )
    records = list(untied)
    ctx = Context(model, structure, seed=seed)
    for path in decision.units:
        record = one.solve(path, decision, ctx)
        one.apply(model, record)
        records.append(record)
    names = tuple(name for record in untied for name in record.data["untie"])
    return Rotated({p: said["what"] for p, said in decision.units.items()}, decision.skipped, names, tuple(records))


CARD = Card(
    id="rotate",
    title="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
    authors="Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman",
    year=2024,
    source="arXiv 2404.00456",
    family="quant",
    summary="Turns residual streams, values and inputs by Hadamard matrices, exactly, to spread outliers evenly.",
    objects={"Rotate": "Pass"},
    traits={"Rotate": ("exact",)},
    use="Before weights and activations, or a cache, are rounded to 4 bits and below.",
    avoid="For weights alone at 8 bits, and where the untied head's bytes or the online transforms cost too much.",
    composes=("gptq", "rsq", "rtn"),
    vectors=("hadamard",),
    code="spcl/QuaRot, Apache-2.0",
    claim={
        "text": "Where a few channels are large, rounding weights and inputs to 4 bits loses less of a language model "
        "after its activations were rotated.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("plain", "rotated"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
