"""`depth_usefulness`: what each block of a residual network contributes, and what is lost where it is left out.

For block l from stream x_{l-1} to x_l, and the model's outputs y, and y_l with block l left out (x_l = x_{l-1}):

    angle         mean over positions of arccos(<x_{l-1}, x_l> / |x_{l-1}| |x_l|) / pi, in [0, 1]
    change        |y_l - y| / |y|, over all examples
    loss rise     mean over examples of loss(y_l) - loss(y), in nats, with its standard error

A block whose angle, change and rise are all small does little for its cost: the deep half of a Pre-LN transformer is often
such. The rise is the measure that counts, and may be negative; angles need no loss and no second pass, and agree with it
often, not always: the last block of a language model turns little and matters much, or the other way round. The rises of
several blocks do not add up.

The loss is the cross-entropy where the data have classes or next tokens; elsewhere there is none, and `change` stands for
it. Blocks are found by running the model (`laconic.core.depth`); one that changes the shape cannot be left out. It costs a
forward pass over the data for each block.

Source: "The Curse of Depth in Large Language Models", Sun, Song, Li, Yin, Zheng, Liu, 2025, arXiv 2502.05795, which
removes layers and measures angles to show what norms do to depth; angular distance as in "The Unreasonable
Ineffectiveness of the Deeper Layers", Gromov and others, 2024, arXiv 2403.17887, there of the last token, here of all.

Example:
    >>> import torch
    >>> from laconic.core.depth import Batch
    >>> from laconic.norm import DepthUsefulness
    >>> from laconic.zoo import LlamaLM, LlamaLMConfig
    >>> model = LlamaLM(LlamaLMConfig(vocabulary=50, width=32, layers=3))
    >>> tokens = torch.randint(50, (4, 16))
    >>> finding = DepthUsefulness()(model, [Batch((tokens[:, :-1],), target=tokens[:, 1:])])
    >>> [row["block"] for row in finding.table]
    ['layers.0', 'layers.1', 'layers.2']
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
from laconic.core.depth import Batch, Block, Visit, blocks_of, losses, rows, watched
from laconic.core.figure import chart
from laconic.core.modes import evaluating
from laconic.core.outputs import main_output
from laconic.errors import BadInput

__all__ = ["DepthUsefulness", "UsefulnessFinding", "angular_distance"]

PLOTTED = ("angle", "change", "loss_rise")


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """arccos of the cosine between rows of (positions, d), over pi: (positions,); 1/2 where a row is zero."""
    # From the lengths of sum and difference of unit vectors: an arccos near 1 would cost half the digits.
    x, y = (nn.functional.normalize(rows, dim=-1) for rows in (x, y))
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / math.pi


@dataclass(frozen=True)
class UsefulnessFinding:
    """What was found.

    Attributes:
        table: rows of depth, block, angle, change, loss_rise, rise_error (its standard error). None where a block cannot
            be left out, where there is no loss, and where the outputs without it are not finite.
        cost: forward passes, examples, seconds.
        loss: of the whole model; None where there is none.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]
    loss: float | None

    @property
    def notes(self) -> tuple[str, ...]:
        """The loss of the whole model, or that there is none."""
        if self.loss is None:
            return ("there is no loss: the data have neither classes nor next tokens",)
        return (f"cross-entropy of the whole model: {self.loss:.4g} nats",)

    def plot(self) -> str:
        """Every column over depth, each as a share of its largest magnitude, in SVG."""
        series = {}
        for name in PLOTTED:
            points = [(row["depth"], row[name]) for row in self.table if row[name] is not None]
            most = max((abs(value) for _, value in points), default=0.0)
            if most:
                series[f"{name.replace('_', ' ')}, {most:.3g}"] = [(depth, value / most) for depth, value in points]
        return chart(series, "depth usefulness", "depth, blocks", "over the largest, which the legend gives")


class DepthUsefulness:
    """The probe: how far each block turns the stream, and what leaving it out costs.

    Args:
        blocks: a pattern of the blocks' paths, see `laconic.core.depth.blocks_of`; found by default.
        skip: leave blocks out one by one; False measures angles alone, in one pass.
    """

    reads = "batches"

    def __init__(self, blocks: str | None = None, skip: bool = True):
        self.blocks, self.skip = blocks, skip

    @torch.no_grad()
    def __call__(self, model: nn.Module, data: Sequence[Batch]) -> UsefulnessFinding:
        """What it finds.

        Args:
            model: runs in evaluation mode.
            data: batches.

        Raises:
            BadInput: there is no batch, no residual block, or an output that is not finite.
        """
        began = time.perf_counter()
        if not data:
            raise BadInput("depth_usefulness: there is no example to look at")
        with evaluating(model):
            blocks = blocks_of(model, data[0], self.blocks)
            turned = {block.path: _Mean() for block in blocks if block.keeps}
            left_out = {path: _LeftOut() for path in turned if self.skip}
            whole: list[Tensor] = []
            for batch in data:
                output = _output(model, batch, turned, {block.path: block for block in blocks})
                loss = None if batch.target is None else losses(output, batch.target).double()
                whole += [] if loss is None else [loss]
                for path, found in left_out.items():
                    found.add(output, loss, *_without(model, batch, path))
        table = [_row(depth, block, turned, left_out) for depth, block in enumerate(blocks, 1)]
        passes = 1 + len(data) * (1 + len(left_out))
        examples = sum(batch.examples for batch in data)
        cost = {"forward passes": passes, "examples": examples, "seconds": time.perf_counter() - began}
        return UsefulnessFinding(table, cost, float(torch.cat(whole).mean()) if whole else None)


class _Mean:
    """A mean over positions of all batches."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total, self.count = self.total + float(values.sum()), self.count + len(values)


class _LeftOut:
    """What leaving a block out has done so far."""

    def __init__(self) -> None:
        self.moved, self.length = 0.0, 0.0
        self.rises: list[Tensor] = []

    def add(self, output: Tensor, loss: Tensor | None, other: Tensor, other_loss: Tensor | None) -> None:
        """Outputs and losses of a batch, with the block and without."""
        self.moved += float((other - output).double().square().sum())
        self.length += float(output.double().square().sum())
        if loss is not None and other_loss is not None:
            self.rises.append(other_loss.double() - loss)


def _output(model: nn.Module, batch: Batch, turned: Mapping[str, _Mean], blocks: Mapping[str, Block]) -> Tensor:
    """The model's output; notes the angles of all blocks."""

    def visit(found: Visit) -> None:
        axis = blocks[found.path].channels
        before, after = (rows(x, axis, batch.mask) for x in (found.before, found.after))
        turned[found.path].add(angular_distance(before, after))

    with watched(model, list(turned), visit, mask=batch.mask):
        output = main_output(model(*batch.args, **batch.kwargs))
    if not bool(torch.isfinite(output).all()):
        raise BadInput("depth_usefulness: the outputs of the model are not finite")
    return output


def _without(model: nn.Module, batch: Batch, path: str) -> tuple[Tensor, Tensor | None]:
    """Output and losses of the model without a block."""
    with watched(model, [path], lambda found: found.before):
        output = main_output(model(*batch.args, **batch.kwargs))
    return output, None if batch.target is None else losses(output, batch.target)


def _row(depth: int, block: Block, turned: Mapping[str, _Mean], left_out: Mapping[str, _LeftOut]) -> dict[str, Any]:
    angle, found = turned.get(block.path), left_out.get(block.path)
    rises = torch.cat(found.rises) if found is not None and found.rises else torch.empty(0)
    return {
        "depth": depth, "block": block.path, "angle": angle.total / angle.count if angle and angle.count else None,
        "change": _finite(math.sqrt(found.moved / found.length)) if found and found.length else None,
        "loss_rise": _finite(float(rises.mean())) if len(rises) else None,
        "rise_error": _finite(float(rises.std()) / math.sqrt(len(rises))) if len(rises) > 1 else None,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    """None where a model without a block breaks down: there is no figure for that."""
    return value if math.isfinite(value) else None


CARD = Card(
    id="depth_usefulness",
    title="The Curse of Depth in Large Language Models",
    authors="Sun, Song, Li, Yin, Zheng, Liu",
    year=2025,
    source="arXiv 2502.05795, its measures; angular distance as in arXiv 2403.17887",
    family="norm",
    summary="How far each block turns the residual stream, and how much the loss rises without it, in any residual network.",
    objects={"DepthUsefulness": "Probe"},
    use="Before leaving layers out, and to compare norms and scales of branches by what deep layers do.",
    avoid="Where several layers go at once: what each costs alone does not add up.",
    composes=("signal_propagation", "lns", "mix_ln", "peri_ln"),
)
