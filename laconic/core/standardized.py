"""`standardize`: every output channel's weights with mean 0 and deviation 1, in the conventions that are in use."""

from __future__ import annotations

import torch
from torch import Tensor

from .spectral import as_matrix
from .statistics import widened

__all__ = ["EPS_IN", "check_rows", "standardize"]

EPS_IN = ("std", "sqrt")


def standardize(
    weight: Tensor, eps: float = 1e-5, *, unbiased: bool = True, eps_in: str = "std", dim: int = 0
) -> Tensor:
    """(W_i - mean_i) / (s_i + eps) for each row i of W, of the shape and type of W.

    Args:
        weight: W, of two dimensions or more.
        eps: keeps the division finite where all entries of a row are equal: the row becomes 0.
        unbiased: divide the sum of squares by I - 1 instead of I.
        eps_in: "std" adds eps to the deviation, "sqrt" to the variance.
        dim: the axis of the outputs.

    Raises:
        ValueError: another `eps_in`, a weight without rows, or rows of a single entry.
    """
    if eps_in not in EPS_IN:
        raise ValueError(f"weight_standardization: eps_in is {eps_in!r}: it must be one of {', '.join(EPS_IN)}")
    check_rows(weight, dim)
    rows = weight.movedim(dim, 0)
    axes = tuple(range(1, weight.ndim))
    wide = widened(rows)
    centred = wide - wide.mean(axes, keepdim=True)
    if eps_in == "std":
        standard = centred / (wide.std(axes, correction=int(unbiased), keepdim=True) + eps)
    else:
        standard = centred * torch.rsqrt(wide.var(axes, correction=int(unbiased), keepdim=True) + eps)
    return standard.to(weight.dtype).movedim(0, dim)


def check_rows(weight: Tensor, dim: int) -> None:
    """Refuse a weight whose rows have no deviation.

    Raises:
        ValueError: it has no rows, or rows of a single entry.
    """
    if weight.ndim < 2 or as_matrix(weight, dim).shape[1] < 2:
        raise ValueError(
            f"weight_standardization: a weight of shape {tuple(weight.shape)} has no rows of two entries or more "
            f"along dimension {dim}: a single entry has no deviation"
        )
