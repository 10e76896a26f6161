"""`norm_tweak`: after rounding a block, trains only its norms, so that each channel has the statistics that it had.

For the output of a block, f (tokens, C) of the float block and q (tokens, C) of the rounded one:

    L = (1/C) sum over c of |mean f_c - mean q_c| + |var f_c - var q_c|        over tokens, unbiased, mean over texts

trained by Adam over gains and shifts of the block's norms alone, one pass over the texts, and at block l of L with the rate

    lr_l = lr (1 + scale l / L)

Blocks are taken in order: the next one reads what the tweaked ones give. The float block is shown the same input as the
rounded one ("same_input"), or its own, from the float model ("float").

Source: "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models", Li, Li, Zhang, Chu, 2023, arXiv
2309.02784. No official code; an unofficial one is smpanaro/norm-tweaking, from which the loss's details were taken. We
differ from it: a block's norms end with the best of what the
pass saw on all texts.

The gains stay where they are, or fold into the layers that read them before these are rounded: tweaked, they no longer
do. Calibration texts may be written by the model (`laconic.core.synthesis.generated_text`). More than a few passes fit the
texts and not the language. An RMSNorm has no shift, so that it cannot move a channel's mean.

Use it after any rounding of a transformer's weights at 2 to 4 bits, for seconds. It gives little after `gptq` at 4 bits.

Example:
    >>> tweak_rate(1e-4, 5.0, 3, 4)
    0.000475
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.reconstruct import (
    Calls,
    Group,
    Reconstructed,
    Targets,
    Twins,
    channel_loss,
    output_loss,
    reconstruct,
)
from laconic.core.record import REWRITE, Record
from laconic.core.structure import Structure
from laconic.errors import BadInput

Compared = Literal["channel", "mse"]


def tweak_rate(lr: float, scale: float, number: int, blocks: int) -> float:
    """lr (1 + scale l / L) of block l, counted from 0, of L."""
    return lr * (1 + scale * number / max(blocks, 1))


def norms_in(model: nn.Module, structure: Structure, block: str) -> list[str]:
    """Paths of a block's norms that have a gain of their own, float and not shared."""
    found = []
    for path in structure.norms:
        inside = path == block or path.startswith(f"{block}.")
        held = [info for info in structure.parameters.values() if any(n.rpartition(".")[0] == path for n in info.names)]
        shared = any(len(info.names) > 1 for info in held)
        if inside and held and not shared and all(p.is_floating_point() for p in _own(model, path).values()):
            found.append(path)
    return found


def _own(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    return dict(model.get_submodule(path).named_parameters(recurse=False))


def tweak_block(
    block: nn.Module,
    parameters: Sequence[Tensor],
    calls: Calls,
    *,
    lr: float = 1e-5,
    iters: int = 1,
    batch: int = 1,
    loss: Compared = "channel",
    seed: int = 0,
) -> Reconstructed:
    """Train gains and shifts of one rounded block, in place.

    Args:
        block: rounded.
        parameters: of its norms.
        calls: of it; targets are the float block's outputs.
        lr: of Adam.
        iters: passes over the texts.
        batch: texts of a step.
        loss: "channel" as above, or "mse" of all elements.
        seed: of the order.

    Raises:
        BadInput: another loss, outputs without tokens, or texts of a single token.
    """
    if loss not in ("channel", "mse"):
        raise BadInput(f"norm_tweak: loss is {loss!r}: channel or mse")
    target = calls.targets[0]
    if loss == "channel" and (target.ndim < 2 or target.shape[-2] < 2):
        raise BadInput(
            f"{calls.path}: its outputs {tuple(target.shape)} hold fewer than two tokens, and statistics need two: give "
            "longer texts, or compare by mse"
        )

    def compared(output: Tensor, target: Tensor) -> Tensor:
        if loss == "mse":
            return output_loss(output, target)
        return channel_loss(target, output, reduction="sum" if target.ndim < 3 else "mean")

    steps = iters * math.ceil(calls.rows / batch)
    return reconstruct(block, calls, [Group(list(parameters), lr)], steps=steps, batch=batch, loss=compared, seed=seed)


def norm_tweak(
    model: nn.Module,
    batches: Sequence[Any],
    structure: Structure,
    quantize: Callable[[str, nn.Module], None] | None = None,
    *,
    teacher: nn.Module | None = None,
    blocks: Sequence[str] | None = None,
    lr: float = 1e-5,
    lr_scale: float = 5.0,
    iters: int = 1,
    batch: int = 1,
    loss: Compared = "channel",
    target: Targets = "same_input",
    seed: int = 0,
) -> dict[str, Reconstructed]:
    """Round a model block by block and train each one's norms before the next is rounded, in place.

    Args:
        model: in evaluation mode; float where `quantize` is given, else rounded already.
        batches: texts, each what `laconic.core.calls.call` takes.
        structure: of the float model.
        quantize: rounds a block (path, module) in place. What comes before it is rounded and tweaked by then.
        teacher: the float model; a copy of `model` by default, which then must still be float.
        blocks: paths; `structure.blocks` by default.
        lr, lr_scale: see `tweak_rate`.
        iters, batch, loss, seed: see `tweak_block`.
        target: what the float block is shown: "same_input" or "float".

    Returns:
        Block -> its training.

    Raises:
        BadInput: a model without blocks or norms in them, no data, or no float model to compare with.
    """
    if teacher is None and quantize is None:
        raise BadInput("norm_tweak compares with the float model: give teacher, or quantize to round a float one")
    teacher = copy.deepcopy(model) if teacher is None else teacher
    paths = list(structure.blocks if blocks is None else blocks)
    norms = {path: norms_in(model, structure, path) for path in paths}
    if not any(norms.values()):
        raise BadInput(f"{type(model).__name__} has no blocks with norms that have a gain: nothing can be tweaked")
    done = {}
    for number, calls in enumerate(Twins(teacher, model, batches).walk(paths, inputs="student", targets=target)):
        block = model.get_submodule(calls.path)
        if quantize is not None:
            quantize(calls.path, block)
        parameters = [p for norm in norms[calls.path] for p in _own(model, norm).values()]
        if parameters:
            rate = tweak_rate(lr, lr_scale, number, len(paths))
            done[calls.path] = tweak_block(
                block, parameters, calls, lr=rate, iters=iters, batch=batch, loss=loss, seed=seed
            )  # fmt: skip
    return done


class NormTweak:
    """The pass: the norms of each block of a rounded model. `Context` must hold `batches` and the float `teacher`.

    Args:
        lr, lr_scale, iters, loss, target: see `norm_tweak`.

    Raises:
        ValueError: another loss or target.
    """

    id: ClassVar = "norm_tweak"
    stage: ClassVar = "repair"
    scope: ClassVar = "block"
    needs: ClassVar = frozenset({"data"})

    def __init__(
        self, lr: float = 1e-5, lr_scale: float = 5.0, iters: int = 1, loss: Compared = "channel",
        target: Targets = "same_input",
    ):  # fmt: skip
        if loss not in ("channel", "mse") or target not in ("float", "same_input"):
            raise ValueError(f"NormTweak: loss={loss!r}, target={target!r}: channel or mse, float or same_input")
        self.lr, self.lr_scale, self.iters, self.loss, self.target = lr, lr_scale, iters, loss, target

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Block -> its norms and its rate; norm outside of blocks, or shared -> why it stays."""
        units: dict[str, dict[str, Any]] = {}
        taken: set[str] = set()
        for number, block in enumerate(structure.blocks):
            norms = norms_in(model, structure, block)
            taken.update(norms)
            if norms:
                units[block] = {
                    "norms": norms, "lr": tweak_rate(self.lr, self.lr_scale, number, len(structure.blocks)),
                    "iters": self.iters, "loss": self.loss, "target": self.target,
                }  # fmt: skip
        skipped = {}
        for path in structure.norms:
            if path not in taken:
                inside = any(path == b or path.startswith(f"{b}.") for b in structure.blocks)
                skipped[path] = "its gain is shared" if inside else "it lies in no repeated block"
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Gains and shifts of the block at `path`, trained on `ctx.batches`."""
        said = decision.units[path]
        if ctx.teacher is None or not len(ctx.batches):
            raise ValueError(
                f"{path}: tweaking its norms needs calibration data (batches) and the float model (teacher)"
            )
        calls = Twins(ctx.teacher, ctx.model, ctx.batches).calls(path, inputs="student", targets=said["target"])
        block = copy.deepcopy(ctx.model.get_submodule(path))
        named = {
            f"{norm}.{name}": p
            for norm in said["norms"]
            for name, p in (block.get_submodule(norm[len(path) + 1 :]) if norm != path else block).named_parameters(
                recurse=False
            )
        }
        done = tweak_block(
            block, list(named.values()), calls, lr=said["lr"], iters=said["iters"], loss=said["loss"], seed=ctx.seed
        )  # fmt: skip
        data = {"pass": self.id, **said, "before": done.before, "after": done.after}
        return Record(REWRITE, path, data, {name: p.detach().clone() for name, p in named.items()})

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the norms their values."""
        with torch.no_grad():
            for name, value in record.tensors.items():
                model.get_parameter(name).copy_(value)


CARD = Card(
    id="norm_tweak",
    title="Norm Tweaking: High-performance Low-bit Quantization of Large Language Models",
    authors="Li, Li, Zhang, Chu",
    year=2023,
    source="arXiv 2309.02784",
    family="quant",
    summary="After rounding a block, trains only its norms, so that each channel has the statistics that it had.",
    objects={"NormTweak": "Pass"},
    use="After rounding a transformer's weights to 2 to 4 bits, for seconds.",
    avoid="After gptq at 4 bits, where little is left to gain; with more than a few passes, which overfit.",
    composes=("rtn", "gptq"),
    vectors=("norm_tweak",),
    code="smpanaro/norm-tweaking, unofficial, no licence found",
    claim={
        "text": "One pass over texts that a language model wrote itself, training only the norms of its 2-bit form, takes "
        "back more than a hundredth of a bit per character.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.01,
        "arms": ("gptq", "gptq_and_tweaked_norms"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
