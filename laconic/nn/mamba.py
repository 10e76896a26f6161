"""The mixer of Mamba, written so that it can be rewritten: `MambaMixer`, and `MambaBlock` around it.

For x (N, L, d), E = expand d inner channels, n states each, and a step of rank r:

    u, z = split(W_in x)                      (N, L, E) each
    u <- silu(conv(u) + b)                    causal, k taps, each channel by itself
    t, B, C = split(W_x u)                    r, n and n channels
    D_t = softplus(W_dt t + b_dt)             (N, L, E)
    h_l = exp(D_t A) h_(l-1) + (D_t u_l) B_l^T        A = -exp(A_log) (E, n), h (N, E, n)
    y_l = h_l C_l + D u_l
    out = W_out (y * z sigmoid(s z))          s (E,): `gate_scale`, ones in a plain mixer, where this is silu(z)

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", Gu and Dao, 2023, arXiv 2312.00752.
Parameters have the names of transformers' `MambaMixer`. The scan is a loop over places: for training and for measuring
small models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MambaBlock", "MambaMixer"]

STEPS = (1e-3, 1e-1)  # that D_t starts between


class MambaMixer(nn.Module):
    """(N, L, d) -> the same.

    Args:
        d_model: d.
        d_state: n.
        d_conv: k.
        expand: E / d.
        dt_rank: r; d / 16, rounded up, by default.
        conv_bias: whether the convolution has a bias.
        bias: whether the first and the last layer have one.
        inner: E, where it is not expand * d.
        device, dtype: of parameters.
    """

    gate_scale: Tensor

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None, *,
        conv_bias: bool = True, bias: bool = False, inner: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inner = expand * d_model if inner is None else inner
        self.state = d_state
        self.rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=bias, **options)
        self.conv1d = nn.Conv1d(
            self.inner, self.inner, d_conv, groups=self.inner, padding=d_conv - 1, bias=conv_bias, **options
        )
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * d_state, bias=False, **options)
        self.dt_proj = nn.Linear(self.rank, self.inner, **options)
        start = torch.arange(1, d_state + 1, **options).log().expand(self.inner, -1)
        self.A_log = nn.Parameter(start.clone())
        self.D = nn.Parameter(torch.ones(self.inner, **options))
        self.out_proj = nn.Linear(self.inner, d_model, bias=bias, **options)
        self.register_buffer("gate_scale", torch.ones(self.inner, **options))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            low, high = (math.log(step) for step in STEPS)
            steps = torch.empty_like(self.D).uniform_(low, high).exp()
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps back

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of what came before each place."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(u.mT)[..., : x.shape[1]].mT)
        t, b, c = self.x_proj(u).split([self.rank, self.state, self.state], -1)
        y = self.scan(u, F.softplus(self.dt_proj(t)), b, c)
        return self.out_proj(y * (z * torch.sigmoid(self.gate_scale * z)))

    def scan(self, u: Tensor, step: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """y (N, L, E) of u and D_t (N, L, E), B and C (N, L, n)."""
        a = -self.A_log.exp()
        decay = (step[..., None] * a).exp()  # (N, L, E, n)
        given = (step * u)[..., None] * b[:, :, None]
        h = torch.zeros_like(given[:, 0])
        states = []
        for i in range(u.shape[1]):
            h = decay[:, i] * h + given[:, i]
            states.append(h)
        return torch.einsum("nlek,nlk->nle", torch.stack(states, 1), c) + self.D * u


class MambaBlock(nn.Module):
    """x + mixer(norm(x)): (N, L, d) -> the same.

    Args:
        d_model: d.
        eps: of the norm.
        options: of `MambaMixer`.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, **options: Any):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.mixer = MambaMixer(d_model, **options)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.mixer(self.norm(x))
