"""Singular values without a decomposition: power iteration, and Newton-Schulz orthogonalization.

For a matrix W (m, n) with singular values s_1 >= s_2 >= ... and vectors u_i (m,), v_i (n,):

    power iteration     u <- W v / |W v|,   v <- W^T u / |W^T u|       u, v -> u_1, v_1 as (s_2 / s_1)^(2 steps)
    estimate            s_1 ~ u^T W v <= s_1
    Newton-Schulz       X <- a X + (b A + c A^2) X,   A = X X^T        every s_i of X <- a s + b s^3 + c s^5

The estimate never exceeds s_1: what is promised to anyone (a Lipschitz certificate) takes `largest_singular_value`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "QUINTIC",
    "as_matrix",
    "largest_singular_value",
    "newton_schulz",
    "power_iteration",
    "rayleigh",
    "start_vectors",
]

Coefficients = tuple[float, float, float]

# Steep at zero, so that five steps bring every singular value above about 0.003 into [0.7, 1.2], where they stay.
# From "Muon: An optimizer for hidden layers in neural networks", Jordan et al., 2024.
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)


def as_matrix(weight: Tensor, dim: int = 0) -> Tensor:
    """A weight as a matrix: one row for each index of `dim`, all other dimensions flattened in their order.

    Raises:
        ValueError: the weight has no such dimension.
    """
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no dimension {dim}")
    return weight.movedim(dim, 0).flatten(1)


def power_iteration(matrix: Tensor, u: Tensor, v: Tensor, steps: int = 1, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Singular vectors after some more steps, u first; no gradient flows through them.

    Args:
        matrix: W (m, n).
        u: (m,), returned as it is where there are no steps; the first step replaces it without reading it.
        v: (n,), of unit length.
        steps: how many.
        eps: vectors shorter than this are divided by it instead of their length.
    """
    with torch.no_grad():
        for _ in range(steps):
            u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
            v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps)
    return u, v


def start_vectors(
    matrix: Tensor, steps: int = 15, eps: float = 1e-12, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random unit vectors u (m,), v (n,), brought near the first singular vectors by some steps."""
    u, v = (matrix.new_empty(size).normal_(generator=generator) for size in matrix.shape)
    u, v = F.normalize(u, dim=0, eps=eps), F.normalize(v, dim=0, eps=eps)
    return power_iteration(matrix.detach(), u, v, steps, eps)


def rayleigh(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The estimate u^T W v of the largest singular value; its gradient with respect to W is u v^T."""
    return torch.vdot(u, torch.mv(matrix, v))


def largest_singular_value(matrix: Tensor) -> Tensor:
    """The spectral norm (...) of matrices (..., m, n), from a full decomposition in float32 or wider."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    return torch.linalg.matrix_norm(wide, 2)


def newton_schulz(
    matrix: Tensor,
    coefficients: Sequence[Coefficients] = (QUINTIC,) * 5,
    *,
    eps: float = 1e-7,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """Push the singular values of matrices towards one and keep their singular vectors.

    The matrix is first divided by its Frobenius norm, so that no singular value exceeds one.

    Args:
        matrix: (..., m, n).
        coefficients: (a, b, c) of each step.
        eps: added to the Frobenius norm.
        dtype: to compute in, and of the result; None for the matrix's own.
    """
    x = matrix if dtype is None else matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products are of the smaller side
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
