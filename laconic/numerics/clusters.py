"""k-means: few numbers, or vectors, that stand for many.

Numbers start from quantiles and find the nearest by sorting; vectors start from k-means++ (Arthur and Vassilvitskii, 2007)
with a seed of its own. Both go on as Lloyd's: each moves to the mean of those that are nearest to it, weighed, until
nothing moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k_means", "nearest", "nearest_vectors"]

ROUNDS = 25
CHUNK = 1 << 24  # distances that are held at a time


def nearest(values: Tensor, codebooks: Tensor) -> Tensor:
    """Indices (rows, K) of the codewords nearest to values (rows, K), of codebooks (rows, n) in any order.

    On a midpoint the lower codeword; of equal codewords the first.
    """
    ordered, order = codebooks.sort(dim=1, stable=True)
    middle = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(middle.contiguous(), values.contiguous()))


def nearest_vectors(points: Tensor, centres: Tensor) -> Tensor:
    """Indices (n,) of the centres (count, d) nearest to points (n, d); of equally near ones the first."""
    if centres.shape[1] == 1:
        return nearest(points.T, centres.T)[0]
    half = centres.square().sum(1) / 2
    step = max(1, CHUNK // max(1, len(centres)))
    parts = [(half - part @ centres.T).argmin(1) for part in points.split(step)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=points.device)


def k_means(points: Tensor, weights: Tensor | None, count: int, rounds: int = ROUNDS) -> Tensor:
    """Centres (count,) float64 of numbers (n,), in rising order, or (count, d) of vectors (n, d).

    A centre that nothing is nearest to moves to the point that is farthest from its own.

    Args:
        points: at least one.
        weights: (n,), how much each point matters; None: all alike.
        count: of centres; where there are fewer points, centres coincide.
        rounds: at most.
    """
    v = points.double()
    v = v[:, None] if v.ndim == 1 else v
    w = torch.ones(len(v), dtype=v.dtype, device=v.device) if weights is None else weights.double()
    centres = _quantiles(v, count) if v.shape[1] == 1 else _spread(v, w, count)
    for _ in range(rounds):
        index = nearest_vectors(v, centres)
        mass = torch.zeros(count, dtype=v.dtype, device=v.device).index_add_(0, index, w)[:, None]
        total = torch.zeros_like(centres).index_add_(0, index, w[:, None] * v)
        moved = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(v.dtype).tiny), centres)
        empty = torch.bincount(index, minlength=count) == 0
        if bool(empty.any()):
            farthest = (w * (v - moved[index]).square().sum(1)).argsort(descending=True, stable=True)
            for k, i in zip(empty.nonzero()[:, 0].tolist(), farthest.tolist(), strict=False):
                moved[k] = v[i]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres if points.ndim == 2 else centres[:, 0].sort().values


def _quantiles(v: Tensor, count: int) -> Tensor:
    ordered = v[:, 0].sort().values
    at = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * len(v)).long().clamp(max=len(v) - 1)
    return ordered[at.to(v.device), None]


def _spread(v: Tensor, w: Tensor, count: int) -> Tensor:
    """Points far from each other: each is drawn with a chance in proportion to its squared distance from those before."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
    chosen = []
    far = w.clone()
    for draw in draws:
        total = far.cumsum(0)
        at = int(torch.searchsorted(total, draw * total[-1]).clamp(max=len(v) - 1))
        chosen.append(at)
        own = w * (v - v[at]).square().sum(1)
        far = own if len(chosen) == 1 else torch.minimum(far, own)
    return v[chosen]
