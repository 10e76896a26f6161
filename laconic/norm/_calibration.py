"""`calibration`: does a network that says "90 % sure" get nine of ten right, and the measures of how far it is off.

Of the probabilities p (n, k) of n examples with classes y, the confidence c_i = max_j p_ij goes into bins (lo, hi].
With n_b examples in bin b, acc_b the share of them that is right and conf_b their mean confidence:

    ECE = sum_b (n_b / n) |acc_b - conf_b|          norm 1; norm r: (sum_b (n_b / n) |acc_b - conf_b|^r)^(1/r)
    MCE = max_b |acc_b - conf_b|                    over bins that hold something

A confidence of exactly 0 lies in no bin. `CalibrationProbe` shows these before and after the calibrators, which are
fitted on other data than they are judged by:

    p = softmax(z / T)                              `TemperatureScaling`: one T for all, the order of classes stays
    p = softmax(W z + b)                            `MatrixScaling`; W diagonal: `VectorScaling`
    p_j = g_j(softmax(z)_j) over their sum          one versus all: `HistogramBinning`, `IsotonicCalibration`, `BBQ`

Source: "On Calibration of Modern Neural Networks", Guo, Pleiss, Sun, Weinberger, 2017, arXiv 1706.04599. Official code:
gpleiss/temperature_scaling, MIT. We differ from it: T is the exact minimum, found in log T between bounds, where a few
steps of L-BFGS may stop short; bins are compared in float64.

T folds into the last layer: weight and bias over T. Look at it whenever a threshold or a cost hangs on a probability,
and before and after compressing: accuracy can stay while confidence goes astray. ECE depends on the bins, and is biased
upwards with few examples: report them with it, and compare models on the same examples.

Example:
    >>> import torch
    >>> sure = torch.tensor([[0.9, 0.1]] * 10)
    >>> right = torch.tensor([0] * 6 + [1] * 4)
    >>> round(ece(sure, right), 3), round(mce(sure, right), 3)
    (0.3, 0.3)
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from xml.sax.saxutils import escape

import numpy as np
import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.modes import evaluating
from laconic.errors import BadInput

from ._binning import HistogramBinning, IsotonicCalibration, bin_edges, probabilities
from ._logit_scaling import TemperatureScaling, VectorScaling

BINS = 15
# Of the true class, in the log-likelihood alone: binning methods give zeros.
SMALLEST = 1e-12


# --- mathematics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy by bin.

    Attributes:
        edges: (B + 1,) float64.
        count: (B,) examples.
        accuracy: (B,) share of them that is right; NaN in an empty bin.
        confidence: (B,) their mean confidence; NaN in an empty bin.
        total: examples in all, those in no bin included.
    """

    edges: Tensor
    count: Tensor
    accuracy: Tensor
    confidence: Tensor
    total: int

    def gap(self, norm: float = 1.0) -> float:
        """The gap of the bins weighted by their share, in this norm; infinity is the largest gap."""
        held = self.count > 0
        off = (self.accuracy - self.confidence)[held].abs()
        if not off.numel():
            return math.nan
        if math.isinf(norm):
            return float(off.max())
        return float((self.count[held] / self.total * off**norm).sum() ** (1 / norm))


def confidence(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """c (n,) in float64 and whether the class is right (n,) in bool.

    Args:
        probs: (n, k), or (n,) confidences whose `labels` say whether each was right.
        labels: (n,) classes.

    Raises:
        ValueError: shapes that do not fit, no examples, or values that are no probabilities.
    """
    if probs.ndim not in (1, 2) or labels.shape != probs.shape[:1] or not len(probs):
        raise ValueError(
            f"probabilities of shape {tuple(probs.shape)} and labels of shape {tuple(labels.shape)}: they must be "
            "(n, k) and (n,), or both (n,), with n of at least 1"
        )
    values = probs.detach().double()
    if not bool(((values >= 0) & (values <= 1 + 1e-6)).all()):
        raise ValueError("probabilities must be within 0 and 1: of logits, take the softmax first")
    if probs.ndim == 1:
        return values, labels.bool()
    best = values.max(1)
    return best.values, best.indices == labels


def reliability(probs: Tensor, labels: Tensor, bins: int = BINS, equal: str = "width") -> Reliability:
    """Confidence and accuracy by bin.

    Args:
        probs: see `confidence`.
        labels: see `confidence`.
        bins: how many.
        equal: "width" on [0, 1], or "mass": as many examples in each, as far as values differ.
    """
    sure, right = confidence(probs, labels)
    edges = bin_edges(sure, bins, equal)
    at = torch.bucketize(sure, edges) - 1  # (lo, hi]
    inside = at >= 0
    at, sure, right = at[inside], sure[inside], right[inside].double()
    size = len(edges) - 1
    count = torch.bincount(at, minlength=size)
    # Sums over no example are 0, and 0 / 0 is NaN.
    accuracy = torch.bincount(at, right, size) / count
    return Reliability(edges, count, accuracy, torch.bincount(at, sure, size) / count, len(probs))


def ece(probs: Tensor, labels: Tensor, bins: int = BINS, norm: float = 1.0, equal: str = "width") -> float:
    """Expected calibration error; arguments as those of `reliability`, and the norm of the gaps."""
    if not norm >= 1:
        raise ValueError(f"ece: norm={norm} is below 1")
    return reliability(probs, labels, bins, equal).gap(norm)


def mce(probs: Tensor, labels: Tensor, bins: int = BINS, equal: str = "width") -> float:
    """Maximum calibration error; arguments as those of `reliability`."""
    return reliability(probs, labels, bins, equal).gap(math.inf)


# --- the probe --------------------------------------------------------------------------------------


class Calibrator(Protocol):
    """What turns logits (n, k) into calibrated probabilities (n, k)."""

    def fit(self, logits: Tensor, labels: Tensor) -> Calibrator: ...

    def transform(self, logits: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        table: a row for each method, "as it is" first: method, accuracy, nll (nats), brier, ece, mce.
        curves: method -> its reliability.
        cost: forward passes, examples, seconds.
    """

    table: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Reliability]
    cost: Mapping[str, float]

    def plot(self) -> str:
        """A reliability diagram for each method, in SVG: bars are accuracy, lines the mean confidence of the bin."""
        panels = [
            _panel(row["method"], row["ece"], self.curves[row["method"]], i % COLUMNS, i // COLUMNS)
            for i, row in enumerate(self.table)
        ]
        width = 20 + PANEL * min(COLUMNS, len(panels))
        height = 20 + PANEL * math.ceil(len(panels) / COLUMNS)
        page = f'<rect class="page" width="{width}" height="{height}"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        label = "; ".join(f"{row['method']}: ECE {row['ece']:.3f}" for row in self.table)
        return f'{head} aria-label="{escape(label)}"><style>{STYLE}</style>{page}{"".join(panels)}</svg>'


class CalibrationProbe:
    """The probe: calibration of a classifier on held-out data, before and after calibrators.

    Args:
        bins: of ECE, MCE and the plot.
        calibrators: name -> calibrator, fitted on copies; temperature, vector, histogram and isotonic by default.
        batch_size: examples to a forward pass, where data come as whole tensors.
    """

    reads = "labelled"

    def __init__(
        self, bins: int = BINS, calibrators: Mapping[str, Calibrator] | None = None, *, batch_size: int = 256
    ):
        self.bins, self.batch_size = bins, batch_size
        self.calibrators: Mapping[str, Any] = calibrators if calibrators is not None else {
            "temperature": TemperatureScaling(),
            "vector scaling": VectorScaling(),
            "histogram": HistogramBinning(bins),
            "isotonic": IsotonicCalibration(),
        }  # fmt: skip

    def __call__(self, model: nn.Module, data: Any, fit_on: Any = None) -> Finding:
        """What it finds of a model.

        Args:
            model: input -> logits (n, k); runs in evaluation mode.
            data: (inputs, classes) as two tensors, or batches of such pairs; held out.
            fit_on: likewise, other examples, to fit the calibrators on; without it there is none.

        Raises:
            BadInput: there is no example, or the outputs are no logits of the classes.
        """
        began = time.perf_counter()
        logits, labels, passes = self._outputs(model, data)
        found = {"as it is": probabilities(logits)}
        fitted = 0
        if fit_on is not None:
            held, classes, more = self._outputs(model, fit_on)
            passes, fitted = passes + more, len(held)
            for name, calibrator in self.calibrators.items():
                found[name] = copy.deepcopy(calibrator).fit(held, classes).transform(logits)
        curves = {name: reliability(p, labels, self.bins) for name, p in found.items()}
        table = [{"method": name, **_scores(p, labels), **_gaps(curves[name])} for name, p in found.items()]
        seconds = time.perf_counter() - began
        return Finding(table, curves, {"forward passes": passes, "examples": len(labels) + fitted, "seconds": seconds})

    @torch.no_grad()
    def _outputs(self, model: nn.Module, data: Any) -> tuple[Tensor, Tensor, int]:
        held = next(iter(model.parameters()), torch.empty(0))
        with evaluating(model):
            pairs = [(model(x.to(held.device)), y) for x, y in self._batches(data)]
        if not pairs:
            raise BadInput("CalibrationProbe: there is no example to look at")
        logits = torch.cat([z.detach().cpu().float() for z, _ in pairs])
        labels = torch.cat([torch.as_tensor(y).cpu() for _, y in pairs])
        if logits.ndim != 2 or labels.ndim != 1 or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise BadInput(
                f"CalibrationProbe: outputs of shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: logits "
                "(n, k) and classes (n,) from 0 to k - 1 are needed"
            )
        return logits, labels, len(pairs)

    def _batches(self, data: Any) -> Iterator[tuple[Tensor, Tensor]] | Iterable[tuple[Tensor, Tensor]]:
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            inputs, labels = data
            return zip(inputs.split(self.batch_size), labels.split(self.batch_size), strict=True) if len(labels) else ()
        return data


def _scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    rows = torch.arange(len(labels))
    wanted = torch.zeros_like(probs)
    wanted[rows, labels] = 1.0
    return {
        "accuracy": float((probs.argmax(1) == labels).double().mean()),
        "nll": float(-probs[rows, labels].clamp(min=SMALLEST).log().mean()),
        "brier": float((probs - wanted).square().sum(1).mean()),
    }


def _gaps(curve: Reliability) -> dict[str, float]:
    return {"ece": curve.gap(), "mce": curve.gap(math.inf)}


# --- the plot ---------------------------------------------------------------------------------------

PANEL, PAD, COLUMNS = 230, 44, 3
STYLE = (
    'text{font:12px system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif;fill:#1b1d21}'
    ".page{fill:#fff}.dim{fill:#5d636e}.axis{stroke:#c9ccd2;fill:none}.ideal{stroke:#a1a5ad;stroke-dasharray:4 4}"
    ".bar{fill:#1f5fd0}.gap{stroke:#b3261e;stroke-width:2.5}"
    "@media (prefers-color-scheme:dark){text{fill:#e8e9eb}.page{fill:#1c1f23}.dim{fill:#9da3ad}.axis{stroke:#484e57}"
    ".bar{fill:#7fb0ff}.gap{stroke:#ff8a80}}"
)


def _panel(name: str, error: float, curve: Reliability, column: int, row: int) -> str:
    """One diagram; a bin's bar is the fainter the fewer examples it holds."""
    side = PANEL - PAD - 16
    left, top = 20 + column * PANEL + PAD - 20, 40 + row * PANEL
    bottom = top + side - 20

    def x(value: float) -> float:
        return left + side * value

    def y(value: float) -> float:
        return bottom - (bottom - top) * value

    share = curve.count / max(1, int(curve.count.max()))
    drawn = [f'<text x="{left}" y="{top - 8}">{escape(name)} <tspan class="dim">ECE {100 * error:.1f} %</tspan></text>']
    for b in np.flatnonzero(curve.count.numpy()):
        a, c = x(float(curve.edges[b])), x(float(curve.edges[b + 1]))
        height, sure = float(curve.accuracy[b]), y(float(curve.confidence[b]))
        tip = f"{int(curve.count[b])} examples, {height:.3f} right, {float(curve.confidence[b]):.3f} sure"
        drawn.append(
            f'<rect class="bar" opacity="{0.3 + 0.7 * float(share[b]):.2f}" x="{a + 0.5:.1f}" y="{y(height):.1f}" '
            f'width="{max(1.0, c - a - 1):.1f}" height="{bottom - y(height):.1f}"><title>{tip}</title></rect>'
            f'<line class="gap" x1="{a:.1f}" x2="{c:.1f}" y1="{sure:.1f}" y2="{sure:.1f}"/>'
        )
    drawn.append(f'<line class="ideal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    drawn.append(f'<path class="axis" d="M{left} {top}V{bottom}H{x(1)}"/>')
    for tick in (0.0, 0.5, 1.0):
        drawn.append(f'<text class="dim" text-anchor="middle" x="{x(tick)}" y="{bottom + 15}">{tick:g}</text>')
        drawn.append(f'<text class="dim" text-anchor="end" x="{left - 5}" y="{y(tick) + 4}">{tick:g}</text>')
    return "".join(drawn)


CARD = Card(
    id="calibration",
    title="On Calibration of Modern Neural Networks",
    authors="Guo, Pleiss, Sun, Weinberger",
    year=2017,
    source="arXiv 1706.04599",
    family="norm",
    summary="Shows whether a classifier's confidence is its accuracy, and repairs it on held-out data.",
    objects={"CalibrationProbe": "Probe"},
    use="Whenever a threshold or a cost hangs on a probability, and before and after compressing a classifier.",
    avoid="With fewer than some hundred held-out examples: the error of the measure is larger than what it measures.",
    composes=("kd_toolbox", "rtn", "gptq"),
    vectors=("calibration",),
    code="gpleiss/temperature_scaling, MIT; EFS-OpenSource/calibration-framework (not the authors'), Apache-2.0",
    claim={
        "text": "Dividing the logits of an over-fitted network by one temperature, fitted on held-out examples, "
        "at least halves its expected calibration error.",
        "metric": "log2 of the expected calibration error in 15 bins",
        "direction": "lower",
        "margin": 1.0,
        "arms": ("as trained", "temperature"),
        "seeds": 5,
        "minutes": 3,
        "task": "mnist-mlp",
    },
)
