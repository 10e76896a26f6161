"""Walsh-Hadamard transform of vectors whose length is a power of two.

H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]];  the transform is x H_n / sqrt(n), orthogonal and its own
inverse (Sylvester's order). n log2 n additions instead of n^2 products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x H_n / sqrt(n) along the last axis.

    Args:
        x: (..., n) floating, n a power of two.

    Raises:
        ValueError: n is no power of two (other sizes need base matrices, which come with the rotation
            methods).
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: length {n} is not a power of two")
    y = x.reshape(-1, n)
    h = 1
    while h < n:
        a, b = y.view(-1, n // (2 * h), 2, h).unbind(2)
        y = torch.stack((a + b, a - b), dim=2).view(-1, n)
        h *= 2
    return (y * n**-0.5).view(x.shape)
