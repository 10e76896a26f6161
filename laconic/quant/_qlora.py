"""`qlora`: weights in 4-bit NormalFloat whose scales are in 8 bits, frozen, with low-rank adapters that are trained.

For a weight W in blocks of 64, row by row, with the 16 levels T of NF4 (`laconic.numerics.levels`):

    c = max |W_block|           q = argmin |T_q - W / c|            W^ = c^ T[q]
    c^ = o + a m[k]             o = mean c, a = max |c - o| and k = argmin |m_k - (c - o) / a| by runs of 256 blocks
    y = x W^T + b + (alpha / r) dropout(x) A^T B^T                  A (r, in), B (out, r) = 0 at first

m is the map of 8-bit optimizers, dense near 0. A weight costs 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits. Only A and B are
trained; the gradient goes through W^ to x alone, and W^ is computed anew at each use.

Source: "QLoRA: Efficient Finetuning of Quantized LLMs", Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023, arXiv
2305.14314. Official code: artidoro/qlora and bitsandbytes, MIT. We differ from it: in the packed layers blocks start anew
with each row, where theirs run on over the ends of rows, so that codes and scales are the same where rows are a
multiple of the block (`four_bit` computes theirs in any case). Their paged optimizer moves Adam's states from GPU memory to
the CPU under pressure; on a CPU there is nothing to page, any optimizer of torch does.

`merge_lora_` gives float layers; quantizing those again loses part of what was learned, so the adapters are best kept
beside the packed weights, as PEFT's files hold them (`lora_state`). PEFT itself takes the packed layers, too.

Use it to fine-tune a model whose float weights do not fit in memory. Where they do, LoRA on the float model is better and
faster; at less than 4 bits see `lq_lora`.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.quant import qlora_
    >>> model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> qlora_(model, rank=4).packed
    ['0', '2']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laconic.core._trace import Names
from laconic.core.card import Card
from laconic.core.lora import (
    LoRALinear,
    add_lora_,
    linear_layers,
    load_lora_state_,
    lora_layers,
    lora_state,
    merge_lora_,
)
from laconic.core.passes import Context, Decision
from laconic.core.record import Record
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn import PackedParameterSpec, declare, fill, is_packed, matrix_view, pack_tensors
from laconic.nn.packed import View, _is_conv1d
from laconic.numerics import NAMED, Levels, NestedScales, NotFinite, ScaleOutOfRange, Scheme, check_finite
from laconic.numerics.codebook import codes_of

from ._rtn import round_to_nearest
from ._weights import PackWeights

BLOCK = 64
NF4_SCHEME = NAMED["nf4"]

__all__ = [
    "NF4", "Adapted", "FourBit", "LoRALinear", "add_lora_", "four_bit", "load_lora_state_", "lora_layers", "lora_state",
    "merge_lora_", "nibbles", "qlora_",
]  # fmt: skip


# --- mathematics, as bitsandbytes stores it ---------------------------------------------------------


@dataclass(frozen=True)
class FourBit:
    """A tensor in blocks of 4-bit codes over its flattened elements.

    Attributes:
        codes: (n,) uint8, indices of levels.
        absmax: c (blocks,) float32, as measured.
        levels: T, by code.
        block: elements to a scale.
        shape: of the tensor.
        nested: how scales are stored in 8 bits, None where they are plain.
        stored: those scales, as `NestedScales.encode` gives them.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    block: int
    shape: tuple[int, ...]
    nested: NestedScales | None = None
    stored: dict[str, Tensor] = field(default_factory=dict)

    def dequantize(self) -> Tensor:
        """W^ float32."""
        scale = self.absmax if self.nested is None else self.nested.decode(self.stored, len(self.absmax))
        values = self.levels[self.codes.int()] * scale.repeat_interleave(self.block)[: len(self.codes)]
        return values.view(self.shape)


def four_bit(
    x: Tensor, element: Levels | str = "nf4", block: int = BLOCK, nested: NestedScales | None = None,
    *, name: str = "tensor",
) -> FourBit:  # fmt: skip
    """A tensor in 4 bits, blocks running on over the ends of rows; a block of zeros has the scale 0.

    Args:
        x: of any shape.
        element: a table of levels, or its name.
        block: elements to a scale.
        nested: how to store the scales in few bits; the codes do not depend on it.
        name: the parameter's path, for messages.

    Raises:
        NotFinite: inf or nan in x.
        ValueError: the block is empty.
    """
    if block < 1:
        raise ValueError(f"{name}: a block of {block} elements")
    check_finite(x, name)
    element = Levels(element) if isinstance(element, str) else element
    flat = x.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
    codes = codes_of(blocks, torch.where(absmax == 0, 1.0, absmax)[:, None], element)
    zeros = [code for code, level in enumerate(element.table) if level == 0]
    if len(zeros) > 1:  # a table of floats; bitsandbytes on a CPU gives small positive numbers the second of its zeros
        codes = torch.where((codes == zeros[0]) & (blocks > 0), zeros[1], codes).to(torch.uint8)
    levels = torch.tensor(element.table, dtype=torch.float32, device=x.device)
    stored = {} if nested is None else nested.encode(absmax, name)
    return FourBit(codes.view(-1)[: len(flat)], absmax, levels, block, tuple(x.shape), nested, stored)


def nibbles(codes: Tensor) -> Tensor:
    """Bytes (ceil(n / 2),) of codes (n,), the first of each two in the high nibble, as bitsandbytes packs them."""
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return even[0::2] << 4 | even[1::2]


# --- the pass ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NF4(PackWeights):
    """The pass: linear layers in NormalFloat, their scales in 8 bits.

    Args:
        scheme: how to store weights and scales; another table or block, or plain scales, as a `Scheme` or its string form.
    """

    scheme: Scheme | str = NF4_SCHEME

    id: ClassVar = "qlora"
    needs: ClassVar = frozenset({"float"})
    ops: ClassVar[tuple[str, ...]] = ("linear",)

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Weight -> its scheme; parameter -> why it stays float."""
        found = super().plan(structure, model)
        tied = {names[0]: names for names in structure.ties}
        units = {name: unit for name, unit in found.units.items() if name not in tied}
        also = {name: f"it is tied: {' = '.join(tied[name])}" for name in found.units if name in tied}
        return Decision(units, found.skipped | also)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Codes and scales of the weight at `path`; `loss` is the share of its energy that is error."""
        unit = self._unit(path, ctx.structure, ctx.model)
        spec = unit.spec(Scheme.parse(decision.units[path]["scheme"]))
        tensors, loss = packed_weight(ctx.model.get_parameter(path).detach(), spec, path)
        return unit.record(spec.scheme, tensors, method=self.id, loss=loss, **{"pass": self.id})


def packed_weight(weight: Tensor, spec: PackedParameterSpec, path: str) -> tuple[dict[str, Tensor], float]:
    """What is stored of a weight rounded to nearest, by suffix, and the share of its energy that is lost."""
    matrix = matrix_view(weight, spec.view)
    solved = round_to_nearest(matrix, spec.scheme, path)
    power = float(matrix.float().square().sum(dtype=torch.float64)) or 1.0
    return pack_tensors(spec, solved.codes, solved.scale, solved.zero), solved.loss / power


# --- a model to fine-tune ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapted:
    """What `qlora_` did.

    Attributes:
        packed: paths of the layers whose weights are in few bits now, or were before.
        adapted: paths of the layers with an adapter.
        left: path -> why its weight stays float.
    """

    packed: list[str]
    adapted: list[str]
    left: dict[str, str]


def qlora_(
    model: nn.Module, rank: int = 64, alpha: float = 16.0, dropout: float = 0.0,
    select: Callable[[str, nn.Module], bool] | None = None, *, scheme: Scheme | str = NF4_SCHEME,
) -> Adapted:  # fmt: skip
    """Pack the linear layers of a model, put adapters around them and freeze the rest, in place.

    Args:
        model: any.
        rank, alpha, dropout: of the adapters. The official defaults; the learning rate is 2e-4 there, constant, with
            gradients clipped at 0.3.
        select: whether to take the layer at a path; all but `lm_head` by default.
        scheme: how weights and their scales are stored.

    Raises:
        BadInput: no layer is left to take, a rank that is none, or weights that are not finite.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    chosen, left = linear_layers(model, select)
    if not chosen or rank < 1:
        add_lora_(model, rank, alpha, dropout, select)  # says what is wrong
    tied = {name: group for group in Names.of(model).groups().values() if len(group) > 1 for name in group}
    solved: list[tuple[Any, PackedParameterSpec, dict[str, Tensor]]] = []
    packed = []
    for path in chosen:
        module, name = model.get_submodule(path), f"{path}.weight"
        if is_packed(module):
            packed.append(path)
        elif name in tied:
            left[path] = f"its weight is tied: {' = '.join(tied[name])}"
        elif isinstance(module, LoRALinear) or "weight" not in module._parameters:
            left[path] = "a parametrization computes its weight"
        else:
            view: View = "transposed" if _is_conv1d(module) else "rows"
            spec = PackedParameterSpec(scheme, tuple(module.weight.shape), view)  # type: ignore[arg-type]
            try:
                solved.append((module, spec, packed_weight(module.weight.detach(), spec, name)[0]))  # type: ignore[operator,union-attr]
            except (NotFinite, ScaleOutOfRange) as error:
                raise BadInput(str(error)) from error
            packed.append(path)
    for module, spec, tensors in solved:
        declare(module, "weight", spec)
        fill(module, "weight", tensors)
    return Adapted(packed, add_lora_(model, rank, alpha, dropout, select), left)


CARD = Card(
    id="qlora",
    title="QLoRA: Efficient Finetuning of Quantized LLMs",
    authors="Dettmers, Pagnoni, Holtzman, Zettlemoyer",
    year=2023,
    source="arXiv 2305.14314",
    family="quant",
    summary="Trains low-rank adapters over weights that are frozen in 4-bit NormalFloat, whose scales are in 8 bits.",
    objects={"NF4": "Pass"},
    use="To fine-tune a model whose float weights do not fit in memory.",
    avoid="Where the float model fits, or at less than 4 bits: lq_lora starts nearer there.",
    composes=("rtn",),
    vectors=("formats",),
    code="github.com/artidoro/qlora, bitsandbytes, MIT",
    claim={
        "text": "After fine-tuning adapters, a language model whose weights are in NormalFloat with nested scales is "
        "better than one in 4-bit floats (e2m1).",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.003,
        "arms": ("fp4", "nf4"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
