"""Walsh-Hadamard transforms of vectors of every length that a Hadamard matrix is known for.

A Hadamard matrix H of order n has entries +1 and -1 and H H^T = n I, so x H / sqrt(n) is orthogonal. With n = K 2^m,

    H_n = B_K^T (x) S_m       S_0 = [1],  S_(m+1) = [[S_m, S_m], [S_m, -S_m]]       (x) the Kronecker product

the transform costs n (K + m) additions instead of n^2 products. Where n is a power of two, K = 1 and the transform is
its own inverse; else the inverse is the transform with `transpose`.

Base matrices B_K, with chi(i) the quadratic character of i mod q (0 at 0), and C the circulant C_ij = chi(j - i):

- Paley's first, K = q + 1, q a prime of 4k + 3:    [[1, -1^T], [1, I - C]]
- Paley's second, K = 2 q + 2, q a prime of 4k + 1:  [[S + I, S - I], [S - I, -S - I]],  S = [[0, 1^T], [1, C]]
- Williamson's, K = 4 m:  [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]] of symmetric circulants
- Sylvester's doubling of order 20, K = 40.

`ORDERS` says which K is taken first, as the code of QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456) does, so
that a model that they rotated is rotated alike here; any other n falls to the least order of Paley that divides it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "ORDERS", "base_matrix", "base_order", "hadamard", "hadamard_block", "hadamard_matrix", "random_hadamard",
    "random_orthogonal",
]  # fmt: skip

# Orders of base matrices, in the order in which they are tried.
ORDERS = (172, 156, 148, 140, 108, 60, 52, 36, 28, 40, 20, 48, 12)
# First rows of the four circulants of order m, up to their middle: entry i and entry m - i are the same.
WILLIAMSON = {
    13: ("+-+--++", "+---+++", "++-+--+", "+----+-"),
    37: ("++-+-+----++--+--++", "++-+-+----++--+--++", "++++-++++-+--+---++", "+---+----+-++-+++--"),
    39: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    43: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}


def hadamard(x: Tensor, *, order: int | None = None, transpose: bool = False) -> Tensor:
    """x H_n / sqrt(n) along the last axis.

    Args:
        x: (..., n) floating.
        order: K; by default the first that fits (`base_order`).
        transpose: x H_n^T / sqrt(n) instead, which takes the other back.

    Raises:
        ValueError: no Hadamard matrix of order n is known, or n / `order` is no power of two.
    """
    n = x.shape[-1]
    base = _fitting(n, order)
    y = x.reshape(-1, n)
    h, inner = 1, n // base
    while h < inner:
        a, b = y.view(-1, n // (2 * h), 2, h).unbind(2)
        y = torch.stack((a + b, a - b), dim=2).view(-1, n)
        h *= 2
    if base > 1:
        matrix = base_matrix(base).to(x.device, x.dtype)
        y = ((matrix.T if transpose else matrix) @ y.view(-1, base, inner)).reshape(-1, n)
    return (y * n**-0.5).view(x.shape)


def hadamard_matrix(n: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """H_n / sqrt(n) (n, n), orthogonal: `hadamard` of the rows of the identity.

    Raises:
        ValueError: no Hadamard matrix of order n is known.
    """
    return hadamard(torch.eye(n, dtype=torch.float64)).to(dtype)


def random_hadamard(n: int, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """diag(+-1) H_n / sqrt(n) (n, n), with drawn signs: no fixed vector stays concentrated but by bad luck.

    Raises:
        ValueError: no Hadamard matrix of order n is known.
    """
    signs = 2.0 * torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) - 1
    return (signs * hadamard_matrix(n)).to(dtype)


def random_orthogonal(
    n: int, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """An orthogonal matrix (n, n), evenly distributed: Q of a normal matrix's QR, with the signs of diag R."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(dtype)


def hadamard_block(n: int) -> int:
    """The largest divisor of n that a Hadamard matrix is known for: n itself, or the size of diagonal blocks."""
    return next(d for d in range(n, 0, -1) if n % d == 0 and _order_of(d))


def base_order(n: int) -> int:
    """K of the transform of length n.

    Raises:
        ValueError: no Hadamard matrix of order n is known.
    """
    order = _order_of(n)
    if not order:
        raise ValueError(
            f"hadamard: no Hadamard matrix of order {n} is known here: lengths are powers of two, or such a power "
            "times 12, 20, 28, 36, ...; take blocks of hadamard_block(n), or random_orthogonal(n)"
        )
    return order


@lru_cache(maxsize=64)
def base_matrix(order: int) -> Tensor:
    """B_K (K, K) int8; not to be written to.

    Raises:
        ValueError: it is not known how to make one of this order.
    """
    with torch.inference_mode(False):  # kept for later calls
        if order == 1:
            return torch.ones(1, 1, dtype=torch.int8)
        if order == 40:
            half = base_matrix(20)
            return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
        if order % 4 == 0 and order // 4 in WILLIAMSON:
            return _williamson(order // 4)
        if order % 4 == 0 and _is_prime(order - 1):
            return _paley_first(order - 1)
        if order % 4 == 0 and (order // 2) % 4 == 2 and _is_prime(order // 2 - 1):
            return _paley_second(order // 2 - 1)
    raise ValueError(f"hadamard: no base matrix of order {order} is known here")


def _fitting(n: int, order: int | None) -> int:
    if order is None:
        return base_order(n)
    if order < 1 or n < 1 or n % order or not _is_power(n // order):
        raise ValueError(f"hadamard: length {n} is not {order} times a power of two")
    return order


@lru_cache(maxsize=1024)
def _order_of(n: int) -> int:
    """K of the transform of length n, 0 if there is none."""
    if n < 1:
        return 0
    if _is_power(n):
        return 1
    for order in ORDERS:
        if n % order == 0 and _is_power(n // order):
            return order
    order = n // (n & -n) * 4
    while order <= n:
        if _is_prime(order - 1) or ((order // 2) % 4 == 2 and _is_prime(order // 2 - 1)):
            return order
        order *= 2
    return 0


def _is_power(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _character(q: int) -> Tensor:
    """chi (q,) int8 of a prime q."""
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[torch.arange(1, q).square() % q] = 1
    chi[0] = 0
    return chi


def _circulant(first: Tensor) -> Tensor:
    """M_ij = first_(j - i)."""
    i = torch.arange(len(first))
    return first[(i[None] - i[:, None]) % len(first)]


def _paley_first(q: int) -> Tensor:
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = torch.eye(q, dtype=torch.int8) - _circulant(_character(q))
    return matrix


def _paley_second(q: int) -> Tensor:
    s = torch.ones(q + 1, q + 1, dtype=torch.int8)
    s[0, 0] = 0
    s[1:, 1:] = _circulant(_character(q))
    one = torch.eye(q + 1, dtype=torch.int8)
    return torch.cat([torch.cat([s + one, s - one], 1), torch.cat([s - one, -s - one], 1)])


def _williamson(m: int) -> Tensor:
    halves = [[1 if sign == "+" else -1 for sign in text] for text in WILLIAMSON[m]]
    a, b, c, d = (_circulant(torch.tensor(half + half[:0:-1], dtype=torch.int8)) for half in halves)
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])
