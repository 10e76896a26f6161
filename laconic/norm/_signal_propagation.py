"""`signal_propagation`: how the residual stream grows with depth, and how the gradient comes back through it.

For the stream x_l (positions, d) behind block l, over all examples and positions, l = 0 before the first block:

    variance               mean_c Var x_l[:, c]
    squared mean           mean_c (mean x_l[:, c])^2
    branch over stream     rms F(x) / rms x at a sum x + F(x); the mean over the sums of a block
    gradient               root of mean_i |d loss_i / d x_l|^2            over examples i
    weight gradient        |d mean_i loss_i / d theta_l|                  theta_l: the parameters of block l

Without norms the variance of a residual network doubles with every block; in Pre-LN it grows up to exponentially at first
weights, and deep branches, small against it, change little; Post-LN keeps it and loses the gradient; Peri-LN and scaled
branches grow linearly. A squared mean that outgrows the variance is what normalization by weights has to prevent.

The loss is the cross-entropy where the data have classes or next tokens. Elsewhere it is <y, v> / sqrt(numel y) with a
normal v, whose gradient has the length of the Jacobian's rows. Blocks are found by running the model
(`laconic.core.depth`): every module of a list that adds to what it reads.

Source: the plots of "Characterizing signal propagation to close the performance gap in unnormalized ResNets", Brock, De,
Smith, 2021, arXiv 2101.08692; over depth in transformers as in "The Curse of Depth in Large Language Models" (arXiv
2502.05795), "Mix-LN" (2412.13795) and "Peri-LN" (2502.02732). They average over a batch; this over all batches. Where the
branch ends in a scalar that starts at zero (SkipInit), its first plot shows no branch at all.

Example:
    >>> import torch
    >>> from laconic.core.depth import Batch
    >>> from laconic.norm import SignalPropagation
    >>> from laconic.zoo import LlamaLM, LlamaLMConfig
    >>> model = LlamaLM(LlamaLMConfig(vocabulary=50, width=32, layers=3))
    >>> tokens = torch.randint(50, (4, 16))
    >>> finding = SignalPropagation()(model, [Batch((tokens,))])
    >>> [row["block"] for row in finding.table]
    ['input', 'layers.0', 'layers.1', 'layers.2']
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.depth import Batch, Block, Moments, Visit, blocks_of, losses, rows, watched
from laconic.core.figure import chart
from laconic.core.modes import evaluating
from laconic.core.outputs import main_output
from laconic.errors import BadInput

__all__ = ["PropagationFinding", "SignalPropagation"]

INPUT = "input"
PLOTTED = ("variance", "squared_mean", "branch_over_stream", "gradient", "weight_gradient")


@dataclass(frozen=True)
class PropagationFinding:
    """What was found.

    Attributes:
        table: rows of depth, block, variance, squared_mean, branch_over_stream, gradient, weight_gradient; the first is
            what the first block reads. None where there is no such thing.
        cost: forward and backward passes, examples, seconds.
        notes: what the gradients are of.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def plot(self) -> str:
        """Every column over depth, on a logarithmic axis, in SVG."""
        series = {
            name.replace("_", " "): [(row["depth"], math.log10(row[name])) for row in self.table if row[name]]
            for name in PLOTTED
        }
        kept = {name: points for name, points in series.items() if points}
        return chart(kept, "signal propagation", "depth, blocks", "log10")


class SignalPropagation:
    """The probe: moments of the residual stream, branches and gradients, block by block.

    Args:
        blocks: a pattern of the blocks' paths, see `laconic.core.depth.blocks_of`; found by default.
        gradients: run backwards, too; False for a model without derivatives, and in half the time.
        seed: of v.
    """

    reads = "batches"

    def __init__(self, blocks: str | None = None, gradients: bool = True, seed: int = 0):
        self.blocks, self.gradients, self.seed = blocks, gradients, seed

    def __call__(self, model: nn.Module, data: Sequence[Batch]) -> PropagationFinding:
        """What it finds.

        Args:
            model: runs in evaluation mode.
            data: batches.

        Raises:
            BadInput: there is no batch, no residual block, or a stream that is not finite.
        """
        began = time.perf_counter()
        if not data:
            raise BadInput("signal_propagation: there is no example to look at")
        with evaluating(model):
            blocks = blocks_of(model, data[0], self.blocks)
            seen = _Seen(model, blocks)
            for batch in data:
                self._look(model, batch, seen)
        cost = {
            "forward passes": 1 + len(data), "backward passes": len(data) * self.gradients, "examples": seen.examples,
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
        return PropagationFinding(seen.table(self.gradients), cost, self._notes(data))

    def _look(self, model: nn.Module, batch: Batch, seen: _Seen) -> None:
        """One batch, forwards and backwards."""
        streams: list[Tensor] = []

        def visit(found: Visit) -> None:
            if not streams:
                streams.append(found.before)
            streams.append(found.after)
            seen.forward(found, batch.mask)

        paths = [block.path for block in seen.blocks]
        with torch.set_grad_enabled(self.gradients):
            with watched(model, paths, visit, mask=batch.mask, gradients=self.gradients):
                output = main_output(model(*batch.args, **batch.kwargs))
            seen.examples += batch.examples
            if self.gradients:
                seen.backward(self._loss(output, batch.target), streams)

    def _notes(self, data: Sequence[Batch]) -> tuple[str, ...]:
        if not self.gradients:
            return ()
        if data[0].target is not None:
            return ("gradients are of the cross-entropy of an example",)
        return ("gradients are of a random projection of the output: the data have neither classes nor next tokens",)

    def _loss(self, output: Tensor, target: Tensor | None) -> Tensor:
        """The sum over examples."""
        if target is not None:
            return losses(output, target).sum()
        v = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(output)
        return (output * v).sum() / math.sqrt(max(v.numel(), 1))


class _Seen:
    """What has been seen of every block so far.

    Attributes:
        blocks: of the model.
        examples: how many.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self.blocks, self.examples = blocks, 0
        self._place = {block.path: number for number, block in enumerate(blocks, 1)}
        self._moments = [Moments() for _ in range(len(blocks) + 1)]
        self._sums: list[list[tuple[float, float]]] = [[] for _ in self._moments]
        self._squares = [0.0] * len(self._moments)  # sums over examples of |d loss_i / d x_l|^2
        self._parameters = [
            [p for p in model.get_submodule(block.path).parameters() if p.requires_grad] for block in blocks
        ]
        self._gradients: list[list[Tensor | None]] = [[None] * len(own) for own in self._parameters]

    def forward(self, found: Visit, mask: Tensor | None) -> None:
        """A block's call."""
        number = self._place[found.path]
        axis = self.blocks[number - 1].channels
        if number == 1:
            self._moments[0].add(rows(found.before, axis, mask))
        self._moments[number].add(rows(found.after, axis, mask))
        old = self._sums[number] or [(0.0, 0.0)] * len(found.sums)
        self._sums[number] = [(a + c, b + d) for (a, b), (c, d) in zip(old, found.sums, strict=True)]

    def backward(self, loss: Tensor, streams: Sequence[Tensor]) -> None:
        """The gradients of a batch's summed loss, at every depth."""
        parameters = [p for own in self._parameters for p in own]
        found = torch.autograd.grad(loss, [*streams, *parameters], allow_unused=True)
        for number, gradient in enumerate(found[: len(streams)]):
            if gradient is not None:
                self._squares[number] += float(gradient.double().square().sum())
        rest = iter(found[len(streams) :])
        for own in self._gradients:
            for number, gradient in zip(range(len(own)), rest, strict=False):
                if gradient is not None:
                    held = own[number]
                    own[number] = gradient if held is None else held + gradient

    def table(self, gradients: bool) -> list[dict[str, Any]]:
        """A row for every depth.

        Raises:
            BadInput: a stream that is not finite.
        """
        made = []
        for depth, moments in enumerate(self._moments):
            block = INPUT if depth == 0 else self.blocks[depth - 1].path
            if not math.isfinite(moments.variance + moments.squared_mean):
                raise BadInput(f"signal_propagation: the stream behind {block} is not finite")
            sums = [math.sqrt(branch / stream) for stream, branch in self._sums[depth] if stream]
            own = [g.double().square().sum() for g in (self._gradients[depth - 1] if depth else ()) if g is not None]
            made.append({
                "depth": depth, "block": block, "variance": moments.variance, "squared_mean": moments.squared_mean,
                "branch_over_stream": sum(sums) / len(sums) if sums else None,
                "gradient": math.sqrt(self._squares[depth] / self.examples) if gradients else None,
                "weight_gradient": float(torch.stack(own).sum().sqrt()) / self.examples if own else None,
            })  # fmt: skip
        return made


CARD = Card(
    id="signal_propagation",
    title="Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    authors="Brock, De, Smith",
    year=2021,
    source="arXiv 2101.08692, the plots; their forms over depth in arXiv 2502.05795, 2412.13795 and 2502.02732",
    family="norm",
    summary="Variance, squared mean, branch and gradient of the residual stream, block by block, in any residual network.",
    objects={"SignalPropagation": "Probe"},
    use="To choose where norms stand and how branches are scaled, before training and after, and to find the block where a "
    "stream explodes.",
    avoid="As a measure of what a block contributes to the answer: that is depth_usefulness.",
    composes=("depth_usefulness", "lns", "mix_ln", "peri_ln", "residual_expansion"),
)
