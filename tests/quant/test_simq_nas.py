"""`simq_nas`: predictors against closed forms, fronts and volumes by brute force, masked genes, several objectives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from laconic.errors import BadInput
from laconic.quant import Linas, Predictor, bit_choices, crowding, front_ranks, hypervolume, nsga2
from laconic.quant._simq_nas import Ridge, SupportVectors
from laconic.search import Space, study
from laconic.testing import Example

SPACE = Space({name: range(4) for name in "abcde"})
OPTIMUM = (3, 1, 0, 2, 1)


def agreement(candidate) -> float:
    """How near the optimum it is; the first two decisions count only together."""
    away = [abs(a - b) for a, b in zip(candidate, OPTIMUM, strict=True)]
    return 10 + 2.0 * (away[:2] == [0, 0]) + away[2:].count(0) - 0.1 * sum(away)


EXAMPLES = [
    Example(
        lambda space, seed: Linas(space, seed, population=20, predictors=("ridge",), inner_evaluations=100),
        kind="Search",
        name="Linas",
        inputs=[SPACE, agreement],
        stated={"optimum": OPTIMUM, "evaluations": 140},
    )
]


def test_ridge_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=30)
    a = x - x.mean(0)
    w = np.linalg.solve(a.T @ a + 0.7 * np.eye(4), a.T @ (y - y.mean()))
    np.testing.assert_allclose(Ridge(0.7).fit(x, y).predict(x[:3]), a[:3] @ w + y.mean())


def test_support_vectors_meet_the_conditions_of_their_optimum() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 3))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    for penalty in (0.3, 100.0):
        model = SupportVectors(penalty, iterations=20_000).fit(x, y)
        off, b = y - model.predict(x), model.weights
        inside = np.abs(b) < penalty * (1 - 1e-6)
        assert np.abs(off[inside]).max(initial=0) < 0.02  # what is not at a bound is met
        assert np.all(off[~inside] * b[~inside] > -0.02)  # what is at a bound is missed on its side
    assert np.abs(off).mean() < 0.1 * y.std()


def test_a_predictor_takes_what_fits_better_and_keeps_the_unit() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 3))
    linear, bent = 5000 + 100 * x[:, 0], 50 + 10 * np.abs(x[:, 0]) * np.sign(x[:, 1])
    model = Predictor().fit(x, linear)
    assert isinstance(model.model, Ridge)
    np.testing.assert_allclose(model.predict(x), linear, rtol=1e-2)
    assert isinstance(Predictor().fit(x, bent).model, SupportVectors)
    few = Predictor().fit(x[:3], linear[:3])
    assert np.isfinite(few.predict(x)).all() and np.isfinite(Predictor().fit(x, 0 * linear).predict(x)).all()
    with pytest.raises(BadInput, match="'forest' is none of ridge, svr"):
        Predictor(("forest",))


def test_fronts_and_crowding_by_brute_force() -> None:
    points = np.random.default_rng(3).integers(6, size=(25, 2)).astype(float)
    left, rank = set(range(25)), 0
    want = np.zeros(25)
    while left:
        front = {
            i for i in left
            if not any(all(points[j] >= points[i]) and any(points[j] > points[i]) for j in left)
        }  # fmt: skip
        for i in front:
            want[i] = rank
        left, rank = left - front, rank + 1
    np.testing.assert_array_equal(front_ranks(points), want)
    line = np.array([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0]])
    np.testing.assert_allclose(crowding(line, np.zeros(4)), [math.inf, 1.5, 1.5, math.inf])


def test_hypervolume_by_counting_cells() -> None:
    for objectives in (1, 2, 3):
        points = np.random.default_rng(objectives).integers(5, size=(6, objectives)).tolist()
        cells = sum(
            any(all(c < v for c, v in zip(cell, p, strict=True)) for p in points)
            for cell in itertools.product(range(5), repeat=objectives)
        )
        assert hypervolume(points, (0,) * objectives) == pytest.approx(cells)
    assert hypervolume([(1.0, 1.0)], (2.0, 0.0)) == 0 and hypervolume([], (0.0,)) == 0


def test_nsga2_finds_a_known_front() -> None:
    sizes, rng = (8,) * 4, np.random.default_rng(0)

    def predict(genes):  # the front has the first gene alone; the others cost
        cost = genes[:, 1:].sum(1)
        return np.stack([genes[:, 0] - cost, -genes[:, 0] - cost], 1).astype(float)

    last = nsga2(rng.integers(8, size=(24, 4)), sizes, predict, 100, rng, mutate=(0.2, 5.0))
    assert {tuple(g) for g in last.tolist()} >= {(i, 0, 0, 0) for i in range(8)}
    assert last.min() >= 0 and last.max() < 8


def test_several_objectives_and_genes_that_mean_nothing() -> None:
    space = Space({"depth": (1, 2, 3)} | bit_choices(["0", "1", "2"], (2, 4, 8)) | {"width": (1, 2)})

    def dead(values):
        return [f"bits of {i}" for i in range(3) if i >= values["depth"]]

    def measure(candidate):
        values = space.values(candidate)
        bits = [values[f"bits of {i}"] for i in range(values["depth"])]
        return (sum(1 - 2.0**-b for b in bits) + values["width"], -float(sum(bits)))

    search = Linas(space, 3, population=12, inner_evaluations=240, dead=dead)
    for _ in range(4):
        for candidate in search.ask():
            assert candidate == search.canonical(candidate)
            search.tell(candidate, measure(candidate))
    best = {measure(c) for c in itertools.product(*map(range, space.sizes))}
    true = {p for p in best if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in best)}
    found = [values for _, values in search.front()]
    reference = (0.0, -30.0)
    assert hypervolume(found, reference) >= 0.97 * hypervolume(list(true), reference)
    with pytest.raises(BadInput, match="1 objectives were told, and 2 before"):
        search.tell((0,) * 5, 1.0)


def test_it_ends_where_everything_is_known_and_keeps_a_constraint() -> None:
    small = Space({"a": range(3), "b": range(3)}, allowed=lambda v: v["a"] + v["b"] < 4)
    search = Linas(small, population=4, inner_evaluations=20)
    trials = study(search, lambda c: math.nan if c == (0, 0) else 1.0 + c[0] * c[1], 100)
    assert len(trials) == 8 and {t.candidate for t in trials} == {
        c for c in itertools.product(range(3), repeat=2) if sum(c) < 4
    }
    assert search.ask() == [] and search.best() in {(1, 2), (2, 1)}
    assert Linas(small).best() is None and Linas(small).front() == []


def test_it_needs_fewer_measurements_than_chance() -> None:
    space = Space({str(i): range(5) for i in range(8)})

    def quality(candidate):
        return 20.0 - sum((i - j % 5) ** 2 for j, i in enumerate(candidate)) / 8

    search = Linas(space, population=20, predictors=("ridge",), inner_evaluations=400)
    found = max(trial.result for trial in study(search, quality, 80))
    generator = torch.Generator().manual_seed(0)
    assert found == 20.0 > max(quality(space.sample(generator)) for _ in range(800))


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="a population of 1"):
        Linas(SPACE, population=1)
    with pytest.raises(BadInput, match="'tree' is none of"):
        Linas(SPACE, predictors=("tree",))
    assert bit_choices(["x"], (8,), ("symmetric", "asymmetric")) == {
        "bits of x": (8,), "mode of x": ("symmetric", "asymmetric"),
    }  # fmt: skip
