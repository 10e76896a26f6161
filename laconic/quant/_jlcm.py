"""`jlcm`: weights as indices into small codebooks, codebooks and indices learned together on each layer's output.

Rows of W (out, in, ...) are cut into G groups of neighbours, those whose weights are spread alike, and every group g has
a codebook C_g of K = 2^b values, shared by all its weights:

    w^_i = C_g(i)[m_i]          m_i the index of the weight

Groups come from the rows' own quantiles, projected on their first principal direction and cut into equal parts; codebooks
from k-means (Lloyd's, from quantiles), weighted by the mean square of the inputs where outputs are to be kept. Then both are
trained against |W X - W^ X|^2:

    dL/dC_k = sum of dL/dw^_i over all i with m_i = k

and indices by one of three `proximal` rules, with D the mean spacing of a codebook:

    "nearest"   a latent u_i, first w_i:         dL/du_i = dL/dw^_i,   m_i = the codeword nearest to u_i
    "softmax"   logits M_ik, m_i the largest:    dL/dM_ik = dL/dw^_i sign(C_k - w^_i) D^2 / (|C_k - w^_i| + D),  0 at m_i
    "naive"     the same logits:                 dL/dM_ik = dL/dw^_i (C_k - w^_i)

The naive rule grows with the distance, so that indices jump to the ends of the codebook; the proximal one falls with it.
"nearest" holds one number for a weight instead of K.

Source: "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings", Yvinec, Dapogny, Bailly,
2023, arXiv 2309.17361. No official code. Only its abstract and a summary were at hand: the shape of the proximal rule, how
rows are grouped and all rates are ours. Rows keep their places, so a group's number is stored for each.

What is stored (`encode`) are b bits a weight, codebooks in 16 bits and a byte a row. No packed layer computes from
codebooks yet: at inference the weights are floats on the codebook's values.

Use it at 2 and 3 bits, where evenly spaced levels fit weights badly. `gptq` is faster, and its weights multiply packed.

Example:
    >>> import torch
    >>> book = Codebook(torch.tensor([[0.0, 0.5, 2.0, 2.5], [4.0, 5.0, 8.0, 9.0]]), bits=1, groups=2)
    >>> book.codebook.data.tolist()
    [[0.25, 2.25], [4.5, 8.5]]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.reconstruct import Calls, Group, Twins, reconstruct
from laconic.core.statistics import widened
from laconic.errors import BadInput
from laconic.numerics import check_finite, k_means, pack, unpack
from laconic.numerics.clusters import nearest

from ._gptq import Hessian
from ._learned import Trainings, chosen_layers, row_dim

Proximal = Literal["nearest", "softmax", "naive"]
PROXIMAL = ("nearest", "softmax", "naive")
LEAST_ROWS = 4  # of a group: fewer share a codebook that costs what it saves


# --- mathematics ------------------------------------------------------------------------------------


def row_groups(weight: Tensor, groups: int, quantiles: int = 16) -> Tensor:
    """(rows,) int64: the group of every row of a matrix, in equal parts of rows that are spread alike.

    Args:
        weight: (rows, K).
        groups: G, at most as many as rows.
        quantiles: of a row that say how it is spread.
    """
    rows = len(weight)
    groups = max(1, min(groups, rows))
    if groups == 1:
        return torch.zeros(rows, dtype=torch.int64, device=weight.device)
    ordered = weight.detach().double().sort(1).values
    at = torch.linspace(0, weight.shape[1] - 1, quantiles, device=weight.device).round().long()
    spread = ordered[:, at]
    centred = spread - spread.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    direction = direction * torch.where(direction[direction.abs().argmax()] < 0, -1.0, 1.0)  # its sign is free
    place = torch.empty(rows, dtype=torch.int64, device=weight.device)
    place[(centred @ direction).argsort(stable=True)] = torch.arange(rows, device=weight.device)
    return place * groups // rows


def proximal_gradient(
    gradient: Tensor, weight: Tensor, codewords: Tensor, index: Tensor, naive: bool = False
) -> Tensor:
    """dL/dM (rows, K, n) of logits, from dL/dw^ (rows, K).

    Args:
        gradient: dL/dw^.
        weight: w^ (rows, K).
        codewords: (rows, n), of each row.
        index: m (rows, K).
        naive: the rule that grows with the distance.
    """
    apart = codewords[:, None, :] - weight[:, :, None]
    if naive:
        return gradient[:, :, None] * apart
    spacing = _spacing(codewords)[:, None, None]
    rule = apart.sign() * spacing.square() / (apart.abs() + spacing)
    return (gradient[:, :, None] * rule).scatter(2, index[:, :, None], 0.0)


def _spacing(codewords: Tensor) -> Tensor:
    """D (rows,): the mean distance of neighbours; 1 where all are the same."""
    mean = (codewords.amax(1) - codewords.amin(1)) / max(codewords.shape[1] - 1, 1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


class _Look(torch.autograd.Function):
    """w^ (rows, K) of codebooks (G, n) and indices, with the gradients of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, codebook: Tensor, group: Tensor, index: Tensor, proximal: str) -> Tensor:
        weight = codebook[group].gather(1, index)
        ctx.save_for_backward(codebook, group, index, weight)
        ctx.proximal = proximal
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codebook, group, index, weight = ctx.saved_tensors
        to_latent = to_codebook = None
        if ctx.needs_input_grad[0]:
            to_latent = gradient
            if ctx.proximal != "nearest":
                to_latent = proximal_gradient(gradient, weight, codebook[group], index, ctx.proximal == "naive")
        if ctx.needs_input_grad[1]:
            flat = (group[:, None] * codebook.shape[1] + index).flatten()
            to_codebook = torch.zeros_like(codebook).flatten().index_add_(0, flat, gradient.flatten()).view_as(codebook)
        return to_latent, to_codebook, None, None, None


# --- the parametrization ----------------------------------------------------------------------------


class Codebook(nn.Module):
    """A weight whose values are those of a few codebooks, which are learned together with who has which.

    With `proximal="nearest"` the parametrized weight itself is the latent u; else logits are a parameter of their own, and
    the weight has no gradient but 0.

    Args:
        weight: first values.
        bits: b, 1 to 8; of logits up to 4.
        groups: G, at most as many as rows.
        proximal: one of `PROXIMAL`.
        importance: (K,) what errors of each column count, or (rows, K); alike by default.
        dim: the axis of the outputs.

    Attributes:
        codebook: (G, 2^b), a parameter.
        group: (rows,), each row's group.

    Raises:
        BadInput: another rule or width.
    """

    group: Tensor

    def __init__(
        self, weight: Tensor, bits: int = 4, groups: int = 1, *, proximal: Proximal = "nearest",
        importance: Tensor | None = None, dim: int = 0,
    ):  # fmt: skip
        super().__init__()
        if proximal not in PROXIMAL or not 1 <= bits <= (8 if proximal == "nearest" else 4):
            raise BadInput(
                f"Codebook: bits={bits}, proximal={proximal!r}: {', '.join(PROXIMAL)}, 1 to 8 bits, or 4 with logits"
            )
        self.bits, self.proximal, self.dim = bits, proximal, dim
        matrix = self._matrix(weight.detach())
        self.register_buffer("group", row_groups(matrix, groups))
        matters = torch.ones_like(matrix) if importance is None else importance.to(matrix.dtype).expand_as(matrix)
        books = [
            k_means(matrix[self.group == g].flatten(), matters[self.group == g].flatten(), 1 << bits)
            for g in range(int(self.group.max()) + 1)
        ]
        self.codebook = nn.Parameter(torch.stack(books).to(weight.dtype))
        if proximal != "nearest":
            mine = widened(self.codebook.detach())[self.group]
            apart = (mine[:, None, :] - matrix[:, :, None]) / _spacing(mine)[:, None, None]
            self.logits = nn.Parameter(-apart.abs().to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        book = widened(self.codebook)
        index = self.indices(weight)
        if self.proximal == "nearest":
            made = _Look.apply(self._matrix(weight), book, self.group, index, self.proximal)
            return self._shaped(made, weight)
        made = _Look.apply(widened(self.logits), book, self.group, index, self.proximal)
        return self._shaped(made, weight) + 0 * weight

    def indices(self, weight: Tensor) -> Tensor:
        """m (rows, K) int64 of a parametrized weight."""
        if self.proximal == "nearest":
            return nearest(self._matrix(weight.detach()), widened(self.codebook.detach())[self.group])
        return self.logits.detach().argmax(-1)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """What is to be stored: indices packed as `laconic.numerics.pack` does, codebooks in float16, groups.

        Raises:
            BadInput: codebooks that do not fit in float16.
        """
        books = self.codebook.half()
        if not bool(torch.isfinite(books).all()):
            raise BadInput("a codebook has values that do not fit in float16")
        index = self.indices(weight)
        packed = pack(index.to(torch.uint8), self.bits)
        kind = torch.uint8 if len(books) <= 256 else torch.int32
        return {"packed": packed, "codebook": books, "group": self.group.to(kind)}

    def nbytes(self, weight: Tensor) -> int:
        """Bytes of what `encode` gives."""
        return sum(t.numel() * t.element_size() for t in self.encode(weight).values())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, groups={len(self.codebook)}, proximal={self.proximal!r}"

    def _matrix(self, weight: Tensor) -> Tensor:
        return widened(weight).movedim(self.dim, 0).flatten(1)

    def _shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        moved = like.movedim(self.dim, 0)
        return matrix.view(moved.shape).movedim(0, self.dim).to(like.dtype)


def decode(stored: Mapping[str, Tensor], bits: int, columns: int) -> Tensor:
    """W^ (rows, columns) float32 of what `Codebook.encode` gave."""
    index = unpack(stored["packed"], bits, columns).long()
    return stored["codebook"].float()[stored["group"].long()].gather(1, index)


def code_jumps(before: Tensor, after: Tensor, codebook: Tensor, group: Tensor) -> Tensor:
    """How far indices moved, in places of the ordered codebook: counts (n,) of 0, 1, ..., n - 1 places."""
    place = codebook.argsort(dim=1, stable=True).argsort(dim=1)[group]
    moved = (place.gather(1, after) - place.gather(1, before)).abs()
    return torch.bincount(moved.flatten(), minlength=codebook.shape[1])


# --- a model ----------------------------------------------------------------------------------------


def jlcm(
    model: nn.Module,
    batches: Sequence[Any],
    bits: int | Mapping[str, int] = 2,
    *,
    groups: int = 8,
    steps: int = 2000,
    batch: int | None = 64,
    proximal: Proximal = "nearest",
    metric: Literal["output", "weight"] = "output",
    lr_index: float = 1e-3,
    lr_codebook: float = 1e-3,
    teacher: nn.Module | None = None,
    seed: int = 0,
) -> Trainings:
    """Give the linear layers and convolutions of a model codebooks, and train these layer by layer, in place.

    Every layer sees the inputs that the layers before give by then. Weights stay parametrized;
    `torch.nn.utils.parametrize.remove_parametrizations` leaves their values.

    Args:
        model: in evaluation mode, with float weights.
        batches: calibration data, each what `laconic.core.calls.call` takes.
        bits: of an index, or path of a layer -> bits; layers that are not named then stay float.
        groups: of each layer's rows; fewer where they would have less than 4 rows.
        steps, batch: of each layer.
        proximal: see `Codebook`.
        metric: k-means by what changes the output ("output", the inputs' mean squares), or every weight alike.
        lr_index, lr_codebook: of Adam, falling to 0 as a cosine; of latents and codebooks in parts of their mean spacing.
        teacher: the float model; a copy of `model` by default.
        seed: of the rows that are drawn.

    Returns:
        Layer -> its training; `before` is that of k-means alone.

    Raises:
        BadInput: no data, a path that there is not, a tied weight that is named, or NaN.
    """
    if metric not in ("output", "weight"):
        raise BadInput(f"jlcm: metric={metric!r}: output or weight")
    chosen, skipped = chosen_layers(model, bits, "jlcm")
    teacher = copy.deepcopy(model) if teacher is None else teacher
    done = Trainings(skipped)
    for calls in Twins(teacher, model, batches).walk(list(chosen), inputs="student"):
        layer: Any = model.get_submodule(calls.path)
        check_finite(layer.weight.detach(), f"{calls.path}.weight")
        importance = _powers(layer, calls) if metric == "output" else None
        fewer = max(1, min(groups, layer.weight.shape[row_dim(layer)] // LEAST_ROWS))
        book = Codebook(
            layer.weight, chosen[calls.path], fewer, proximal=proximal, importance=importance, dim=row_dim(layer)
        )  # fmt: skip
        parametrize.register_parametrization(layer, "weight", book)
        of_index = layer.parametrizations.weight.original if proximal == "nearest" else book.logits
        spacing = float(_spacing(widened(book.codebook.detach())).mean())
        of_latent = lr_index * (spacing if proximal == "nearest" else 1.0)  # logits are in parts of the spacing already
        trained = [Group([of_index], of_latent, "cosine"), Group([book.codebook], lr_codebook * spacing, "cosine")]
        done[calls.path] = reconstruct(layer, calls, trained, steps=steps, batch=batch, seed=seed)
    return done


@torch.no_grad()
def _powers(layer: Any, calls: Calls) -> Tensor | None:
    """Mean square of each column's input (K,); of grouped convolutions, whose columns have several inputs, None."""
    if getattr(layer, "groups", 1) > 1:
        return None
    conv = isinstance(layer, nn.modules.conv._ConvNd)
    found = Hessian.of(layer) if conv else Hessian(calls.inputs[0].shape[-1], device=calls.inputs[0].device)
    for x in calls.inputs:
        if conv:
            found.add_conv(x, layer)
        else:
            found.add(x)
    power = found.matrix.diagonal().clamp(min=0)
    total = float(power.mean())
    # A column that no input reaches still needs a codeword: it counts little instead of nothing.
    return None if total == 0 or not math.isfinite(total) else power / total + 1e-3


CARD = Card(
    id="jlcm",
    title="Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings",
    authors="Yvinec, Dapogny, Bailly",
    year=2023,
    source="arXiv 2309.17361",
    family="quant",
    summary="Weights as indices into small codebooks, codebooks and indices learned together on each layer's output.",
    objects={"Codebook": "Weight"},
    traits={"Codebook": ("gradient:surrogate",)},
    use="At 2 and 3 bits, where evenly spaced levels fit weights badly and only the size counts.",
    avoid="Where weights must multiply packed, which codebooks do not yet: gptq.",
    composes=("zeroq",),
    claim={
        "text": "At 2 bits and equal bytes, a perceptron whose codebooks and indices are trained on each layer's output "
        "is more accurate than one with the codebooks of k-means.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("k-means", "jlcm"),
        "seeds": 5,
        "minutes": 2,
        "task": "mnist-mlp",
    },
)
