"""`hessian_interlayer`: traces against the whole Hessian, the score written out, bisection, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.errors import BadInput, Impossible
from laconic.quant import BisectionSearch, InterlayerSensitivity, bisect_bits, hutchinson_trace
from laconic.quant._hessian_interlayer import cross_entropy, z_scores
from laconic.quant._rounded import rounded, scheme_of, weights_of
from laconic.search import Space
from laconic.tasks.small.networks import CharacterModel
from laconic.testing import Example

SPACE = Space({name: (8, 4, 2) for name in "abcd"})
LOSS = (0.5, 0.01, 0.03, 0.001)


def metric(candidate) -> float:
    return 1 - sum(loss * (0, 1, 4)[option] for loss, option in zip(LOSS, candidate, strict=True))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)


EXAMPLES = [
    Example(lambda: InterlayerSensitivity(3, samples=2), kind="Probe", inputs=lambda g: [net(), batch()]),
    Example(
        # d, b and c go to 4 bits, then d alone to 2 beside them.
        lambda space, seed: BisectionSearch(space, seed, order=(3, 1, 2, 0), least=0.95),
        kind="Search",
        name="BisectionSearch",
        inputs=[SPACE, metric],
        stated={"optimum": (0, 1, 1, 2)},
    ),
]


def test_traces_are_those_of_the_blocks_of_the_whole_hessian() -> None:
    model, (x, y) = net().double().eval(), batch()
    names = ["0.weight", "3.weight", "5.weight"]
    parameters = [model.get_parameter(name) for name in names]

    def loss(*values):
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, values, strict=True)), x.double()), y)

    whole = torch.autograd.functional.hessian(loss, tuple(parameters))
    exact = [whole[i][i].reshape(p.numel(), p.numel()).trace().item() for i, p in enumerate(parameters)]
    got = hutchinson_trace(loss(*parameters), parameters, 1500, torch.Generator().manual_seed(1))
    assert got == pytest.approx(exact, rel=0.1, abs=0.01)
    # Signs give the exact trace in one draw where the Hessian is diagonal.
    p = torch.randn(7, requires_grad=True)
    weight = torch.rand(7)
    assert hutchinson_trace((weight * p**2).sum(), [p], 1) == pytest.approx([2 * float(weight.sum())])
    assert hutchinson_trace((weight * p).sum(), [p], 1) == [0.0]


def test_the_score_written_out() -> None:
    model, data = net().eval(), batch()
    probe = InterlayerSensitivity(3, samples=4, pairs=2, seed=5)
    found = probe(model, data)
    weights, scheme = weights_of(model), scheme_of(3)
    hessian = []
    for row, weight in zip(found.table, weights.values(), strict=True):
        error = float((weight.rounded(scheme) - weight.parameter).detach().square().sum())
        assert row["error"] == pytest.approx(error, rel=1e-5)
        hessian.append(row["trace"] / weight.parameter.numel() * error)
    assert [row["hessian"] for row in found.table] == pytest.approx(hessian, rel=1e-5)
    # Three layers, two others each: every pair is looked at.
    names = list(weights)

    def loss(*rounded_names: str) -> float:
        with torch.no_grad(), rounded(weights, dict.fromkeys(rounded_names, scheme)):
            return float(cross_entropy(model, data))

    beside = [sum(loss(a, b) - loss(b) for b in names if b != a) / 2 for a in names]
    assert [row["interlayer"] for row in found.table] == pytest.approx(beside, rel=1e-3, abs=1e-6)
    want = [a + b for a, b in zip(z_scores(hessian), z_scores(beside), strict=True)]
    assert [row["score"] for row in found.table] == pytest.approx(want, abs=1e-3)
    assert found.order() == [row["name"] for row in sorted(found.table, key=lambda row: row["place"])]
    assert {row["interlayer"] for row in InterlayerSensitivity(3, samples=1, pairs=0)(model, data).table} == {0.0}


def test_scores_of_equal_values_and_of_two() -> None:
    assert z_scores([2.0, 2.0]) == [0.0, 0.0] and z_scores([1.0, 3.0]) == [-1.0, 1.0]


def test_through_attention_frozen_parameters_and_one_token() -> None:
    torch.manual_seed(0)
    model = CharacterModel(7, 4, width=8, heads=2, layers=1).requires_grad_(False)

    def loss(model, batch):
        return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    found = InterlayerSensitivity(2, loss, samples=1, pairs=1)(model, torch.tensor([[3]]))
    assert len(found.table) == 5 and all(math.isfinite(row["score"]) for row in found.table)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_bisect_bits() -> None:
    asked = []

    def accuracy(bits):
        asked.append(bits)
        return 1 - sum({8: 0, 4: 0.01, 2: 0.1}[b] * (name != "easy") for name, b in bits.items())

    found = bisect_bits(["easy", "x", "y", "z"], (8, 4, 2), accuracy, tolerance=0.98)
    assert found.bits == {"easy": 2, "x": 4, "y": 4, "z": 8} and found.metric == pytest.approx(0.98)
    assert found.trials[0][1] == 1.0 and len(found.trials) == len(asked)
    with pytest.raises(Impossible):
        bisect_bits(["x", "y"], (4, 2), accuracy, tolerance=0.99, baseline=1.0)
    for order, bits in ((["x", "x"], (8, 4)), (["x"], (4, 8)), (["x"], ())):
        with pytest.raises(BadInput, match="bisect_bits"):
            bisect_bits(order, bits, accuracy)


def test_what_is_refused() -> None:
    model, data = net(), batch()
    with pytest.raises(BadInput, match="no data"):
        InterlayerSensitivity()(model, [])
    with pytest.raises(BadInput, match="samples=0"):
        InterlayerSensitivity(samples=0)
    with pytest.raises(BadInput, match="the loss is .*one finite number"):
        InterlayerSensitivity(samples=1)(model, (data[0] * math.nan, data[1]))
    with pytest.raises(BadInput, match="no linear or convolution layer"):
        InterlayerSensitivity()(nn.BatchNorm1d(5), data)
    with pytest.raises(BadInput, match="equally many values"):
        BisectionSearch(Space({"a": (8, 4), "b": (8, 4, 2)}), least=0.5)
    assert model.training
