"""`evonorm`: six layers, found by evolution, that normalize and activate in one.

For x (N, C, H, W), per channel or group of channels, with biased variances V and mean squares R over

    b: (N, H, W) of a channel        i: (H, W) of one example's channel        g: (C / G, H, W) of one example's group

    B0: x / max(sqrt(V_b + eps), v x + sqrt(V_i + eps))            S0: x sigmoid(v x) / sqrt(V_g + eps)
    B1: x / max(sqrt(V_b + eps), (x + 1) sqrt(R_i + eps))          S1: silu(x) / sqrt(V_g + eps)
    B2: x / max(sqrt(V_b + eps), sqrt(R_i + eps) - x)              S2: silu(x) / sqrt(R_g + eps)

each followed by gamma * . + beta, gamma, beta and v per channel. The numerator is not centred. No activation follows:
it is inside. The B series looks at the batch: in evaluation mode a running V_b, stored unbiased, takes its place. The S
series looks at one example alone.

Source: "Evolving Normalization-Activation Layers", Liu, Brock, Simonyan, Le, 2020, arXiv 2004.02967. The paper's code
for TPUs was not seen; conventions are those of timm (Apache-2.0, re-written): eps 1e-3 for B0 and 1e-5 for the others,
gradients flow through all statistics. Statistics are taken in float32 at least.

Nothing folds at inference: even the B series keeps a division by what the example gives. Use S0 in place of a norm and
its ReLU where batches are small; B0 where they are large. Not where inference must be a bare convolution: a batch norm
folds and these do not. Maps of a single value per group have variance 0: keep H W C / G well above 1.

Example:
    >>> import torch
    >>> from laconic.norm import EvoNorm2d
    >>> layer = EvoNorm2d(8, "S1", groups=4)
    >>> layer(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.statistics import RunningStat, moments, pooled, widened

KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")
EPS = {"B0": 1e-3}
USUAL_EPS = 1e-5
BATCH, PLACES = (0, 2, 3), (2, 3)


def evonorm_b(x: Tensor, batch_var: Tensor, kind: str, v: Tensor | None, eps: float) -> Tensor:
    """The B series before gamma and beta, of x's shape.

    Args:
        x: (N, C, H, W), in float32 at least.
        batch_var: V_b, (C,).
        kind: "B0", "B1" or "B2".
        v: (C,), of B0.
        eps: see the equations.
    """
    of_batch = (batch_var + eps).sqrt().view(1, -1, 1, 1)
    if kind == "B0":
        assert v is not None
        of_one = v.view(1, -1, 1, 1) * x + (moments(x, PLACES)[1] + eps).sqrt()
    else:
        root = (moments(x, PLACES, centred=False)[1] + eps).sqrt()
        of_one = (x + 1) * root if kind == "B1" else root - x
    return x / torch.maximum(of_batch, of_one)


def evonorm_s(x: Tensor, groups: int, kind: str, v: Tensor | None, eps: float) -> Tensor:
    """The S series before gamma and beta, of x's shape.

    Args:
        x: (N, C, H, W), in float32 at least.
        groups: G.
        kind: "S0", "S1" or "S2".
        v: (C,), of S0.
        eps: see the equations.
    """
    spread = moments(x.unflatten(1, (groups, -1)), (2, 3, 4), centred=kind != "S2")[1]
    gate = torch.sigmoid(x if v is None else v.view(1, -1, 1, 1) * x)
    return ((x * gate).unflatten(1, (groups, -1)) / (spread + eps).sqrt()).flatten(1, 2)


class EvoNorm2d(nn.Module):
    """A normalization with its activation, for (N, C, H, W).

    Args:
        num_features: C.
        kind: one of B0, B1, B2, S0, S1, S2.
        groups: G, of the S series; must divide C.
        group_size: C / G, instead of `groups`.
        apply_act: False leaves gamma and beta alone, as behind the last convolution of a residual branch.
        eps: 1e-3 for B0 and 1e-5 for the others by default.
        momentum: of the running variance, in torch's convention.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown kind, groups that do not divide C; in the call, an input of another shape, or in training
            mode one value to a channel under the B series.
    """

    running_var: Tensor
    v: Tensor | None

    def __init__(
        self,
        num_features: int,
        kind: str = "S0",
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float | None = None,
        momentum: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"evonorm: kind is {kind!r}: it must be one of {', '.join(KINDS)}")
        self.of_batch = kind.startswith("B")
        if group_size is not None:
            if group_size < 1 or num_features % group_size:
                raise ValueError(f"evonorm: groups of {group_size} channels do not divide {num_features} channels")
            groups = num_features // group_size
        if not self.of_batch and (groups < 1 or num_features % groups):
            raise ValueError(f"evonorm: {groups} groups do not divide {num_features} channels: give groups=")
        self.num_features, self.kind, self.groups, self.apply_act = num_features, kind, groups, apply_act
        self.eps = EPS.get(kind, USUAL_EPS) if eps is None else eps
        self.momentum = momentum
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.weight, self.bias = nn.Parameter(ones), nn.Parameter(torch.zeros_like(ones))
        learned = apply_act and kind in ("B0", "S0")
        self.register_parameter("v", nn.Parameter(ones.clone()) if learned else None)
        if self.of_batch:
            self.register_buffer("running_var", ones.clone())

    def reset_parameters(self) -> None:
        """gamma and v at 1, beta at 0, the running variance at 1."""
        nn.init.zeros_(self.bias)
        for tensor in (self.weight, self.v, self.running_var if self.of_batch else None):
            if tensor is not None:
                nn.init.ones_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"evonorm: an input of {tuple(x.shape)}: it must be (N, {self.num_features}, H, W)")
        if self.apply_act:
            wide = widened(x)
            v = None if self.v is None else self.v.to(wide.dtype)
            if self.of_batch:
                y = evonorm_b(wide, self._batch_var(wide), self.kind, v, self.eps)
            else:
                y = evonorm_s(wide, self.groups, self.kind, v, self.eps)
            y = y.to(x.dtype)
        else:
            y = x
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    def _batch_var(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.running_var.to(x.dtype)
        count = int(pooled(x, BATCH))
        if count < 2:
            raise ValueError(f"evonorm: an input of {tuple(x.shape)} has no variance: train on 2 values a channel or more")
        variance = moments(x, BATCH, keepdim=False)[1]
        stat = RunningStat(self.momentum)
        stat.update((self.running_var,), (stat.corrected(variance, count),))
        return variance

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}", f"{self.kind!r}", f"eps={self.eps}"]
        parts.append(f"momentum={self.momentum}" if self.of_batch else f"groups={self.groups}")
        return ", ".join(parts + ["apply_act=False"] * (not self.apply_act))


CARD = Card(
    id="evonorm",
    title="Evolving Normalization-Activation Layers",
    authors="Liu, Brock, Simonyan, Le",
    year=2020,
    source="arXiv 2004.02967",
    family="norm",
    summary="A normalization and an activation in one layer, found by evolution; the S series does not look at the batch.",
    objects={"EvoNorm2d": "Layer"},
    traits={"EvoNorm2d": ("gradient:exact", "batch_independent_eval")},
    use="In place of a norm and its ReLU in convolutional networks: S0 with small batches, B0 with large ones.",
    avoid="Where the norm is to fold into the convolution at inference.",
    composes=("weight_standardization",),
    vectors=("evonorm",),
    code="timm/layers/evo_norm.py, Apache-2.0 (not the authors')",
    claim={
        "text": "With four examples to a batch, EvoNorm S0 is more accurate than batch norm and ReLU, by more than half "
        "a point.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("batchnorm_relu", "evonorm_s0"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
