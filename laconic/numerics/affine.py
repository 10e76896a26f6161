"""The affine map between real numbers and integer codes: scales, rounding, and back.

    q = clamp(round(x / s) + z, 0, 2^b - 1)          x^ = s * (q - z)

Conventions, each tested:
- symmetric (`zero="none"`): z = 2^(b-1), s = 2 amax / (2^b - 1) clipped so that both ends are used (the range
  is [-2^(b-1), 2^(b-1) - 1], the step that of compressed-tensors), asymmetric: the range is stretched to hold
  0, so that 0 is exact, s = (max - min) / (2^b - 1), z = round(-min / s) (`int`) or -min / s (`real`, where 0
  need not be exact and the range is not stretched).
- all-zero groups store s = 1 and code z: they come back as exact zeros.
- rounding is to nearest, ties to even (torch.round), or stochastic: floor(x + u), u ~ U[0, 1) from an
  explicit generator.
- scales are rounded to their storage type before codes are computed, and a scale that would round to zero or
  to infinity there raises by name rather than spoil the tensor.
- inf and nan are refused by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Scheme

# Scale search (GPTQ's): p = 1 - i/GRID for i < SHRINK * GRID, least sum |x^ - x|^NORM.
MSE_GRID = 100
MSE_SHRINK = 0.8
MSE_NORM = 2.4
# Elements a chunk of a row-wise computation may touch: bounds temporaries to a few times 64 MiB.
CHUNK = 1 << 24


class NotFinite(ValueError):
    """The tensor holds inf or nan, which no integer code stands for."""


class ScaleOutOfRange(ValueError):
    """A scale cannot be stored in the scheme's dtype (underflow or overflow): use float32 scales here."""


def affine_params(x: Tensor, scheme: Scheme, name: str = "tensor") -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every group of a matrix.

    Args:
        x: (rows, k) floating.
        scheme: says granularity, rule, zero and dtype.
        name: the parameter's path, for messages.

    Returns:
        scale (rows, G) in the scale dtype (or (1, 1) per tensor) and zero: None, uint8 (rows, G), or real
        (rows, G).

    Raises:
        NotFinite: inf or nan in `x`.
        ScaleOutOfRange: a scale does not fit in the scale dtype.
    """
    check_finite(x, name)
    k = x.shape[1]
    tail = k % scheme.scale.group_of(k) if scheme.scale.granularity == "group" else 0
    if tail and scheme.scale.rule != "minmax":
        # The padding of a short group would count in quantiles and errors.
        parts = [affine_params(x[:, : k - tail], scheme, name), affine_params(x[:, k - tail :], scheme, name)]
        zeros = [zero for _, zero in parts if zero is not None]
        return torch.cat([scale for scale, _ in parts], dim=1), torch.cat(zeros, dim=1) if zeros else None
    groups = grouped(x, scheme)
    low, high = _range(groups, scheme)
    if scheme.scale.rule == "mse":
        scale, zero = _search_mse(groups, low, high, scheme, name)
    else:
        scale, zero = params_from_range(low, high, scheme, name)
    return scale, zero


def params_from_range(
    low: Tensor, high: Tensor, scheme: Scheme, name: str = "tensor"
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for value ranges [low, high] (any shape): the end of every scale rule."""
    scale, stored, zero = _params(low, high, scheme)
    if not bool(_storable(stored).all()):
        raise ScaleOutOfRange(
            f"{name}: scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} do not fit in "
            f"{scheme.scale.dtype}; store the scales of this tensor as float32"
        )
    if zero is not None and scheme.zero == "real" and not bool(torch.isfinite(zero).all()):
        raise ScaleOutOfRange(
            f"{name}: a real zero point does not fit in {scheme.scale.dtype}; store it as float32"
        )
    return stored, zero


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, generator: torch.Generator | None = None
) -> Tensor:
    """Codes (rows, k) uint8 of a matrix under given scales: q = clamp(round(x / s) + z, 0, 2^b - 1)."""
    rows, k = x.shape
    codes = torch.empty((rows, k), dtype=torch.uint8, device=x.device)
    for begin, end in _row_chunks(rows, k):
        s, z = _expanded(scale, zero, scheme, k, begin, end)
        v = x[begin:end].float() / s + (z if scheme.zero == "real" else 0)
        noise = torch.rand(v.shape, generator=generator, device=v.device) if scheme.rounding == "stochastic" else None
        v = v.round() if noise is None else torch.floor(v + noise)
        if scheme.zero != "real":
            v = v + z  # the zero point is added after rounding: the two orders differ at ties
        codes[begin:end] = v.clamp_(0, scheme.element.levels - 1).to(torch.uint8)
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Values (rows, k) float32 of codes: x^ = s * (q - z)."""
    rows, k = codes.shape
    out = torch.empty((rows, k), dtype=torch.float32, device=codes.device)
    for begin, end in _row_chunks(rows, k):
        s, z = _expanded(scale, zero, scheme, k, begin, end)
        out[begin:end] = (codes[begin:end].float() - z) * s
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


def check_finite(x: Tensor, name: str) -> None:
    """Raise `NotFinite` that names the tensor and counts its inf and nan."""
    if x.numel() == 0 or bool(torch.isfinite(x.sum(dtype=torch.float32))):
        return  # a finite sum proves that every element is finite, and costs a single pass
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        nan = int(torch.isnan(x).sum())
        raise NotFinite(f"{name}: {nan} nan and {int(bad.sum()) - nan} inf among {x.numel()} values")


def _params(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale in float32 and as stored, and zero point, of value ranges; not checked."""
    top = scheme.element.levels - 1
    low, high = low.float(), high.float()
    if scheme.zero != "real":
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = 2 * torch.maximum(high, -low) if scheme.zero == "none" else high - low
    scale = span / top
    scale = torch.where(span == 0, torch.ones_like(scale), scale)
    stored = scale.to(scheme.scale.torch_dtype)
    if scheme.zero == "none":
        return scale, stored, None
    zero = -low / stored.float()
    if scheme.zero == "int":
        return scale, stored, zero.round().clamp(0, top).nan_to_num(0).to(torch.uint8)
    return scale, stored, zero.to(scheme.scale.torch_dtype)


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


def _search_mse(
    groups: Tensor, low: Tensor, high: Tensor, scheme: Scheme, name: str
) -> tuple[Tensor, Tensor | None]:
    """Least sum |x^ - x|^2.4 over shrunken ranges p * [low, high]; the widest range wins ties."""
    scale, zero = params_from_range(low, high, scheme, name)
    best = _power_error(groups, scale, zero, scheme)
    for i in range(1, int(MSE_SHRINK * MSE_GRID)):
        p = 1 - i / MSE_GRID
        _, s, z = _params(p * low, p * high, scheme)
        error = _power_error(groups, s, z, scheme)
        better = (error < best) & _storable(s)  # group by group, so that no group depends on its neighbours
        if z is not None and scheme.zero == "real":
            better &= torch.isfinite(z)
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
        zero = torch.where(better, z, zero) if zero is not None and z is not None else None
    return scale, zero


def _power_error(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    rows, n_groups, g = groups.shape
    flat = groups.reshape(rows * n_groups, g)
    s = scale.reshape(-1, 1)
    z = zero.reshape(-1, 1) if zero is not None else None
    per_row = scheme.with_(granularity="channel", group=None)
    out = torch.empty(rows * n_groups)
    for begin, end in _row_chunks(rows * n_groups, g):
        zc = z[begin:end] if z is not None else None
        codes = quantize(flat[begin:end], s[begin:end], zc, per_row.with_(rounding="nearest"))
        error = dequantize(codes, s[begin:end], zc, per_row) - flat[begin:end].float()
        out[begin:end] = error.abs_().pow_(MSE_NORM).sum(-1)
    return out.reshape(rows, n_groups)


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
