"""`rtn`: round to nearest, the data-free baseline that every other quantization method has to beat.

Each group of weights gets a scale (and a zero point) from its own values, and each weight the nearest code:

    W (rows, K), groups of g:   s, z = affine_params(W[:, group])      (rows, G), G = ceil(K / g)
                                q = clamp(round(W / s) + z, 0, 2^b - 1)
                                W^ = s (q - z)

Source: folklore; the numeric conventions (0 in the range, scales rounded to their storage type first,
all-zero groups store s = 1) are those of `laconic.numerics`. Nothing is folded at inference, the codes are
what runs.

Use it at 8 bits, for embeddings (one row is one token: there is no input to weigh errors by), for anything
without calibration data, and when seconds count. Use `gptq` at 4 bits and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import Record
from laconic.nn import matrix_view, pack_tensors
from laconic.numerics import Scheme, affine_params, dequantize, quantize, rounding_scales, settled

from ._weights import PackWeights

# Elements of a chunk of rows; about eight float32 temporaries of this size live at once.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Solved:
    """A quantized matrix, as solvers return it.

    Attributes:
        codes: (rows, K) uint8, unsigned.
        scale: (rows, G) or (1, 1), in the scheme's scale dtype.
        zero: None, (rows, G) uint8 or (rows, G) real, as the scheme says.
        loss: what the solver minimized, in float64; comparable between results of the same solver.
        g_idx: (K,) int64, the group of each column, where groups are not runs of columns (GPTQ with
            `act_order` and without `static_groups`); None otherwise. Files hold only runs.
        damp: the damping that GPTQ ended with, None for other solvers.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    loss: float
    g_idx: Tensor | None = None
    damp: float | None = None

    def dequantize(self, scheme: Scheme) -> Tensor:
        """W^ (rows, K) float32."""
        if self.g_idx is None:
            return dequantize(self.codes, self.scale, self.zero, scheme)
        scale = self.scale.float()[:, self.g_idx]
        zero = float(scheme.element.levels // 2) if self.zero is None else self.zero.float()[:, self.g_idx]
        return scale * (self.codes.float() - zero)

    def split(self, sizes: Sequence[int]) -> list[Solved]:
        """Runs of rows of these sizes, with the whole's `loss`; of one alone where a scale is shared by all rows."""
        if len(sizes) == 1:
            return [self]
        zeros = [None] * len(sizes) if self.zero is None else self.zero.split(list(sizes))
        parts = zip(self.codes.split(list(sizes)), self.scale.split(list(sizes)), zeros, strict=True)
        return [Solved(codes, scale, zero, self.loss, self.g_idx, self.damp) for codes, scale, zero in parts]

    @classmethod
    def of_rows(cls, parts: Sequence[Solved]) -> Solved:
        """Parts below each other; losses add up, the largest damping is kept."""
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            sum(part.loss for part in parts),
            damp=max((part.damp for part in parts if part.damp is not None), default=None),
        )


def round_to_nearest(
    W: Tensor, scheme: Scheme, name: str = "tensor", generator: torch.Generator | None = None
) -> Solved:
    """Scale, zero and codes of a matrix, each group by itself; `loss` is ||W - W^||^2.

    Works through chunks of rows, so that a billion-element embedding table needs little more than its codes
    (scales and tables that follow from the whole matrix are the exception: `Scheme.whole`).

    Args:
        W: (rows, K) of any floating type.
        scheme: how to store it.
        name: the parameter's path, for messages.
        generator: randomness of stochastic rounding.

    Raises:
        NotFinite: inf or nan in `W`.
        ScaleOutOfRange: a scale does not fit in the scheme's scale dtype.
    """
    if scheme.whole:
        return _round_whole(W, scheme, name, generator)
    rows, k = W.shape
    codes = torch.empty((rows, k), dtype=torch.uint8, device=W.device)
    scales, zeros, loss = [], [], 0.0
    step = max(1, CHUNK // max(1, k))
    for begin in range(0, max(rows, 1), step):
        x = W[begin : begin + step].float()
        scale, zero = affine_params(x, scheme, name)
        part = quantize(x, scale, zero, scheme, generator)
        codes[begin : begin + step] = part
        loss += float((dequantize(part, scale, zero, scheme) - x).square_().sum(dtype=torch.float64))
        scales.append(scale)
        zeros.append(zero)
    return Solved(codes, torch.cat(scales), None if zeros[0] is None else torch.cat(zeros), loss)


def _round_whole(W: Tensor, scheme: Scheme, name: str, generator: torch.Generator | None) -> Solved:
    """`round_to_nearest` where what is shared by all rows is found first; rows are rounded under it in chunks."""
    scale, zero = affine_params(W, scheme, name)
    # As kernels see them: what scales become in the file is known from all of them alone.
    plain, under, back = scheme.plain, rounding_scales(scale, scheme), settled(scale, scheme)
    parts, loss = [], 0.0
    step = max(1, CHUNK // max(1, W.shape[1]))
    for begin in range(0, max(W.shape[0], 1), step):
        x = W[begin : begin + step].float()
        part, value = (
            s if scheme.scale.granularity == "tensor" else s[begin : begin + step] for s in (under, back)
        )
        rest = zero if zero is None or not _by_rows(scheme) else zero[begin : begin + step]
        codes = quantize(x, part, rest, plain, generator)
        loss += float((dequantize(codes, value, rest, plain) - x).square_().sum(dtype=torch.float64))
        parts.append(codes)
    return Solved(torch.cat(parts), scale, zero, loss)


def _by_rows(scheme: Scheme) -> bool:
    """Whether zero points lie by rows, as scales do; a table of a codebook, or the one of a tensor, does not."""
    return scheme.zero != "none" and scheme.scale.granularity != "tensor"


class RTN(PackWeights):
    """The pass: every parameter that can be packed, rounded to nearest.

    Example:
        >>> from torch import nn
        >>> from laconic.core import passes
        >>> from laconic.core.structure import Structure
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> structure = Structure.build(model, ((torch.randn(2, 64),), {}))
        >>> records, left = passes.run(RTN("v1/int8/channel/float16/minmax/znone/nearest"), passes.Context(model, structure))
        >>> [record.path for record in records], sorted(left)
        (['0.weight', '2.weight'], ['0.bias', '2.bias'])
    """

    id: ClassVar = "rtn"
    needs: ClassVar = frozenset({"float"})

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Codes and scales of the parameter at `path`; `loss` is the share of its energy that is error."""
        scheme = Scheme.parse(decision.units[path]["scheme"])
        unit = self._unit(path, ctx.structure, ctx.model)
        matrix = matrix_view(ctx.model.get_parameter(path).detach(), unit.view)
        solved = round_to_nearest(matrix, scheme, path, torch.Generator().manual_seed(ctx.seed))
        power = float(matrix.float().square().sum(dtype=torch.float64)) or 1.0
        tensors = pack_tensors(unit.spec(scheme), solved.codes, solved.scale, solved.zero)
        return unit.record(scheme, tensors, method=self.id, loss=solved.loss / power)


CARD = Card(
    id="rtn",
    title="Round to nearest",
    authors="folklore",
    year=2017,
    source="the affine form is that of arXiv 1712.05877",
    family="quant",
    summary="Gives each group of weights a scale from its own values, and each weight the nearest code; needs no data.",
    objects={"RTN": "Pass"},
    use="At 8 bits, for embeddings, without calibration data, and as the baseline that every other method has to beat.",
    avoid="At 4 bits and below where calibration data are at hand: gptq loses less.",
    composes=("fold_batchnorm", "smoothquant", "bias_correction"),
)
