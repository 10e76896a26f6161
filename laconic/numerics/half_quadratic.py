"""Zero points by half-quadratic splitting (HQQ): real ones, found from the weights alone.

With the step s of a group fixed, q = clamp(round(x / s) + z) and x^ = s (q - z), the zero point z is to make

    sum |x - x^|^p        0 < p <= 1: a few large errors cost less than many small ones

small. An auxiliary error u splits that into two steps with closed solutions, taken in turns:

    u = sign(e) max(0, |e| - |e|^(p-1) / beta)        e = x - x^
    z = mean over the group of q - (x - u) / s

Source: "Half-Quadratic Quantization of Large Machine Learning Models", Badri and Shaji, 2023, without a paper. Official code:
mobiusml/hqq, Apache-2.0. `half_quadratic` is its loop, in which all groups stop together. `zero_points`, the rule `hqq` of a
`Scale`, lets each group stop by itself and keeps the best z that it had: what a group gets does not depend on how many others
there are, and never has a larger mean |e| than the zero point of its range. z is tried as it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BETA", "NORM", "TURNS", "half_quadratic", "zero_points"]

NORM, BETA, TURNS = 0.7, 10.0, 20


def half_quadratic(
    x: Tensor, inverse: Tensor, zero: Tensor, codes: tuple[int, int], *,
    axis: int = -1, norm: float = NORM, beta: float = BETA, growth: float = 1.0, turns: int = TURNS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and zero points, all groups stopping together where the mean |e| no longer falls.

    Args:
        x: float32.
        inverse: 1 / s, of size 1 along `axis`.
        zero: where z starts, likewise.
        codes: the least and the greatest.
        axis: of a group.
        norm: p.
        beta: as above.
        growth: what beta is multiplied by after each turn.
        turns: at most.

    Raises:
        ValueError: p is not in (0, 1], beta is not positive, or there are no codes.
    """
    if not 0 < norm <= 1 or not beta > 0 or codes[0] >= codes[1]:
        raise ValueError(f"half_quadratic: norm={norm} in (0, 1], beta={beta} above 0, codes={codes} from least to most")
    least = float("inf")
    for _ in range(turns):
        q, error = _error(x, inverse, zero, codes)
        zero = (q - (x - _shrunk(error, norm, beta)) * inverse).mean(axis, keepdim=True)
        size = float(error.abs().mean())
        if not size < least:
            break
        least, beta = size, beta * growth
    return (x * inverse + zero).round().clamp(*codes), zero


def zero_points(x: Tensor, scale: Tensor, zero: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """The zero points (n,) of groups x (n, g), all in float32; each group stops by itself and keeps its best.

    Args:
        x: groups.
        scale: s (n,).
        zero: where they start (n,).
        top: the greatest code.
        dtype: what they are stored in; the result can be.
    """
    best, least = zero.clone(), torch.full_like(zero, torch.inf)
    groups = torch.arange(len(x), device=x.device)
    inverse, tried = (1 / scale)[:, None], zero[:, None]
    for _ in range(TURNS):
        tried = tried.to(dtype).float()
        q, error = _error(x, inverse, tried, (0, top))
        size = error.abs().mean(1)
        better = torch.isfinite(tried[:, 0]) & (size < least[groups])
        groups, x, inverse, tried = groups[better], x[better], inverse[better], tried[better]
        if not len(groups):
            break
        best[groups], least[groups] = tried[:, 0], size[better]
        tried = (q[better] - (x - _shrunk(error[better], NORM, BETA)) * inverse).mean(1, keepdim=True)
    return best


def _error(x: Tensor, inverse: Tensor, zero: Tensor, codes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """q and e."""
    q = (x * inverse + zero).round().clamp(*codes)
    return q, x - (q - zero) / inverse


def _shrunk(error: Tensor, norm: float, beta: float) -> Tensor:
    """u."""
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).relu()
