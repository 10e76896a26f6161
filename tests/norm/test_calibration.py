"""`calibration`: the measures on hand-made cases, every calibrator against its definition, and the recorded vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.norm import (
    BBQ,
    CalibrationProbe,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    VectorScaling,
    ece,
    mce,
    reliability,
)
from laconic.norm._binning import probabilities
from laconic.norm._calibration import confidence
from laconic.testing import Example
from laconic.testing.vectors import Case


def classifier(generator: torch.Generator) -> nn.Module:
    """A network that is surer than it should be, with a layer that training mode changes."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return model


def data(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


EXAMPLES = [
    Example(lambda: CalibrationProbe(), kind="Probe", inputs=lambda g: [classifier(g), data(g, 60), data(g, 40)]),
]


def run_vector(case: Case) -> dict[str, Tensor]:
    """What was recorded of a measure or a calibrator."""
    args = case.args
    if case.what == "metric":
        if "confidence" in case and "mce" in case:
            return {"mce": torch.tensor(mce(case.array("confidence"), case.array("correct"), args["bins"]))}
        probs, labels = probabilities(case.array("logits")), case.array("label")
        if "ece" in case:
            return {"ece": torch.tensor([ece(probs, labels, args["bins"])])}
        sure, right = confidence(probs, labels)
        return {"confidence": sure, "correct": right.to(torch.int64)}
    if case.what == "optimizer":
        logits, labels = case.array("logits"), case.array("label")
        scaling = TemperatureScaling(tuple(args["bounds_log_t"])).fit(logits, labels)

        def nll(z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(z.double(), labels)

        return {
            "temperature": torch.tensor(scaling.temperature_),
            "nll_before": nll(logits),
            "nll_after": nll(scaling.logits(logits.double())),
            "ece_after": torch.tensor([ece(scaling.transform(logits), labels, args["bins"])]),
        }
    kind = case.name.split("_")[0]
    if kind == "histogram":
        calibrator = HistogramBinning(args["bins"], args.get("equal", "width"))
    elif kind == "isotonic":
        calibrator = IsotonicCalibration()
    else:
        calibrator = BBQ(equal=args["equal"], score=args["score"], elbow=args["elbow_alpha"])
        assert calibrator.bins(args["num_samples"]) == range(args["bins_min"], args["bins_max"] + 1)
    scores, labels = ("logits", "label") if "logits" in case else ("confidence", "correct")
    x, y = case.array(scores), case.array(labels)
    return {"output": calibrator.fit(x, y).transform(x)}


def over_confident(n: int = 4000, k: int = 4, factor: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits whose classes are drawn from them, times a factor."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(n, k, generator=generator)
    return factor * z, torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]


def test_the_equation() -> None:
    sure = torch.tensor([0.95, 0.92, 0.97, 0.55, 0.5, 0.51, 0.0])
    right = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    curve = reliability(sure, right, bins=10)
    assert curve.count.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 3]  # 0.5 lies in (0.4, 0.5], and 0 in none
    gaps = [abs(2 / 3 - 2.84 / 3), abs(1 / 2 - 1.06 / 2), abs(0 - 0.5)]
    assert ece(sure, right, 10) == pytest.approx((3 * gaps[0] + 2 * gaps[1] + gaps[2]) / 7)
    assert mce(sure, right, 10) == pytest.approx(0.5)
    squares = (3 * gaps[0] ** 2 + 2 * gaps[1] ** 2 + gaps[2] ** 2) / 7
    assert ece(sure, right, 10, norm=2) == pytest.approx(squares**0.5)


def test_bins_of_equal_mass() -> None:
    sure = torch.linspace(0.01, 0.99, 30)
    assert reliability(sure, torch.ones(30), 3, equal="mass").count.tolist() == [10, 10, 10]
    assert reliability(torch.full((9,), 0.7), torch.ones(9), 3, equal="mass").count.tolist() == [9, 0]


def test_the_temperature_is_found_again() -> None:
    z, y = over_confident()
    scaling = TemperatureScaling().fit(z, y)
    assert scaling.temperature_ == pytest.approx(3.0, rel=0.05)
    assert torch.equal(scaling.transform(z).argmax(1), z.argmax(1))
    assert ece(scaling.transform(z), y) < 0.02 < 0.1 < ece(probabilities(z), y)
    losses = [float(nn.functional.cross_entropy(z / (scaling.temperature_ * f), y)) for f in (0.99, 1.0, 1.01)]
    assert losses[1] == min(losses)


def test_temperatures_at_the_bounds() -> None:
    z, y = over_confident(50)
    assert TemperatureScaling((-2, 2)).fit(z, z.argmax(1)).temperature_ == pytest.approx(math.exp(-2))
    assert TemperatureScaling((-2, 2)).fit(z, z.argmin(1)).temperature_ == pytest.approx(math.exp(2))
    assert TemperatureScaling().fit(torch.ones(5, 3), torch.zeros(5)).temperature_ == 1.0


def test_vector_and_matrix_scaling_undo_what_was_done() -> None:
    z, y = over_confident(6000, 3, 1.0)
    factor, offset = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.5])
    vector = VectorScaling().fit(z * factor + offset, y)
    torch.testing.assert_close(vector.weight_, 1 / factor.double(), rtol=0.15, atol=0.05)
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    matrix = MatrixScaling().fit(z @ mix.T, y)
    together = matrix.weight_ @ mix.double()
    centred = together - together.mean(0)  # a constant added to all logits changes nothing
    torch.testing.assert_close(centred, torch.eye(3).double() - 1 / 3, rtol=0, atol=0.15)
    assert float(MatrixScaling(ridge=1e6).fit(z, y).bias_.abs().max()) < 1e-5
    for p in (vector.transform(z), matrix.transform(z)):
        torch.testing.assert_close(p.sum(1), torch.ones(len(z)).double())


def test_histograms() -> None:
    x, right = torch.tensor([0.1, 0.15, 0.9, 1.0, 0.0]), torch.tensor([0, 1, 1, 1, 0])
    out = HistogramBinning(4).fit(x, right).transform(torch.tensor([0.2, 0.4, 0.99, 0.6]))
    assert out.tolist() == pytest.approx([1 / 3, 0.375, 1.0, 0.625])  # empty bins give their centre


def test_isotonic_is_the_best_that_never_falls() -> None:
    generator = np.random.default_rng(0)
    x, right = generator.random(7), generator.integers(0, 2, 7)
    order = np.argsort(x)
    fitted = IsotonicCalibration().fit(torch.from_numpy(x), torch.from_numpy(right)).transform(torch.from_numpy(x))
    values = fitted.numpy()[order]
    assert (np.diff(values) >= 0).all()
    # Min-max formula: the value at i is the largest over a <= i of the smallest mean of a..b over b >= i.
    y = right[order]
    for i in range(7):
        expected = max(min(y[a : b + 1].mean() for b in range(i, 7)) for a in range(i + 1))
        assert values[i] == pytest.approx(expected)
    ties = IsotonicCalibration().fit(torch.tensor([0.5, 0.5, 0.7]), torch.tensor([1, 0, 1]))
    assert ties.transform(torch.tensor([0.2, 0.5, 0.6, 0.9])).tolist() == pytest.approx([0.5, 0.5, 0.75, 1.0])


def test_the_evidence_of_bbq() -> None:
    x, right = torch.linspace(0.05, 0.95, 20), (torch.arange(20) % 3 == 0).long()
    calibrator = BBQ(C=1.0, equal="width")
    assert calibrator.bins(20) == range(2, 4)

    def integral(a: float, b: float) -> float:
        return math.gamma(a) * math.gamma(b) / math.gamma(a + b)

    likelihoods, outputs = [], []
    for bins in (2, 3):
        product, theta = 1.0, []
        for i in range(bins):
            inside = ((x > i / bins) & (x <= (i + 1) / bins)).tolist()
            m = sum(int(r) for r, held in zip(right.tolist(), inside, strict=True) if held)
            n, centre, each = sum(inside), (i + 0.5) / bins, 2.0 / bins
            alpha, beta = each * centre, each * (1 - centre)
            product *= integral(m + alpha, n - m + beta) / integral(alpha, beta)
            theta.append((m + alpha) / (n + each))
        likelihoods.append(product)
        outputs.append(theta[0])
    expected = sum(a * b for a, b in zip(likelihoods, outputs, strict=True)) / sum(likelihoods)
    assert float(calibrator.fit(x, right).transform(torch.tensor([0.1]))[0]) == pytest.approx(expected)


@pytest.mark.parametrize("make", [HistogramBinning, IsotonicCalibration, BBQ])
def test_one_versus_all(make) -> None:
    z, y = over_confident(900, 3)
    p = make().fit(z, y).transform(z)
    torch.testing.assert_close(p.sum(1), torch.ones(900).double())
    assert ece(p, y) < ece(probabilities(z), y) / 2


def test_a_row_of_zeros_becomes_uniform() -> None:
    z = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    wrong = HistogramBinning(2).fit(z, torch.tensor([1, 0]))
    wrong.maps_ = [lambda x: np.zeros_like(x)] * 2
    assert wrong.transform(z).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_the_probe_tells_before_from_after() -> None:
    z, y = over_confident()
    finding = CalibrationProbe(10, {"T": TemperatureScaling()})(
        nn.Identity(), (z[:2000], y[:2000]), fit_on=[(z[2000:3000], y[2000:3000]), (z[3000:], y[3000:])]
    )
    before, after = finding.table
    assert [before["method"], after["method"]] == ["as it is", "T"]
    assert after["ece"] < before["ece"] / 3 and after["nll"] < before["nll"] and after["accuracy"] == before["accuracy"]
    assert before["ece"] == pytest.approx(ece(probabilities(z[:2000]), y[:2000], 10))
    assert finding.cost["forward passes"] == 10 and finding.cost["examples"] == 4000
    assert "T <tspan" in finding.plot() and finding.plot().count('class="gap"') >= 10
    (alone,) = CalibrationProbe()(nn.Identity(), (z, y)).table
    assert alone["method"] == "as it is"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ece(torch.tensor([2.0]), torch.tensor([1])), ValueError, "softmax first"),
        (lambda: ece(torch.zeros(0, 3), torch.zeros(0)), ValueError, "at least 1"),
        (lambda: ece(torch.ones(2), torch.ones(2), bins=0), ValueError, "at least one bin"),
        (lambda: ece(torch.ones(2), torch.ones(2), norm=0.5), ValueError, "norm=0.5"),
        (lambda: TemperatureScaling((1.0, 0.0)), ValueError, "must rise"),
        (lambda: TemperatureScaling().fit(torch.ones(2, 2), torch.ones(3)), ValueError, r"labels of shape \(3,\)"),
        (lambda: VectorScaling(-1.0), ValueError, "ridge=-1.0"),
        (lambda: HistogramBinning().transform(torch.ones(3)), ValueError, "call fit"),
        (lambda: IsotonicCalibration().fit(torch.tensor([1.5]), torch.ones(1)), ValueError, "within 0 and 1"),
        (lambda: BBQ(score="aic"), ValueError, "score='aic'"),
        (lambda: CalibrationProbe()(nn.Identity(), []), BadInput, "no example"),
        (lambda: CalibrationProbe()(nn.Identity(), (torch.ones(3, 2), torch.full((3,), 2))), BadInput, "0 to k - 1"),
    ],
)
def test_refusals(make, error, says: str) -> None:
    with pytest.raises(error, match=says):
        make()
