"""`sla`: linear attention with a ReLU kernel, and a depthwise convolution of the values for what is local.

For tokens x (B, N, C) on a grid, heads of c channels, learned positions P (1, M, C) that start at 0:

    q, k, v = W x;   q <- relu(q),   k <- relu(k + P)
    o_i = q_i sum_j k_j^T v_j / (q_i . sum_j k_j + eps)                      per head, in float32
    o  <- o + depthwise convolution (5 x 5, with bias) of v as a picture,     weights shared by the heads
    y = W_o (o of all heads)

The sum over j comes first where that is cheaper, N M (c + c) > c c (N + M): N c^2 products and not N^2 c. With a
`reduction` of r, as in PVT, keys and values are of the grid reduced by a convolution of stride r, M = N / r^2 of them,
and v is stretched along the tokens, linearly, to N before it is convolved.

Source: "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", Guo, Chen, Tang, Wang, 2024, arXiv 2405.11582. Official code: xinghaochen/SLAB, no licence found. We
differ from it in that the grid need not be a square.

Nothing folds inside; a norm before it that is affine folds into `qkv`: see `fold_affine`.

Use it in vision transformers with many tokens in place of softmax attention. There is no place for a class token. A
token whose q is nowhere positive gets only the convolution, and no gradient through q.

Example:
    >>> import torch
    >>> from laconic.norm import SimplifiedLinearAttention
    >>> SimplifiedLinearAttention(8, num_heads=2, num_tokens=16)(torch.randn(3, 16, 8)).shape
    torch.Size([3, 16, 8])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """o (..., N, d) for q (..., N, c) and k (..., M, c), neither negative, and v (..., M, d)."""
    n, c, m, d = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    share = 1 / (q @ k.sum(-2).unsqueeze(-1) + eps)
    if n * m * (c + d) > c * d * (n + m):
        return (q @ (k.mT @ v)) * share
    return ((q @ k.mT) @ v) * share


class SimplifiedLinearAttention(nn.Module):
    """The layer, from tokens to tokens.

    Args:
        dim: channels C.
        num_heads: heads.
        num_tokens: N, a square number, or the grid (h, w).
        kernel_size: of the depthwise convolution; odd.
        qkv_bias: queries, keys and values have a bias.
        eps: added to the sum of weights.
        reduction: r; the grid's sides are multiples of it.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int | tuple[int, int],
        kernel_size: int = 5,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        *,
        reduction: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        side = math.isqrt(num_tokens) if isinstance(num_tokens, int) else 0
        self.grid = (side, side) if isinstance(num_tokens, int) else tuple(num_tokens)
        if isinstance(num_tokens, int) and side * side != num_tokens:
            raise ValueError(f"sla: {num_tokens} tokens are no square: give num_tokens=(height, width)")
        if dim % num_heads or kernel_size % 2 == 0:
            raise ValueError(
                f"sla: {dim} channels in {num_heads} heads, kernel {kernel_size}: it must divide, and be odd"
            )
        if reduction < 1 or any(size % reduction for size in self.grid):
            raise ValueError(f"sla: a grid of {self.grid} cannot be reduced by {reduction}")
        self.dim, self.num_heads, self.eps, self.reduction = dim, num_heads, eps, reduction
        placed = {"device": device, "dtype": dtype}
        if reduction == 1:
            self.qkv = nn.Linear(dim, 3 * dim, qkv_bias, **placed)
        else:
            self.q, self.kv = nn.Linear(dim, dim, qkv_bias, **placed), nn.Linear(dim, 2 * dim, qkv_bias, **placed)
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction, **placed)
            self.norm = nn.LayerNorm(dim, **placed)
        self.positions = nn.Parameter(torch.zeros(1, math.prod(self.grid) // reduction**2, dim, **placed))
        head = dim // num_heads
        self.dwc = nn.Conv2d(head, head, kernel_size, padding=kernel_size // 2, groups=head, **placed)
        self.proj = nn.Linear(dim, dim, **placed)

    def forward(self, x: Tensor) -> Tensor:
        """y (B, N, C).

        Raises:
            ValueError: x has other axes.
        """
        tokens = math.prod(self.grid)
        if x.ndim != 3 or x.shape[1:] != (tokens, self.dim):
            raise ValueError(f"sla: the input is (batch, {tokens}, {self.dim}), not {tuple(x.shape)}")
        q, k, v = self._queries_keys_values(x)
        q, k, v = (self._heads(part) for part in (F.relu(q), F.relu(k + self.positions), v))
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        o = linear_attention(q.to(wide), k.to(wide), v.to(wide), self.eps).to(x.dtype) + self._local(v)
        return self.proj(o.transpose(1, 2).flatten(2))

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.reduction == 1:
            return self.qkv(x).chunk(3, -1)
        picture = x.transpose(1, 2).unflatten(2, self.grid)
        reduced = self.norm(self.reduce(picture).flatten(2).transpose(1, 2))
        return self.q(x), *self.kv(reduced).chunk(2, -1)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, M, C) -> (B, heads, M, c)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _local(self, v: Tensor) -> Tensor:
        """The convolution of v (B, heads, M, c) over the grid: (B, heads, N, c)."""
        rows = v.flatten(0, 1).mT
        if self.reduction > 1:
            rows = F.interpolate(rows, size=math.prod(self.grid), mode="linear")
        return self.dwc(rows.unflatten(-1, self.grid)).flatten(2).mT.unflatten(0, (-1, self.num_heads))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.num_heads}, reduction={self.reduction}"


CARD = Card(
    id="sla",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
    "Normalization",
    authors="Guo, Chen, Tang, Wang",
    year=2024,
    source="arXiv 2405.11582",
    family="norm",
    summary="Linear attention for vision transformers: a ReLU kernel, whose cost grows with the tokens and not with "
    "their square, and a depthwise convolution.",
    objects={"SimplifiedLinearAttention": "Layer"},
    traits={"SimplifiedLinearAttention": ("gradient:exact", "batch_independent_eval")},
    use="Vision transformers with many tokens on a grid.",
    avoid="Class tokens, causal models, and few tokens, where softmax attention costs no more.",
    composes=("prepbn", "fold_affine"),
    code="github.com/xinghaochen/SLAB, no licence found",
    claim={
        "text": "In place of softmax attention, simplified linear attention lowers latency; here: the logarithm of the "
        "processor time of a layer on 1,024 tokens falls by more than 0.1.",
        "metric": "log of CPU seconds a call",
        "direction": "lower",
        "margin": 0.1,
        "arms": ("softmax", "sla"),
        "seeds": 5,
        "minutes": 5,
        "task": "random tokens",
    },
)
