"""`neural_redshift`: the spectrum by hand, the parse by hand, degenerate functions, and the recorded vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import (
    NeuralRedshift,
    RandomNetwork,
    binarize,
    complexity,
    grid_points,
    lz78_phrases,
    mean_frequency,
    random_network_profile,
    redraw_,
)
from laconic.testing import Case, Example


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


EXAMPLES = [
    Example(
        lambda: NeuralRedshift((0.5, 5.0), grid=8, seeds=2),
        kind="Probe",
        inputs=lambda g: [network(), torch.randn(4, 5)],
    )
]


def run_vector(case: Case):
    args = case.args
    if "dims" in args:
        model = RandomNetwork(args["dims"], args["activation"], activation_on_last=args["activation_on_last"])
        for layer, weight, bias in zip(model.layers, case.arrays("weight"), case.arrays("bias"), strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        points = grid_points(args["grid"], args["dims"][0], args["grid_low"], args["grid_high"])
        return {"output": model(points).reshape(args["grid"], args["grid"])}
    if "mean_frequency" in case:
        return {"mean_frequency": torch.tensor(mean_frequency(case.array("input")), dtype=torch.float64)}
    if "lz" in case:
        return {"lz": torch.tensor(lz78_phrases(case.array("bits").tolist()))}
    return {"bits": binarize(case.array("input"))}


def test_the_equation():
    """The spectrum by a double sum, on a small grid."""
    n = 6
    values = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = n // 2 + 1
    weights, total = 0.0, 0.0
    for i in range(kept):
        for j in range(kept):
            if i == j == 0:
                continue
            real = sum(
                values[r, c].item() * complex(math.cos(angle), -math.sin(angle))
                for r in range(n)
                for c in range(n)
                for angle in [2 * math.pi * (i * r + j * c) / n]
            )
            radius = round(math.hypot(i, j))
            weights += radius * abs(real)
            total += abs(real)
    largest = round(math.hypot(kept - 1, kept - 1))
    assert mean_frequency(values) == pytest.approx(weights / total / largest)


def test_a_wave_has_its_own_frequency():
    n = 64
    x = torch.arange(n, dtype=torch.float64) / n
    for k in (3, 11):
        wave = torch.cos(2 * math.pi * k * x)
        assert mean_frequency(wave) == pytest.approx(k / (n // 2))
        assert mean_frequency(wave[:, None].expand(n, n)) == pytest.approx(k / round(math.hypot(n // 2, n // 2)))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
def test_a_constant_is_simple(value):
    assert mean_frequency(torch.full((16, 16), value)) == 0.0
    assert complexity(lambda points: torch.full((len(points),), value), grid=16) == 0.0


def test_scale_does_not_matter():
    values = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    assert mean_frequency(1000 * values) == pytest.approx(mean_frequency(values), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [("", 0), ("a", 1), ("aa", 1), ("aaa", 2), ("abab", 3), ("aaaaaa", 3), ("abcabc", 4), ("1011010100010", 7)],
)
def test_the_parse(text, phrases):
    """a|aa|aaa; a|b|ab; a|b|c|ab|(c); 1|0|11|01|010|00|10"""
    assert lz78_phrases(text) == phrases


def test_amplitude_makes_tanh_complex_and_relu_not():
    rows = {
        act: random_network_profile(lambda depth, act=act: RandomNetwork([2, *[32] * depth, 1], act), (0.3, 10.0), (2,), 3, grid=32)
        for act in ("relu", "tanh")
    }  # fmt: skip
    rise = {act: found[1]["complexity"] - found[0]["complexity"] for act, found in rows.items()}
    assert rise["tanh"] > rise["relu"] + 0.05


def test_redrawing_is_seeded_and_leaves_norms():
    one, two = (redraw_(network(), 2.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one[0].weight, two[0].weight) and torch.equal(one[1].weight, torch.ones(8))
    assert one[0].weight.abs().max() <= 2 and one[0].bias.abs().max() > 0


def test_other_dimensions_and_measures():
    assert 0 < complexity(lambda points: torch.sin(9 * points.sum(1)), dim=3, grid=12) < 1
    assert 0 < complexity(lambda points: torch.sin(9 * points.sum(1)), dim=1, grid=64, measure="lz") < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: complexity(lambda p: p, measure="poly"), "fourier or lz"),
        (lambda: complexity(lambda p: p, grid=1), "two points"),
        (lambda: complexity(lambda p: p / 0, grid=3), "not finite"),
        (lambda: RandomNetwork([2, 2], "swoosh"), "no activation 'swoosh'"),
        (lambda: NeuralRedshift(()), "must be positive"),
        (lambda: NeuralRedshift()(network(), torch.ones(4, 5)), "three different examples are needed, and there are 1"),
        (lambda: NeuralRedshift()(network(), torch.ones(4, 5, dtype=torch.int64)), "floating point"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(BadInput, match=message):
        make()
