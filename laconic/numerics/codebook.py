"""Elements whose codes index a table: their scales, the nearest level, and back.

    q = the code of the level nearest to x / s         x^ = s T[q],  max |T| = 1

By element:
- levels (nf4, fp4): on a midpoint the lower level; of two codes for one level the first.
- ternary: q - 1 = clamp(round(x / s), -1, 1), ties to even, so that half a scale is 0 (BitNet b1.58, arXiv 2402.17764,
  for s = mean |x|).
- floats: the nearest number, ties by the scheme's rounding, saturated; the quotient x / s is taken in float64.
- codebook: of runs of numbers the nearest entry; the table C is found by k-means of what the scales leave of the tensor.
- binary: the sign, 0 counting as positive, whatever the scale; mean |x| is the scale of least squared error
  (XNOR-Net, arXiv 1603.05279).

Scales of a group x (g,) that is not all zero:
- `minmax`: s = max |x|; `percentile`: the same of its two quantiles.
- `absmean`: s = mean |x|, summed in float64.
- `mse` of levels: of shares of max |x| the one of least sum |x^ - x|^2.4, by the search that integers have.
- `mse` of ternary numbers: the least sum of squares, exactly. With the n largest |x| kept, the best scale is their
  mean m_n, and lowers the error by n m_n^2; so n is the argmax of this, and s = m_n.
An all-zero group has s = 1 and the code of 0, but where there is none (binary) s = 0: it comes back as zeros.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .clusters import k_means, nearest_vectors
from .elements import Binary, Codebook, Coded, Float, Ternary
from .floats import float_codes, round_float

SAMPLE = 1 << 16  # runs that a table is found from: more change its entries little


def range_scale(low: Tensor, high: Tensor) -> Tensor:
    """s = max(|low|, |high|, 0), float32, of value ranges; 1 where that is 0."""
    size = torch.maximum(high.float(), -low.float()).clamp(min=0)
    return torch.where(size == 0, torch.ones_like(size), size)


def absmean_scale(groups: Tensor, element: Coded | Codebook) -> Tensor:
    """s = mean |x|, float32 (...), of groups (..., g); of all-zero ones 1, of binary elements 0."""
    if groups.shape[-1] == 0:
        mean = torch.zeros(groups.shape[:-1], device=groups.device)
    else:
        mean = groups.abs().mean(-1, dtype=torch.float64).float()
    if isinstance(element, Binary):
        return mean
    # Asked of the numbers: a mean may fall below what float32 holds, and that has to be seen.
    return torch.where((groups == 0).all(-1), torch.ones_like(mean), mean)


def ternary_mse_scale(groups: Tensor) -> Tensor:
    """The scale of least squared error, float32 (...), of groups (..., g) of ternary numbers; 1 of all-zero ones."""
    if groups.shape[-1] == 0:
        return torch.ones(groups.shape[:-1], device=groups.device)
    kept = groups.abs().double().sort(-1, descending=True).values.cumsum(-1)
    count = torch.arange(1, groups.shape[-1] + 1, device=groups.device, dtype=torch.float64)
    best = (kept / count.sqrt()).argmax(-1, keepdim=True)  # n m_n^2, under the root
    scale = (kept.gather(-1, best) / count[best]).squeeze(-1).float()
    return torch.where((groups == 0).all(-1), torch.ones_like(scale), scale)


def distance(v: Tensor, element: Coded) -> Tensor:
    """min_q |T[q] - v| of v (any shape), float32: sixteen passes over what lies in a cache, faster than a search."""
    least = torch.full_like(v, torch.inf)
    off = torch.empty_like(v)
    for level in sorted(set(element.table)):
        torch.minimum(least, torch.sub(v, level, out=off).abs_(), out=least)
    return least


def codes_of(x: Tensor, scale: Tensor, element: Coded) -> Tensor:
    """Codes uint8 of x under scales that broadcast against it, float32."""
    if isinstance(element, Binary):
        return (x >= 0).to(torch.uint8)
    v = x.float() / scale
    if isinstance(element, Ternary):
        return v.round_().clamp_(-1, 1).add_(1).to(torch.uint8)
    midpoints, codes = _ordered(element.table, x.device)
    return codes[torch.bucketize(v.contiguous(), midpoints, out_int32=True)]


def patterns_of(x: Tensor, scale: Tensor, element: Float, rounding: str) -> Tensor:
    """Bit patterns uint8 of the floats nearest to x / s: `codes_of` for floats, whose ties go by a rounding."""
    numbers, way = element.numbers, "even" if rounding == "nearest" else rounding
    return float_codes(round_float(x.double() / scale.double(), numbers, way), numbers)  # type: ignore[arg-type]


def table_for(v: Tensor, element: Codebook) -> Tensor:
    """C (2^width, dim) float32 for a matrix (rows, K) of what scales leave: k-means of runs from all over it."""
    runs = v.reshape(-1, element.dim)
    if not len(runs):
        return torch.zeros(element.levels, element.dim, device=v.device)
    if len(runs) > SAMPLE:
        at = (torch.arange(SAMPLE, dtype=torch.float64) * (len(runs) / SAMPLE)).long()
        runs = runs[at.to(v.device)]
    found = k_means(runs, None, element.levels)
    return found.sort(0).values.float() if element.dim == 1 else found.float()


def runs_of(v: Tensor, table: Tensor) -> Tensor:
    """Codes (rows, K / dim) uint8 of a matrix (rows, K) of what scales leave."""
    wide = table.float()
    return nearest_vectors(v.reshape(-1, wide.shape[1]), wide).view(v.shape[0], -1).to(torch.uint8)


def values_of_runs(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """x^ = s C[q] (rows, K) float32 of codes (rows, K / dim) under scales that broadcast against it."""
    rows, runs = codes.shape
    values = table.float().index_select(0, codes.reshape(-1).int())
    return values.view(rows, runs * table.shape[1]).mul_(scale)


def values_of(codes: Tensor, scale: Tensor, element: Coded) -> Tensor:
    """x^ = s T[q], float32, of codes under scales that broadcast against them."""
    table = torch.tensor(element.table, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(scale)


@lru_cache(maxsize=32)
def _ordered(table: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring levels, and the code of each level, in rising order; equal levels count once."""
    first = {level: code for code, level in reversed(list(enumerate(table)))}  # 0 == -0
    levels = sorted(first)
    with torch.inference_mode(False):  # kept for later calls
        midpoints = torch.tensor([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)], device=device)
        return midpoints, torch.tensor([first[level] for level in levels], dtype=torch.uint8, device=device)
