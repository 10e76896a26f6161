"""`zeroq`: calibration data that batch norms remember, what each layer's bits cost by KL divergence, and the best mixtures.

Data. Pictures x (B, C, H, W), from noise, are trained until each one has the statistics that every batch norm remembers
(`laconic.core.synthesis`, per image):

    min over x of  sum_l (|mu_l - m_l|^2 + |sigma_l - s_l|^2) / B  + the same with 0 and 1 for x itself

Sensitivity. With only the weights of layer l at k bits:

    Omega_l(k) = mean over x of KL(p(x) || p_l,k(x))        p the softmax of the outputs

Mixtures. As if these added up, the mixtures that none beats in both: for each sum of sizes the least sum of costs, layer by
layer; those that a smaller one beats are dropped on the way. Of this frontier the best within a budget is taken, and what it
really costs is measured.

Quantizer. Rows of weights by their extremes, inputs by those of the tensor:

    i = (2^k - 1) / max(high - low, 1e-8),   z = round(i low) + 2^(k-1)
    q = clamp(round(i x - z), -2^(k-1), 2^(k-1) - 1),   x^ = (q + z) / i

z is not held to the codes, so that a range need not contain 0.

Source: "ZeroQ: A Novel Zero Shot Quantization Framework", Cai, Yao, Dong, Gholami, Mahoney, Keutzer, 2020, arXiv
2001.00281. Official code: amirgholami/ZeroQ, GPL-3.0, not used. We differ from it: statistics are those of each batch norm's
input, whatever comes before it. Sensitivities are not in its code, and are the paper's formula.

Nothing is left of the data. Use it where there are no data and the model has batch norms; `genie`'s pictures are better and
take longer.

Example:
    >>> import torch
    >>> minmax_quantize(torch.tensor([0.0, 0.4, 1.0]), 2, 0.0, 1.0)
    tensor([0.0000, 0.3333, 1.0000])
    >>> table = {"first": {2: 9.0, 4: 1.0}, "last": {2: 5.0, 4: 0.0}}
    >>> mixed_bits(table, {"first": 10, "last": 20}, budget=80).bits
    {'first': 4, 'last': 2}
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.allocate import Point, pareto
from laconic.core.calls import call, first_output
from laconic.core.card import Card
from laconic.core.statistics import widened
from laconic.core.synthesis import Pixels, Synthesized, matched_inputs
from laconic.errors import BadInput, Impossible
from laconic.numerics import check_finite

from ._learned import attach_input_quantizer, layers_of, row_dim

RANGE_FLOOR = 1e-8


# --- the quantizer ----------------------------------------------------------------------------------


def minmax_quantize(
    x: Tensor, bits: int, low: Tensor | float, high: Tensor | float, *, range_floor: float = RANGE_FLOOR
) -> Tensor:
    """x^ of the shape and type of x, for the range [low, high], which broadcasts against it."""
    wide = widened(x)
    low, high = (torch.as_tensor(v, dtype=wide.dtype, device=wide.device) for v in (low, high))
    inverse = ((1 << bits) - 1) / (high - low).clamp(min=range_floor)
    half = 1 << (bits - 1)
    zero = (inverse * low).round() + half
    codes = (inverse * wide - zero).round().clamp(-half, half - 1)
    return ((codes + zero) / inverse).to(x.dtype)


def minmax_weight(weight: Tensor, bits: int, *, dim: int | None = 0, range_floor: float = RANGE_FLOOR) -> Tensor:
    """A weight with every row in the range of its extremes; of the whole weight for dim None."""
    axes = tuple(a for a in range(weight.ndim) if dim is None or a != dim % weight.ndim)
    low, high = weight.amin(axes, keepdim=True), weight.amax(axes, keepdim=True)
    return minmax_quantize(weight, bits, low, high, range_floor=range_floor)


class MinMaxInput(nn.Module):
    """Inputs rounded in a range that is seen first: the extremes of all that passes while `watching`.

    Args:
        bits: 2 to 8.

    Attributes:
        low, high: the range.
        watching: inputs pass unrounded and widen the range.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int):
        super().__init__()
        if not 2 <= bits <= 8:
            raise BadInput(f"MinMaxInput: bits={bits}: 2 to 8")
        self.bits, self.watching = bits, True
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            with torch.no_grad():
                self.low.copy_(torch.minimum(self.low, x.min()))
                self.high.copy_(torch.maximum(self.high, x.max()))
            return x
        return minmax_quantize(x, self.bits, self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, watching={self.watching}"


# --- data -------------------------------------------------------------------------------------------


def bn_matched_data(
    model: nn.Module,
    shape: Sequence[int],
    n: int = 32,
    *,
    steps: int = 500,
    lr: float = 0.5,
    include_input: bool = True,
    start: Tensor | None = None,
    eps: float = 1e-6,
    unbiased: bool = True,
    input_mean: float = 0.0,
    input_std: float = 1.0,
    seed: int = 0,
) -> Synthesized:
    """ZeroQ's data: pictures (n, C, H, W), each with the statistics that a model's batch norms remember.

    Args:
        model: in evaluation mode, with batch norms; it is not changed.
        shape: (C, H, W).
        n: pictures.
        steps: of Adam.
        lr: of Adam; lowered where the loss stands still for 100 steps.
        include_input: pictures shall have `input_mean` and `input_std`.
        start: first pictures, noise N(0, 1) by default.
        eps, unbiased: of the statistics.
        input_mean, input_std: see `include_input`.
        seed: of the noise.

    Raises:
        BadInput: the model has no batch norms, or is in training mode.
    """
    return matched_inputs(
        model, lambda: Pixels((n, *shape), lr, start), steps=steps, per="image", eps=eps, unbiased=unbiased,
        include_input=include_input, input_mean=input_mean, input_std=input_std, seed=seed,
    )  # fmt: skip


# --- sensitivity ------------------------------------------------------------------------------------


@torch.no_grad()
def sensitivity(
    model: nn.Module, batches: Sequence[Any], bits: Sequence[int] = (2, 4, 8), *, layers: Sequence[str] | None = None
) -> dict[str, dict[int, float]]:
    """Omega: layer -> bits -> KL divergence in nats when its weights alone are rounded; the model stays as it is.

    Args:
        model: in evaluation mode, float.
        batches: data, real or made by the model, each what `laconic.core.calls.call` takes.
        bits: widths.
        layers: paths; every linear layer and convolution by default.

    Raises:
        BadInput: no data, no layers, training mode, or outputs that are not finite, by the layer that makes them so.
    """
    if model.training:
        raise BadInput("sensitivity is measured at inference: call model.eval() first")
    found = layers_of(model)
    chosen = list(found) if layers is None else list(layers)
    strange = [path for path in chosen if path not in found]
    if strange or not chosen or not len(batches):
        what = f"{strange[0]!r} is no linear layer or convolution" if strange else "there are no layers, or no data"
        raise BadInput(f"sensitivity: {what}")
    before = [_log_probabilities(model, batch) for batch in batches]
    if not all(bool(torch.isfinite(p).all()) for p in before):
        raise BadInput(f"{type(model).__name__}: its outputs on the data are not finite")
    table: dict[str, dict[int, float]] = {}
    for path in chosen:
        layer: Any = found[path]
        check_finite(layer.weight, f"{path}.weight")
        kept = layer.weight.detach().clone()
        try:
            table[path] = {}
            for width in bits:
                layer.weight.copy_(minmax_weight(kept, width, dim=row_dim(layer)))
                total, count = 0.0, 0
                for batch, log_p in zip(batches, before, strict=True):
                    log_q = _log_probabilities(model, batch)
                    total += float((log_p.exp() * (log_p - log_q)).sum())
                    count += len(log_p)
                table[path][width] = max(total / count, 0.0)  # a KL divergence is not negative but by rounding
        finally:
            layer.weight.copy_(kept)
    return table


def _log_probabilities(model: nn.Module, batch: Any) -> Tensor:
    """(rows, classes) in float64."""
    answer = call(model, batch)
    logits = first_output(getattr(answer, "logits", answer))
    return F.log_softmax(logits.double(), -1).flatten(0, -2)


# --- mixtures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """Bits of every layer, what these add up to in bits and in nats, and the whole frontier."""

    bits: dict[str, int]
    size: float
    cost: float
    front: list[Point]


def mixed_bits(table: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: float) -> Mixed:
    """The mixture of least sensitivity whose weights take no more than a budget.

    Args:
        table: of `sensitivity`.
        sizes: layer -> parameters.
        budget: bits of all weights together.

    Raises:
        Impossible: even the smallest widths exceed the budget.
    """
    layers = list(table)
    widths = {path: sorted(table[path]) for path in layers}
    front = pareto(
        [[table[path][k] for k in widths[path]] for path in layers],
        [[sizes[path] * k for k in widths[path]] for path in layers],
    )
    within = [point for point in front if point.size <= budget]
    if not within:
        raise Impossible(f"the weights take at least {front[0].size:,.0f} bits, more than the budget of {budget:,.0f}")
    best = within[-1]
    chosen = {path: widths[path][i] for path, i in zip(layers, best.choice, strict=True)}
    return Mixed(chosen, best.size, best.cost, front)


# --- a model ----------------------------------------------------------------------------------------


@torch.no_grad()
def zeroq(
    model: nn.Module,
    batches: Sequence[Any],
    bits: int | Mapping[str, int] = 4,
    *,
    input_bits: int | Mapping[str, int] | None = None,
) -> nn.Module:
    """A copy of a model whose weights are rounded by row and whose inputs are rounded by tensor, ranges seen on data.

    This is what data without data are for: to see the ranges of activations. Values are rounded in floats; `rtn` packs.

    Args:
        model: in evaluation mode, batch norms folded.
        batches: data, real or made by the model.
        bits: of weights, or path of a layer -> bits; layers that are not named then stay float.
        input_bits: of their inputs, likewise; None leaves inputs as they are.

    Raises:
        BadInput: no data, or a path that there is not.
    """
    made = copy.deepcopy(model)
    layers = layers_of(made)
    chosen = dict.fromkeys(layers, bits) if isinstance(bits, int) else dict(bits)
    strange = [path for path in chosen if path not in layers]
    if strange or not len(batches):
        raise BadInput(
            f"zeroq: {f'{strange[0]!r} is no linear layer or convolution' if strange else 'there are no data'}"
        )
    watching = []
    for path in chosen:
        width = input_bits.get(path) if isinstance(input_bits, Mapping) else input_bits
        if width is not None:
            watching.append(MinMaxInput(width))
            attach_input_quantizer(layers[path], watching[-1])
    for batch in batches:
        call(made, batch)
    for one in watching:
        one.watching = False
    for path, width in chosen.items():
        layer: Any = layers[path]
        check_finite(layer.weight, f"{path}.weight")
        layer.weight.copy_(minmax_weight(layer.weight, width, dim=row_dim(layer)))
    return made


CARD = Card(
    id="zeroq",
    title="ZeroQ: A Novel Zero Shot Quantization Framework",
    authors="Cai, Yao, Dong, Gholami, Mahoney, Keutzer",
    year=2020,
    source="arXiv 2001.00281",
    family="quant",
    summary="Makes calibration data that batch norms remember, measures what each layer's bits cost by KL divergence, and "
    "finds all mixtures of bits that none beats.",
    objects={},
    use="Networks with batch norms where there are no calibration data.",
    avoid="Where real data are at hand, or the model has no batch norms.",
    composes=("adaquant", "fold_batchnorm", "genie"),
    vectors=("zeroq",),
    code="amirgholami/ZeroQ, GPL-3.0",
    claim={
        "text": "Ranges of 4-bit activations seen on pictures that the model's batch norms remember keep more of its "
        "accuracy than ranges seen on noise.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("gaussian", "zeroq"),
        "seeds": 5,
        "minutes": 2,
        "task": "mnist-cnn",
    },
)
