"""`simq_nas`: sub-networks and numbers of bits searched together, by regressors that learn from few measurements.

A candidate joins genes of sizes (depth, widths) and one gene of bits for each layer. In turns (LINAS):

    measure every member of the population            extract, quantize, evaluate: what is expensive
    fit a predictor for each objective                 on all that was measured so far
    NSGA-II on the predictions alone                   thousands of candidates, cheap
    population <- its last one, without what is known, and a tenth drawn at random

Genes of layers that a candidate does not have mean nothing: `dead` names them, they become 0, and candidates that differ
in them alone are one. A predictor is the better in 5-fold cross-validation (mean relative error) of

    ridge regression on one-hot genes                                              alpha in .1, .2, ... 10
    support-vector regression, K(a, b) = exp(-|a - b|^2 / features), no tube       C in 1, 3, 10, 30, 100

    max_b  y^T b - b^T (K + 1) b / 2,   |b_i| <= C                                 the 1 stands for an offset

NSGA-II takes parents by tournaments, crosses them by SBX (with .9, eta 15), mutates genes polynomially (with .02, eta 20),
rounds to whole numbers, and keeps the first fronts, crowded ones thinned out. All objectives are maximized; with one, the
front is its best.

Source: "SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search", Sridhar, Webb, Sarah, Sundaresan,
Cummings, Ding, 2023, arXiv 2312.13301. Official code: IntelLabs/DyNAS-T, Apache-2.0 (not used). We differ from it: the
dual of the support-vector regression is solved with its offset inside the kernel and five values of C, and a tenth of each
population is drawn, so that predictors do not only see what they like.

Use it where objectives need a measurement each and depend on one another. Where what layers cost adds up, an integer
program finds the optimum: `laconic.core.allocate`. Sizes in bytes need no predictor, but do not suffer from one.

Example:
    >>> from laconic.search import Space, study
    >>> space = Space({"depth": (1, 2, 3)} | bit_choices(["a", "b", "c"], (8, 32)))
    >>> list(space.choices)
    ['depth', 'bits of a', 'bits of b', 'bits of c']
    >>> search = Linas(space, population=6, inner_evaluations=120)
    >>> trials = study(search, lambda c: c[0] - 0.5 * sum(c[1:]), 18)
    >>> search.best()
    (2, 0, 0, 0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize

from laconic.core.card import Card
from laconic.errors import BadInput

from ._spaces import HasSizes

Candidate = tuple[int, ...]
Results = float | Sequence[float]

RIDGE = np.arange(1, 101) / 10
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
ITERATIONS = 100  # of the dual
FRESH = 0.1  # of a population is drawn


class Searchable(HasSizes, Protocol):
    """The space, as far as it is needed; `laconic.search.Space` is one."""

    choices: Mapping[str, Sequence[Any]]

    def __contains__(self, candidate: object) -> bool: ...

    def values(self, candidate: Candidate) -> dict[str, Any]:
        """What a candidate means."""
        ...

    def sample(self, generator: torch.Generator) -> Candidate:
        """A candidate."""
        ...


def bit_choices(
    layers: Sequence[str], bits: Sequence[int] = (8, 32), modes: Sequence[str] = ()
) -> dict[str, tuple[Any, ...]]:
    """Decisions about bits, to be joined with those about sizes: one for each layer, and one on its mode if there are any.

    Args:
        layers: names.
        bits: to choose from; 32 leaves a layer float.
        modes: of quantization, as ("asymmetric", "symmetric").
    """
    found: dict[str, tuple[Any, ...]] = {f"bits of {layer}": tuple(bits) for layer in layers}
    return found | ({f"mode of {layer}": tuple(modes) for layer in layers} if modes else {})


# --- predictors -------------------------------------------------------------------------------------


class Ridge:
    """y ~ x w + offset with alpha |w|^2 added to the squared error."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def fit(self, x: np.ndarray, y: np.ndarray) -> Ridge:
        """Solve for w."""
        self._x0, self._y0 = x.mean(0), y.mean()
        u, s, vt = np.linalg.svd(x - self._x0, full_matrices=False)
        self._w = vt.T @ (s / (s**2 + self.alpha) * (u.T @ (y - self._y0)))
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,)."""
        return (x - self._x0) @ self._w + self._y0


class SupportVectors:
    """Support-vector regression without a tube: the least absolute error, weighted by C, in the space of the kernel.

    Args:
        penalty: C.
        iterations: of the solver, at most; a few more change predictions less than what was measured is sure.
    """

    def __init__(self, penalty: float, iterations: int = ITERATIONS):
        self.penalty, self.iterations = penalty, iterations

    def fit(self, x: np.ndarray, y: np.ndarray, start: np.ndarray | None = None) -> SupportVectors:
        """Solve the dual, a quadratic form in a box, from a solution for a smaller C if there is one."""
        self._x, self._y0 = x, float(np.median(y))
        kernel, rest = self._kernel(x), y - self._y0

        def dual(b: np.ndarray) -> tuple[float, np.ndarray]:
            product = kernel @ b
            return float(b @ (product / 2 - rest)), product - rest

        box = [(-self.penalty, self.penalty)] * len(y)
        begin = np.zeros(len(y)) if start is None else start
        how = {"maxiter": self.iterations}
        self.weights = minimize(dual, begin, jac=True, method="L-BFGS-B", bounds=box, options=how).x
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,)."""
        return self._kernel(x) @ self.weights + self._y0

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        square = (x**2).sum(1)[:, None] + (self._x**2).sum(1) - 2 * x @ self._x.T
        return np.exp(-square / x.shape[1]) + 1


PREDICTORS = ("ridge", "svr")


class Predictor:
    """The best of several regressors by cross-validation, on labels brought to the order of ten.

    Args:
        kinds: of `PREDICTORS`.
    """

    def __init__(self, kinds: Sequence[str] = ("ridge", "svr")):
        unknown = next((kind for kind in kinds if kind not in PREDICTORS), None)
        if unknown is not None or not kinds:
            raise BadInput(f"linas: the predictor {unknown!r} is none of {', '.join(PREDICTORS)}")
        self.kinds = tuple(kinds)

    def fit(self, x: np.ndarray, y: np.ndarray) -> Predictor:
        """Choose and fit: x (n, features), y (n,)."""
        largest = float(np.abs(y).max())
        self._scale = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0
        scaled = y / self._scale
        errors: dict[tuple[str, float], float] = {}
        if len(y) < 2 * FOLDS:  # too few to choose by
            errors[self.kinds[0], 1.0] = 0.0
        else:
            for held in np.array_split(np.arange(len(y)), FOLDS):
                rest = np.setdiff1d(np.arange(len(y)), held)
                for key, found in self._predictions(x[rest], scaled[rest], x[held]):
                    off = np.abs(found - scaled[held]) / np.maximum(np.abs(scaled[held]), 1e-9)
                    errors[key] = errors.get(key, 0.0) + float(off.mean())
        kind, strength = min(errors, key=lambda key: errors[key])
        self.model = (Ridge if kind == "ridge" else SupportVectors)(strength).fit(x, scaled)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,), in the unit of the labels."""
        return self.model.predict(x) * self._scale

    def _predictions(
        self, x: np.ndarray, y: np.ndarray, held: np.ndarray
    ) -> Iterator[tuple[tuple[str, float], np.ndarray]]:
        """(kind, strength) and what it predicts at `held`, for every regressor."""
        if "ridge" in self.kinds:
            u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)  # once for all alphas
            along, shown = u.T @ (y - y.mean()), (held - x.mean(0)) @ vt.T
            for alpha in RIDGE.tolist():
                yield ("ridge", alpha), shown @ (s / (s**2 + alpha) * along) + y.mean()
        if "svr" in self.kinds:
            start = None
            for penalty in PENALTIES:
                model = SupportVectors(penalty).fit(x, y, start)
                start = model.weights
                yield ("svr", penalty), model.predict(held)


# --- fronts -----------------------------------------------------------------------------------------


def front_ranks(points: np.ndarray) -> np.ndarray:
    """Front (n,) of each point (n, objectives), all to be maximized: 0 for what nothing beats, 1 for what that beats."""
    one, other = points[:, None], points[None]
    better = np.all(one >= other, axis=2) & np.any(one > other, axis=2)
    ranks, beaten_by, rank = np.full(len(points), -1), better.sum(0), 0
    while (ranks < 0).any():
        now = (beaten_by == 0) & (ranks < 0)
        ranks[now] = rank
        beaten_by = beaten_by - better[now].sum(0)
        rank += 1
    return ranks


def crowding(points: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """How far each point (n,) is from its neighbours in its front, summed over objectives; infinite at its ends."""
    found = np.zeros(len(points))
    for rank in np.unique(ranks):
        places = np.flatnonzero(ranks == rank)
        for values in points[places].T:
            order = np.argsort(values, kind="stable")
            span = values[order[-1]] - values[order[0]] or 1.0
            found[places[order[[0, -1]]]] = math.inf
            found[places[order[1:-1]]] += (values[order[2:]] - values[order[:-2]]) / span
    return found


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume that points, all to be maximized, dominate above a reference; exact, by slices."""
    above = sorted((tuple(p) for p in points if all(a > b for a, b in zip(p, reference, strict=True))), reverse=True)
    if not above:
        return 0.0
    if len(reference) == 1:
        return above[0][0] - reference[0]
    total = 0.0
    for i, point in enumerate(above):
        lower = above[i + 1][0] if i + 1 < len(above) else reference[0]
        total += (point[0] - lower) * hypervolume([p[1:] for p in above[: i + 1]], reference[1:])
    return total


def nsga2(
    start: np.ndarray, sizes: Sequence[int], predict: Callable[[np.ndarray], np.ndarray], generations: int,
    rng: np.random.Generator, repair: Callable[[np.ndarray], np.ndarray] = lambda genes: genes, *,
    cross: tuple[float, float] = (0.9, 15.0), mutate: tuple[float, float] = (0.02, 20.0),
) -> np.ndarray:  # fmt: skip
    """The last population (n, genes), the first fronts first.

    Args:
        start: first population (n, genes), whole numbers.
        sizes: values of each gene.
        predict: genes (n, genes) -> objectives (n, m), to be maximized.
        generations: how often n children join and the best n stay.
        rng: of all that is drawn.
        repair: makes genes (n, genes) valid.
        cross: probability and eta of SBX.
        mutate: probability of a gene, and eta, of polynomial mutation.
    """
    genes, top = start, np.array(sizes) - 1
    points = predict(genes)
    for _ in range(generations):
        ranks = front_ranks(points)
        crowd = crowding(points, ranks)
        pairs = rng.integers(len(genes), size=(2, len(genes)))
        first = (ranks[pairs[0]] < ranks[pairs[1]]) | (
            (ranks[pairs[0]] == ranks[pairs[1]]) & (crowd[pairs[0]] >= crowd[pairs[1]])
        )
        parents = genes[np.where(first, pairs[0], pairs[1])]
        children = repair(_varied(parents, top, rng, cross, mutate))
        genes, points = np.concatenate([genes, children]), np.concatenate([points, predict(children)])
        ranks = front_ranks(points)
        kept = np.lexsort((-crowding(points, ranks), ranks))[: len(start)]
        genes, points = genes[kept], points[kept]
    return genes


def _varied(
    parents: np.ndarray,
    top: np.ndarray,
    rng: np.random.Generator,
    cross: tuple[float, float],
    mutate: tuple[float, float],
) -> np.ndarray:
    """Children (n, genes) of neighbours among the parents."""
    a, b = parents.astype(float), np.roll(parents, 1, 0).astype(float)
    u = rng.random(a.shape)
    spread = np.where(u < 0.5, 2 * u, 1 / np.maximum(2 * (1 - u), 1e-12)) ** (1 / (cross[1] + 1))
    crossed = 0.5 * ((1 + spread) * a + (1 - spread) * b)
    # As in SBX: half of the genes of a pair that is crossed at all.
    used = (rng.random((len(a), 1)) < cross[0]) & (rng.random(a.shape) < 0.5)
    genes = np.where(used, np.where(rng.random(a.shape) < 0.5, crossed, a + b - crossed), a)
    v = rng.random(a.shape)
    step = np.where(v < 0.5, (2 * v) ** (1 / (mutate[1] + 1)) - 1, 1 - (2 * (1 - v)) ** (1 / (mutate[1] + 1)))
    changed = rng.random(a.shape) < mutate[0]
    # With few values a small step would round to nothing: at least one value is gone.
    whole = np.where(np.abs(step * top) < 0.5, np.where(v < 0.5, -1, 1), step * top)
    return np.clip(np.rint(genes + changed * whole), 0, top).astype(np.int64)


# --- the search -------------------------------------------------------------------------------------


class Linas:
    """The search: populations are measured, predictors learn, NSGA-II on them proposes the next.

    Args:
        space: to search.
        seed: of all that is drawn.
        population: candidates that are measured before predictors learn again.
        predictors: kinds to choose from, see `PREDICTORS`.
        inner_evaluations: candidates that are predicted for each population.
        dead: from the values by name, the names of decisions that mean nothing then.

    Raises:
        BadInput: fewer than two candidates to a population, or unknown predictors.
    """

    def __init__(
        self, space: Searchable, seed: int = 0, *, population: int = 50, predictors: Sequence[str] = ("ridge", "svr"),
        inner_evaluations: int = 20_000, dead: Callable[[Mapping[str, Any]], Collection[str]] | None = None,
    ):  # fmt: skip
        if population < 2 or inner_evaluations < 1:
            raise BadInput(f"linas: a population of {population} and {inner_evaluations} predictions are too few")
        Predictor(predictors)
        self.space, self.population, self.predictors = space, population, tuple(predictors)
        self.inner_evaluations, self.dead = inner_evaluations, dead
        self._generator = torch.Generator().manual_seed(seed)
        self._known: dict[Candidate, tuple[float, ...]] = {}
        self._asked: set[Candidate] = set()

    def canonical(self, candidate: Sequence[int]) -> Candidate:
        """The candidate with genes that mean nothing at 0, where the space allows that."""
        plain = tuple(int(i) for i in candidate)
        if self.dead is None:
            return plain
        names = set(self.dead(self.space.values(plain)))
        masked = tuple(0 if name in names else i for name, i in zip(self.space.choices, plain, strict=True))
        return masked if masked in self.space else plain

    def ask(self) -> list[Candidate]:
        """A population to measure; none when no new candidate turns up."""
        proposed: list[Candidate] = []
        drawn = self.population
        if len(self._finite()) >= 2:
            drawn = max(1, round(FRESH * self.population))
            proposed = self._new(self._proposals(), self.population - drawn)
            drawn = self.population - len(proposed)
        tries = (self.canonical(self.space.sample(self._generator)) for _ in range(50 * drawn))
        proposed += self._new(tries, drawn, proposed)
        self._asked.update(proposed)
        return proposed

    def tell(self, candidate: Candidate, result: Results) -> None:
        """What was measured, one number or one for each objective; higher is better, what is not finite is a failure."""
        values = tuple(float(v) for v in ([result] if isinstance(result, (int, float)) else result))
        known = next(iter(self._known.values()), values)
        if len(known) != len(values):
            raise BadInput(f"linas: {len(values)} objectives were told, and {len(known)} before")
        self._known[tuple(candidate)] = values
        self._asked.add(tuple(candidate))

    def best(self) -> Candidate | None:
        """The candidate with the best first objective; None before there is one."""
        found = self._finite()
        return max(found, key=lambda candidate: found[candidate]) if found else None

    def front(self) -> list[tuple[Candidate, tuple[float, ...]]]:
        """What was measured and nothing measured beats, by the first objective."""
        found = list(self._finite().items())
        if not found:
            return []
        ranks = front_ranks(np.array([values for _, values in found]))
        return sorted((item for item, rank in zip(found, ranks, strict=True) if rank == 0), key=lambda item: item[1])

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "generator": self._generator.get_state(),
            "known": [[list(candidate), list(values)] for candidate, values in self._known.items()],
            "asked": [list(candidate) for candidate in sorted(self._asked)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._generator.set_state(state["generator"])
        self._known = {tuple(candidate): tuple(values) for candidate, values in state["known"]}
        self._asked = {tuple(candidate) for candidate in state["asked"]}

    def features(self, genes: np.ndarray) -> np.ndarray:
        """One-hot genes (n, sum of sizes)."""
        sizes = self.space.sizes
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        found = np.zeros((len(genes), sum(sizes)))
        found[np.arange(len(genes))[:, None], genes + starts] = 1
        return found

    def _finite(self) -> dict[Candidate, tuple[float, ...]]:
        return {c: values for c, values in self._known.items() if all(math.isfinite(v) for v in values)}

    def _new(self, candidates: Any, most: int, taken: Sequence[Candidate] = ()) -> list[Candidate]:
        found: dict[Candidate, None] = {}
        for candidate in candidates:
            if len(found) >= most:
                break
            if candidate not in self._asked and candidate not in taken:
                found[candidate] = None
        return list(found)

    def _proposals(self) -> list[Candidate]:
        """The last population of NSGA-II on predictors, those of the first front first."""
        known = self._finite()
        x = self.features(np.array(list(known)))
        labels = np.array(list(known.values())).T
        models = [Predictor(self.predictors).fit(x, y) for y in labels]
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=self._generator)))

        def predict(genes: np.ndarray) -> np.ndarray:
            shown = self.features(genes)
            return np.stack([model.predict(shown) for model in models], 1)

        ranks = front_ranks(labels.T)
        best = np.array(list(known))[np.argsort(ranks, kind="stable")][: self.population]
        drawn = [self.canonical(self.space.sample(self._generator)) for _ in range(self.population - len(best) // 2)]
        start = np.array([*map(tuple, best[: len(best) // 2].tolist()), *drawn])
        generations = max(1, self.inner_evaluations // self.population)
        last = nsga2(start, self.space.sizes, predict, generations, rng, self._repaired)
        # Many of the last population are alike, and many are known: their neighbours follow.
        near = _varied(last, np.array(self.space.sizes) - 1, rng, (0.9, 15.0), (0.2, 20.0))
        return [self.canonical(genes) for genes in np.concatenate([last, self._repaired(near)]).tolist()]

    def _repaired(self, genes: np.ndarray) -> np.ndarray:
        """Genes that the space allows, in canonical form: what it does not allow is drawn anew."""
        rows = (tuple(row) for row in genes.tolist())
        allowed = (row if row in self.space else self.space.sample(self._generator) for row in rows)
        return np.array([self.canonical(row) for row in allowed])


CARD = Card(
    id="simq_nas",
    title="SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search",
    authors="Sridhar, Webb, Sarah, Sundaresan, Cummings, Ding",
    year=2023,
    source="arXiv 2312.13301",
    family="quant",
    summary="Searches sub-networks and bits of layers together: few are measured, predictors look at thousands.",
    objects={"Linas": "Search"},
    use="Some hundred measurements of several objectives that depend on sizes and bits together.",
    avoid="Where what layers cost adds up: an integer program over measured costs finds the optimum.",
    composes=("fliqs", "aging_evolution"),
    code="IntelLabs/DyNAS-T, Apache-2.0 (not used)",
    claim={
        "text": "After 150 measurements of accuracy and bytes, sub-networks and bits found with predictors dominate more "
        "than those drawn at random.",
        "metric": "dominated share of the unit square",
        "direction": "higher",
        "margin": 0.01,
        "arms": ("random", "linas"),
        "seeds": 5,
        "minutes": 2,
        "task": "digits",
    },
)
