"""The map between real numbers and codes: scales, rounding, and back. Affine for integers:

    q = clamp(round(x / s) + z, 0, 2^b - 1)          x^ = s * (q - z)

and by a table of levels for the other elements (`codebook.py`), x^ = s T[q]; a `Codebook` has a table of its own, which
stands here where the others have zero points.

Conventions, each tested:
- symmetric (`zero="none"`): z = 2^(b-1), s = 2 amax / (2^b - 1) clipped so that both ends are used (the range
  is [-2^(b-1), 2^(b-1) - 1], the step that of compressed-tensors), asymmetric: the range is stretched to hold
  0, so that 0 is exact, s = (max - min) / (2^b - 1), z = round(-min / s) (`int`) or -min / s (`real`, where 0
  need not be exact and the range is not stretched).
- all-zero groups store s = 1 and code z: they come back as exact zeros (binary ones store s = 0).
- rounding is to nearest, ties to even (torch.round), or stochastic: floor(x + u), u ~ U[0, 1) from an
  explicit generator.
- scales are rounded to their storage type before codes are computed, and a scale that would round to zero or
  to infinity there raises by name rather than spoil the tensor. Scales that are stored in a code of their own are given as
  they were found, 0 for a group of zeros; `quantize` and `dequantize` work with what a file gives back (`scales.py`), and
  so have to see the scales of the whole matrix.
- inf and nan are refused by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import codebook
from .blocks import block_scale
from .elements import Binary, Codebook, Float, Int, Ternary
from .finite import ScaleOutOfRange, check_finite
from .half_quadratic import zero_points
from .scales import rounding_scales, settled, store_scales
from .scheme import Scheme

__all__ = [
    "ScaleOutOfRange", "affine_params", "dequantize", "fake_quantize", "grouped", "params_from_range", "quantize",
]  # fmt: skip

# Scale search (GPTQ's): p = 1 - i/GRID for i < SHRINK * GRID, least sum |x^ - x|^NORM.
MSE_GRID = 100
MSE_SHRINK = 0.8
MSE_NORM = 2.4
# Elements a chunk of a row-wise computation may touch: bounds temporaries to a few times 64 MiB.
CHUNK = 1 << 24
# Elements of groups searched together: three float32 temporaries of this size stay in a core's cache.
SEARCH = 1 << 17
# Bounds of the search are lowered by this, far more than float32 sums are off.
SLACK = 1e-4


def affine_params(x: Tensor, scheme: Scheme, name: str = "tensor") -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every group of a matrix.

    Args:
        x: (rows, k) floating.
        scheme: says granularity, rule, zero and dtype.
        name: the parameter's path, for messages.

    Returns:
        scale (rows, G) in the scale dtype (or (1, 1) per tensor) and zero: None, uint8 (rows, G), or real
        (rows, G); of a codebook its table (2^width, dim).

    Raises:
        NotFinite: inf or nan in `x`.
        ScaleOutOfRange: a scale does not fit in the scale dtype.
        ValueError: a row is not made of whole runs, which the element takes.
    """
    check_finite(x, name)
    if isinstance(scheme.element, Codebook):
        if refusal := scheme.refusal(x.shape[1]):
            raise ValueError(f"{name}: {refusal}")
        scale = _group_scales(x, scheme, name)[0]
        wide = _expanded(settled(scale, scheme), None, scheme, x.shape[1], 0, x.shape[0])[0]
        return scale, codebook.table_for(x.float() / wide, scheme.element).to(scheme.scale.torch_dtype)
    found = _group_scales(x, scheme, name)
    if scheme.scale.dtype == "e4m3":
        store_scales(found[0], scheme, name)  # refuses by name what `quantize` would refuse without
    return found


def _group_scales(x: Tensor, scheme: Scheme, name: str) -> tuple[Tensor, Tensor | None]:
    """`affine_params` without the table of a codebook."""
    k = x.shape[1]
    tail = k % scheme.scale.group_of(k) if scheme.scale.granularity == "group" else 0
    if tail and scheme.scale.rule != "minmax":
        # The padding of a short group would count in quantiles and errors.
        parts = [_group_scales(x[:, : k - tail], scheme, name), _group_scales(x[:, k - tail :], scheme, name)]
        zeros = [zero for _, zero in parts if zero is not None]
        return torch.cat([scale for scale, _ in parts], dim=1), torch.cat(zeros, dim=1) if zeros else None
    groups = grouped(x, scheme)
    exact = scheme.scale.rule == "mse" and isinstance(scheme.element, Ternary)
    if exact or scheme.scale.rule == "absmean":
        return _scale_of_sizes(groups, scheme, name), None
    low, high = _range(groups, scheme)
    if scheme.scale.rule == "mse":
        scale, zero = _search_mse(groups, low, high, scheme, name)
    else:
        scale, zero = params_from_range(low, high, scheme, name)
        if scheme.scale.rule == "hqq" and zero is not None:
            zero = _half_quadratic(groups, scale, zero, scheme)
    return scale, zero


def params_from_range(low: Tensor, high: Tensor, scheme: Scheme, name: str = "tensor") -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for value ranges [low, high] (any shape): the end of every scale rule of integers.

    Raises:
        ScaleOutOfRange: a scale does not fit in the scale dtype.
        ValueError: the element's scale does not follow from a range (binary).
    """
    if isinstance(scheme.element, Binary):
        raise ValueError(f"{name}: the scale of a binary element is the mean of its sizes, and follows from no range")
    scale, stored, zero = _params(low, high, scheme, name)
    coded = scheme.scale.outer is not None or scheme.scale.dtype == "e4m3"
    _check_storable(torch.isfinite(stored) if coded else _storable(stored), scale, scheme, name)
    if zero is not None and scheme.zero == "real" and not bool(torch.isfinite(zero).all()):
        raise ScaleOutOfRange(f"{name}: a real zero point does not fit in {scheme.scale.dtype}; store it as float32")
    return stored, zero


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, generator: torch.Generator | None = None
) -> Tensor:
    """Codes (rows, k) uint8 of a matrix under given scales: q = clamp(round(x / s) + z, 0, 2^b - 1), or nearest levels.

    Of a codebook there is one code for each run: (rows, k / dim).
    """
    rows, k = x.shape
    scale = rounding_scales(scale, scheme)
    if isinstance(scheme.element, Codebook):
        assert zero is not None
        found = torch.empty((rows, k // scheme.element.dim), dtype=torch.uint8, device=x.device)
        for begin, end in _row_chunks(rows, k):
            s, _ = _expanded(scale, None, scheme, k, begin, end)
            found[begin:end] = codebook.runs_of(x[begin:end].float() / s, zero)
        return found
    codes = torch.empty((rows, k), dtype=torch.uint8, device=x.device)
    for begin, end in _row_chunks(rows, k):
        s, z = _expanded(scale, zero, scheme, k, begin, end)
        if isinstance(scheme.element, Float):
            codes[begin:end] = codebook.patterns_of(x[begin:end], s, scheme.element, scheme.rounding)
            continue
        if not isinstance(scheme.element, Int):
            codes[begin:end] = codebook.codes_of(x[begin:end], s, scheme.element)
            continue
        v = x[begin:end].float() / s + (z if scheme.zero == "real" else 0)
        noise = torch.rand(v.shape, generator=generator, device=v.device) if scheme.rounding == "stochastic" else None
        v = v.round() if noise is None else torch.floor(v + noise)
        if scheme.zero != "real":
            v = v + z  # the zero point is added after rounding: the two orders differ at ties
        codes[begin:end] = v.clamp_(0, scheme.element.levels - 1).to(torch.uint8)
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Values (rows, k) float32 of codes: x^ = s * (q - z), or s T[q]."""
    rows, k = codes.shape
    if isinstance(scheme.element, Codebook):
        k *= scheme.element.dim
    scale = settled(scale, scheme)
    out = torch.empty((rows, k), dtype=torch.float32, device=codes.device)
    for begin, end in _row_chunks(rows, k):
        s, z = _expanded(scale, None if isinstance(scheme.element, Codebook) else zero, scheme, k, begin, end)
        if isinstance(scheme.element, Codebook):
            assert zero is not None
            out[begin:end] = codebook.values_of_runs(codes[begin:end], s, zero)
        elif isinstance(scheme.element, Int):
            out[begin:end] = (codes[begin:end].float() - z) * s
        else:
            out[begin:end] = codebook.values_of(codes[begin:end], s, scheme.element)
    return out


def fake_quantize(x: Tensor, scheme: Scheme, name: str = "tensor") -> Tensor:
    """x^ of a matrix: parameters, codes and back. For measuring error; never counted as compression."""
    scale, zero = affine_params(x, scheme, name)
    return dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme)


def grouped(x: Tensor, scheme: Scheme) -> Tensor:
    """(rows, G, g) view of the elements that share a scale; a short last group repeats its last element.

    Repeating an element changes neither minimum nor maximum, so min-max rules see the group as it is.
    """
    rows, k = x.shape
    if scheme.scale.granularity == "tensor":
        return x.reshape(1, 1, -1)
    if scheme.scale.granularity != "group" or k == 0:
        return x.reshape(rows, 1, k)
    g = scheme.scale.group_of(k)
    if k % g:
        x = torch.cat([x, x[:, -1:].expand(rows, g - k % g)], dim=1)
    return x.reshape(rows, scheme.scale.groups(k), g)


def _params(low: Tensor, high: Tensor, scheme: Scheme, name: str = "tensor") -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale in float32 and as stored, and zero point, of value ranges; not checked."""
    if isinstance(scheme.element, Float):
        scale = block_scale(torch.maximum(high, -low).clamp(min=0), scheme, name=name)
        return scale, scale.to(scheme.scale.torch_dtype), None
    if not isinstance(scheme.element, Int):
        scale = codebook.range_scale(low, high)
        if scheme.scale.outer is not None:
            scale = torch.where(torch.maximum(high, -low) > 0, scale, 0.0)
        return scale, scale.to(scheme.scale.torch_dtype), None
    top = scheme.element.levels - 1
    low, high = low.float(), high.float()
    if scheme.zero != "real":
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = 2 * torch.maximum(high, -low) if scheme.zero == "none" else high - low
    scale = span / top
    if scheme.scale.outer is None:
        scale = torch.where(span == 0, torch.ones_like(scale), scale)
    stored = scale.to(scheme.scale.torch_dtype)
    if scheme.zero == "none":
        return scale, stored, None
    zero = -low / torch.where(stored == 0, 1, stored).float()
    if scheme.zero == "int":
        return scale, stored, zero.round().clamp(0, top).nan_to_num(0).to(torch.uint8)
    return scale, stored, zero.to(scheme.scale.torch_dtype)


def _scale_of_sizes(groups: Tensor, scheme: Scheme, name: str) -> Tensor:
    """Stored scales (rows, G) of groups (rows, G, g), by a rule that looks at more than their ranges."""
    element = scheme.element
    assert not isinstance(element, Int)
    if scheme.scale.rule == "mse":
        return _stored(codebook.ternary_mse_scale(groups), scheme, name)
    # A binary scale may be zero only where all numbers are.
    empty = (groups == 0).all(-1) if isinstance(element, Binary) else None
    return _stored(codebook.absmean_scale(groups, element), scheme, name, empty)


def _stored(scale: Tensor, scheme: Scheme, name: str, allowed: Tensor | None = None) -> Tensor:
    """Scales in their storage type; refused by name where they do not fit, but for those `allowed`."""
    stored = scale.to(scheme.scale.torch_dtype)
    storable = _storable(stored)
    _check_storable(storable if allowed is None else storable | allowed, scale, scheme, name)
    return stored


def _check_storable(storable: Tensor, scale: Tensor, scheme: Scheme, name: str) -> None:
    if not bool(storable.all()):
        raise ScaleOutOfRange(
            f"{name}: scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} do not fit in "
            f"{scheme.scale.dtype}; store the scales of this tensor as float32"
        )


def _storable(stored: Tensor) -> Tensor:
    return (stored != 0) & torch.isfinite(stored)


def _range(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    if groups.shape[-1] == 0:
        zero = torch.zeros(groups.shape[:-1])
        return zero, zero
    if scheme.scale.rule != "percentile":
        return groups.amin(-1).float(), groups.amax(-1).float()
    # Quantiles of order p and 1-p by linear interpolation between order statistics.
    ordered = groups.float().sort(dim=-1).values
    p = scheme.scale.percentile / 100
    return _at(ordered, 1 - p), _at(ordered, p)


def _at(ordered: Tensor, p: float) -> Tensor:
    position = p * (ordered.shape[-1] - 1)
    below = min(int(position), ordered.shape[-1] - 1)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)


def _search_mse(groups: Tensor, low: Tensor, high: Tensor, scheme: Scheme, name: str) -> tuple[Tensor, Tensor | None]:
    """Least sum |x^ - x|^2.4 over shrunken ranges p * [low, high]; the widest range wins ties."""
    scale, zero = params_from_range(low, high, scheme, name)
    if groups.numel() == 0:
        return scale, zero
    flat, low, high = groups.reshape(-1, groups.shape[-1]), low.reshape(-1), high.reshape(-1)
    grid = 1 - torch.arange(1, int(MSE_SHRINK * MSE_GRID), dtype=torch.float64) / MSE_GRID
    shrunk = torch.cat([torch.ones(1, dtype=torch.float64), grid]).float().to(flat.device)
    best = torch.empty(flat.shape[0], dtype=torch.int64, device=flat.device)
    step = max(1, SEARCH // flat.shape[1])
    for begin in range(0, flat.shape[0], step):
        part = slice(begin, begin + step)
        best[part] = _search(flat[part].float().T.contiguous(), shrunk, low[part], high[part], scheme)
    _, s, z = _params(shrunk[best] * low, shrunk[best] * high, scheme)
    return s.view_as(scale), z.view_as(zero) if zero is not None and z is not None else None


def _search(x: Tensor, shrunk: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Which of the `shrunk` ranges is best for each column of x (g, n), whose first is known to be storable.

    Powers cost more than all the rest, so they are taken only where cheaper sums leave a chance. With e = x^ - x, the
    logarithm of M_r = sum |e|^r is convex in r, and so for r >= 2

        M_r >= M_2^(r - 1) / M_1^(r - 2)

    What this puts above the error of the range with the least bound cannot be the least. Ranges that cut an end of each
    column by more than the whole error of the widest are not looked at.
    """
    columns = torch.arange(x.shape[1], device=x.device)
    _, stored, zero = _params(shrunk[:, None] * low, shrunk[:, None] * high, scheme)  # (p, n)
    usable = _storable(stored)
    if zero is not None and scheme.zero == "real":
        usable &= torch.isfinite(zero)
    assert not isinstance(scheme.element, Codebook)  # its table is not known before its scales
    grids: _Grids | _Tables
    if isinstance(scheme.element, Int):
        grids = _Grids(scheme, stored.float(), None if zero is None else zero.float())
        widest = grids.errors(x, 0).abs_().pow_(MSE_NORM).sum(0)
        cut = grids.cut(x.amin(0), x.amax(0))
        within = (~(cut > widest.pow_(1 / MSE_NORM).mul_(1 + SLACK))).any(1).nonzero().flatten()
        usable, grids = usable[within], grids.of(within)
    else:
        grids = _Tables(scheme.element, stored.float())
        within = torch.arange(len(shrunk), device=x.device)
    bound = torch.empty_like(usable, dtype=torch.float32)
    for i in range(len(within)):
        e = grids.errors(x, i).abs_()
        sum1 = e.sum(0)
        torch.mul(e.square_().sum(0).pow_(MSE_NORM - 1), sum1.pow_(2 - MSE_NORM), out=bound[i])
    # Where nothing is off, or the norm is one that the bound does not hold for, every range has a chance.
    bound = torch.where(torch.isfinite(bound), bound, 0.0).mul_(1 - SLACK if MSE_NORM >= 2 else 0.0)
    bound = torch.where(usable, bound, torch.inf)
    error = torch.full_like(bound, torch.inf)
    first = bound.argmin(0)
    error[first, columns] = grids.errors(x, (first, columns)).abs_().pow_(MSE_NORM).sum(0)
    left = usable & (bound <= error[first, columns])
    left[first, columns] = False
    range_, column = left.nonzero(as_tuple=True)
    for pairs in zip(range_.split(x.shape[1]), column.split(x.shape[1]), strict=True):
        error[pairs] = grids.errors(x.index_select(1, pairs[1]), pairs).abs_().pow_(MSE_NORM).sum(0)
    return within[error.argmin(0)]


def _half_quadratic(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Real zero points (rows, G), as they are stored, of groups (rows, G, g) under stored scales."""
    if groups.numel() == 0:
        return zero
    x, s, start = groups.reshape(-1, groups.shape[-1]), scale.reshape(-1).float(), zero.reshape(-1).float()
    found, step = torch.empty_like(start), max(1, SEARCH // groups.shape[-1])
    for begin in range(0, len(x), step):
        part = slice(begin, begin + step)
        found[part] = zero_points(x[part].float(), s[part], start[part], scheme.element.levels - 1, zero.dtype)
    return found.view(zero.shape).to(zero.dtype)


class _Grids:
    """Many scales and zeros (p, n), float32, of the same n columns."""

    def __init__(self, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> None:
        self.scheme, self.scale, self.zero = scheme, scale, zero
        self.top = scheme.element.levels - 1
        self.half = float((self.top + 1) // 2)
        self.real = scheme.zero == "real"
        self.lowest: Tensor | None = None if zero is None else -zero
        self.highest: Tensor | None = None if zero is None else self.top - zero

    def of(self, which: Tensor) -> _Grids:
        """Those of some indices."""
        return _Grids(self.scheme, self.scale[which], None if self.zero is None else self.zero[which])

    def errors(self, x: Tensor, pick: int | tuple[Tensor, Tensor]) -> Tensor:
        """x^ - x of columns x (g, m) under the picked scales (m,): what `quantize` and `dequantize` give."""
        scale = self.scale[pick]
        q = torch.div(x, scale)
        if self.zero is None or self.lowest is None or self.highest is None:
            q.round_().clamp_(-self.half, self.top - self.half)
        elif self.real:
            zero = self.zero[pick]
            q.add_(zero).round_().clamp_(0, self.top).sub_(zero)
        else:
            torch.clamp(q.round_(), self.lowest[pick], self.highest[pick], out=q)
        return q.mul_(scale).sub_(x)

    def cut(self, least: Tensor, most: Tensor) -> Tensor:
        """How far the ranges (p, n) leave the least or the greatest element (n,) outside, whichever is more."""
        if self.lowest is None or self.highest is None:
            return torch.maximum(self.scale * -self.half - least, most - self.scale * (self.top - self.half))
        return torch.maximum(self.lowest * self.scale - least, most - self.highest * self.scale)


class _Tables:
    """As `_Grids`, for an element with a table; errors without their sign."""

    def __init__(self, element: codebook.Coded, scale: Tensor) -> None:
        self.element, self.scale = element, scale

    def errors(self, x: Tensor, pick: int | tuple[Tensor, Tensor]) -> Tensor:
        """|x^ - x| of columns x (g, m) under the picked scales (m,)."""
        scale = self.scale[pick]
        return codebook.distance(torch.div(x, scale), self.element).mul_(scale)


def _expanded(
    scale: Tensor, zero: Tensor | None, scheme: Scheme, k: int, begin: int, end: int
) -> tuple[Tensor, Tensor | float]:
    """Scale and zero broadcastable against rows begin..end of a (rows, k) matrix, in float32."""
    half = float(scheme.element.levels // 2)
    if scheme.scale.granularity == "tensor":
        return scale.float(), (zero.float() if zero is not None else half)
    s = scale[begin:end].float()
    z = zero[begin:end].float() if zero is not None else None
    if scheme.scale.granularity == "group":
        g = scheme.scale.group_of(k)
        s = s.repeat_interleave(g, dim=1)[:, :k]
        z = z.repeat_interleave(g, dim=1)[:, :k] if z is not None else None
    return s, (z if z is not None else half)


def _row_chunks(rows: int, k: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK // max(1, k))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
