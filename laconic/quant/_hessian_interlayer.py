"""`hessian_interlayer`: an order of layers by curvature and by how they disturb one another, and bisection along it.

For layer l with n weights W, rounded to Q(W), on data with the loss L:

    S_l = tr(H_l) / n_l * ||Q(W_l) - W_l||^2                        H_l = d2L / dW_l^2
    tr(H_l) ~ mean_v v^T H v,  v Rademacher                         Hutchinson; H v by a second backward pass
    D_l = mean_{m in M_l} [ L(l, m rounded) - L(m rounded) ]        M_l some other layers, drawn
    score = z(S) + z(D)                                             z: mean 0 and deviation 1 over the layers

Layers of small score are rounded first. Along that order, the largest prefix that keeps the metric above a bound is found
by bisection, first at the larger number of bits and then, within the prefix, at each smaller one:

    n(b) = max { n <= n(b + 1) : metric(first n layers at b bits) >= tolerance * baseline }

The metric need not fall along the order, so what is kept is the last choice that was itself evaluated and passed:
ceil(log2(n + 1)) evaluations for each number of bits.

Source: "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization", Schaefer,
Lambert-Shirzad, Zhang, Chou, Jablin, Li, Guo, Stanton, Joshi, Wang, 2023, arXiv 2306.04879; no code was found. Only the
abstract was at hand: it says Hessians, inter-layer dependencies, bisection. S is that of HAWQ-V2 (arXiv 1911.03852); how D
is measured, and that both count alike, is ours. Costs (bytes, milliseconds) do not enter the order.

Use it where real evaluations are affordable and losses of layers do not add up. Where they do, an integer program over
them finds the optimum: `laconic.core.allocate`.

Example:
    >>> from laconic.quant import bisect_bits
    >>> loss = {"a": 0.03, "b": 0.001, "c": 0.01}
    >>> accuracy = lambda bits: 1 - sum(loss[layer] * (8 - b) / 4 for layer, b in bits.items())
    >>> bisect_bits(["b", "c", "a"], (8, 4), accuracy, tolerance=0.98).bits
    {'b': 4, 'c': 4, 'a': 8}
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from laconic.core.allocate import Bisected, Bisection, bisect
from laconic.core.card import Card
from laconic.core.figure import bars
from laconic.core.modes import evaluating
from laconic.errors import BadInput
from laconic.numerics import Scheme

from ._rounded import Weight, batches_of, call, rounded, scheme_of, tensor_of, weights_of
from ._spaces import HasSizes

Loss = Callable[[nn.Module, Any], Tensor]


# --- mathematics ------------------------------------------------------------------------------------


def hutchinson_trace(
    loss: Tensor, parameters: Sequence[Tensor], samples: int, generator: torch.Generator | None = None
) -> list[float]:
    """Estimate of tr(d2 loss / dp^2) of each parameter: the mean of v^T H v over so many draws of signs v.

    Args:
        loss: a scalar whose graph can be differentiated twice.
        parameters: those it depends on; a trace is that of the diagonal block.
        samples: draws; each costs a backward pass through the gradient.
        generator: of the signs.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    # A loss that is linear in a parameter has a gradient without a graph: its curvature is 0.
    curved = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    totals = [0.0] * len(parameters)
    for _ in range(samples):
        signs = [torch.randint(0, 2, p.shape, generator=generator).to(p.device, p.dtype) * 2 - 1 for p in parameters]
        # One v for all layers at once would mix in what couples them: off-diagonal blocks are 0 in the mean alone.
        for i in curved:
            gradient = gradients[i]
            assert gradient is not None
            (product,) = torch.autograd.grad(gradient, parameters[i], signs[i], retain_graph=True, allow_unused=True)
            totals[i] += 0.0 if product is None else float((product * signs[i]).sum(dtype=torch.float64))
    return [total / samples for total in totals]


def z_scores(values: Sequence[float]) -> list[float]:
    """Mean 0 and deviation 1; zeros where all are equal."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / deviation if deviation else 0.0 for v in values]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The mean cross-entropy of a classifier on (inputs, classes)."""
    return F.cross_entropy(tensor_of(call(model, batch)).float(), batch[1])


# --- the probe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """What was found.

    Attributes:
        table: a row for each weight, in the model's order: `name`, `trace`, `error` (||Q(W) - W||^2), `hessian` S,
            `interlayer` D, `score`, and `place` in the order, 1 being rounded first.
        cost: what it took.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]

    def order(self, by: str = "score") -> list[str]:
        """Names of the weights, those of least sensitivity first; by "score", "hessian", "interlayer" or "error"."""
        return [row["name"] for row in sorted(self.table, key=lambda row: row[by])]

    def plot(self) -> str:
        """The scores over the least of them, in SVG."""
        low = min(row["score"] for row in self.table)
        span = max(row["score"] for row in self.table) - low or 1.0
        rows = [(row["name"], (row["score"] - low) / span, f"{row['score']:+.2f}") for row in self.table]
        return bars(rows, "sensitivity of layers", "curvature and disturbance of each layer", left=260, right=70)


class InterlayerSensitivity:
    """The probe: what rounding each weight costs, by curvature and beside other rounded layers.

    Args:
        bits: of the rounding, or a scheme.
        loss: of a model on a batch, a mean over examples; the cross-entropy of a classifier by default.
        samples: draws of signs for a trace.
        pairs: other layers beside which each is rounded; 0 leaves D out.
        seed: of both.

    Raises:
        BadInput: there would be no draw, or less than no pair.
    """

    reads = "batch"

    def __init__(
        self,
        bits: int | str | Scheme = 4,
        loss: Loss = cross_entropy,
        *,
        samples: int = 32,
        pairs: int = 4,
        seed: int = 0,
    ):
        if samples < 1 or pairs < 0:
            raise BadInput(f"hessian_interlayer: samples={samples} and pairs={pairs}: at least 1 and 0 are needed")
        self.scheme, self.loss, self.samples, self.pairs, self.seed = scheme_of(bits), loss, samples, pairs, seed

    def __call__(self, model: nn.Module, data: Any) -> Sensitivity:
        """What it finds on a batch (inputs, classes), or on several.

        Raises:
            BadInput: there is no data, a loss that is not finite, or a layer that is packed.
        """
        began = time.perf_counter()
        batches = _labelled(data)
        generator = torch.Generator().manual_seed(self.seed)
        weights = weights_of(model)
        names = list(weights)
        with evaluating(model):
            traces = self._traces(model, weights, batches, generator)
            with torch.no_grad():
                errors = [
                    float((w.rounded(self.scheme) - w.parameter).double().square().sum()) for w in weights.values()
                ]
                beside, passes = self._beside(model, weights, batches, generator)
        hessian = [t / weights[n].parameter.numel() * e for n, t, e in zip(names, traces, errors, strict=True)]
        score = [a + b for a, b in zip(z_scores(hessian), z_scores(beside), strict=True)]
        place = {i: rank for rank, i in enumerate(sorted(range(len(names)), key=lambda i: (score[i], i)), 1)}
        table = [
            {
                "name": name, "trace": traces[i], "error": errors[i], "hessian": hessian[i], "interlayer": beside[i],
                "score": score[i], "place": place[i],
            }
            for i, name in enumerate(names)
        ]  # fmt: skip
        backward = len(batches) * (1 + self.samples * len(names))
        cost = {"forward passes": passes + len(batches), "backward passes": backward}
        return Sensitivity(table, cost | {"seconds": time.perf_counter() - began})

    def _traces(
        self, model: nn.Module, weights: Mapping[str, Weight], batches: Sequence[Any], generator: torch.Generator
    ) -> list[float]:
        totals = [0.0] * len(weights)
        # Fused attention kernels have no second derivative.
        with _trainable([w.parameter for w in weights.values()]) as parameters, torch.enable_grad():
            for batch in batches:
                with sdpa_kernel(SDPBackend.MATH):
                    loss = self._finite(self.loss(model, batch))
                    for i, trace in enumerate(hutchinson_trace(loss, parameters, self.samples, generator)):
                        totals[i] += trace / len(batches)
        return totals

    def _beside(
        self, model: nn.Module, weights: Mapping[str, Weight], batches: Sequence[Any], generator: torch.Generator
    ) -> tuple[list[float], int]:
        """D of each weight, and forward passes."""
        names = list(weights)
        known: dict[frozenset[int], float] = {}

        def loss_of(*places: int) -> float:
            key = frozenset(places)
            if key not in known:
                with rounded(weights, {names[i]: self.scheme for i in key}):
                    total = sum(float(self._finite(self.loss(model, batch))) for batch in batches)
                known[key] = total / len(batches)
            return known[key]

        found = []
        for i in range(len(names)):
            others = [j for j in torch.randperm(len(names), generator=generator).tolist() if j != i][: self.pairs]
            rises = [loss_of(i, j) - loss_of(j) for j in others]
            found.append(sum(rises) / len(rises) if rises else 0.0)
        return found, len(known) * len(batches)

    @staticmethod
    def _finite(loss: Tensor) -> Tensor:
        if loss.numel() != 1 or not bool(torch.isfinite(loss.detach()).all()):
            raise BadInput(
                f"hessian_interlayer: the loss is {loss.detach().flatten()[:3].tolist()}: one finite number is needed"
            )
        return loss


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield parameters
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _labelled(data: Any) -> list[Any]:
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    return [tuple(data)] if pair else batches_of(data)


# --- the search -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BisectedBits:
    """What `bisect_bits` found.

    Attributes:
        bits: name -> bits.
        metric: of that choice.
        trials: each choice that was evaluated, and its metric.
    """

    bits: dict[str, int]
    metric: float
    trials: list[tuple[dict[str, int], float]] = field(repr=False)


def bisect_bits(
    order: Sequence[str],
    bits: Sequence[int],
    evaluate: Callable[[dict[str, int]], float],
    tolerance: float = 0.99,
    baseline: float | None = None,
) -> BisectedBits:
    """Bits of each layer, by bisection along an order; see `laconic.core.allocate.bisect`.

    Args:
        order: names of layers, the least sensitive first.
        bits: from the most to the fewest; every layer begins with the first.
        evaluate: the metric with these bits, higher is better and positive.
        tolerance: the share of the baseline that must be kept.
        baseline: by default the metric with every layer at bits[0].

    Raises:
        BadInput: a name stands twice, or bits that do not fall.
        Impossible: not even every layer at bits[0] keeps it.
    """
    names = list(order)
    if len(set(names)) != len(names):
        raise BadInput("bisect_bits: a layer stands twice in the order")
    if any(a <= b for a, b in zip(bits, bits[1:], strict=False)) or not bits:
        raise BadInput(f"bisect_bits: bits are given from the most to the fewest, not {tuple(bits)}")

    def of(choice: Sequence[int]) -> dict[str, int]:
        return {name: bits[option] for name, option in zip(names, choice, strict=True)}

    first: list[tuple[dict[str, int], float]] = []
    if baseline is None:
        start = of([0] * len(names))
        baseline = float(evaluate(start))
        first = [(start, baseline)]
    found: Bisected = bisect(
        range(len(names)), range(len(bits)), lambda choice: evaluate(of(choice)), tolerance * baseline
    )
    return BisectedBits(of(found.choice), found.result, first + [(of(c), value) for c, value in found.trials])


class BisectionSearch(Bisection):
    """The search: bisection along an order of the space's decisions, told the metric alone.

    Args:
        space: every decision is a layer, with the same numbers of bits from the most to the fewest as its values.
        seed: taken for the sake of all searches; nothing is drawn.
        order: numbers of decisions, the least sensitive first; the model's order by default.
        least: the metric that a choice must reach.

    Raises:
        BadInput: decisions have different numbers of values, or the order does not name each once.
    """

    def __init__(self, space: HasSizes, seed: int = 0, *, order: Sequence[int] | None = None, least: float):
        sizes = tuple(space.sizes)
        if len(set(sizes)) != 1:
            raise BadInput(f"a bisection needs decisions with equally many values; these have {sizes}")
        super().__init__(range(len(sizes)) if order is None else order, range(sizes[0]), least)


CARD = Card(
    id="hessian_interlayer",
    title="Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization",
    authors="Schaefer, Lambert-Shirzad, Zhang, Chou, Jablin, Li, Guo, Stanton, Joshi, Wang",
    year=2023,
    source="arXiv 2306.04879",
    family="quant",
    summary="Orders layers by curvature and by how they disturb one another, and bisects along it with real evaluations.",
    objects={"InterlayerSensitivity": "Probe", "BisectionSearch": "Search"},
    use="Where a metric must be kept within a bound, real evaluations are affordable, and losses of layers do not add up.",
    avoid="Under a budget of bytes or time: an integer program over measured costs keeps that budget and is optimal.",
    composes=("layer_bits", "rtn", "gptq"),
    code="none found",
    claim={
        "text": "At 99 % of the accuracy, bisection along the order by curvature and disturbance reaches fewer bits than "
        "along a random one.",
        "metric": "mean bits of a weight",
        "direction": "lower",
        "margin": 0.25,
        "arms": ("random", "augmented"),
        "seeds": 5,
        "minutes": 2,
        "task": "digits",
    },
)
