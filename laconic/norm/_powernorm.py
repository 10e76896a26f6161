"""`powernorm`: batch norm by a quadratic mean, smoothed over steps in both the forward and the backward pass.

For x (..., C), psi^2 = mean of x^2 over the real tokens, per channel. A first stage, "layer scale", divides each token
by the root of the mean square of each group of its channels. Then at step t = 1, 2, ...

    PN-V:      y = g x / sqrt(psi^2 + eps) + b,  differentiated exactly
    PN:        z = x / sqrt(S + eps),  y = g z + b,  S = psi^2 while t <= warmup, phi afterwards
    phi:       while t < warmup first phi <- phi (t - 1) / t + psi^2 / t; always phi <- a_f phi + (1 - a_f) psi^2
    backward:  G = g dy,  H = G - (1 - a_b) nu z,  dx = H / sqrt(psi^2 + eps),  nu <- nu + mean(H z)
    evaluation: x / sqrt(phi + eps), layer scale as before

phi starts at 1, nu at 0; a_f and a_b are decays (torch's momentum is 1 - a).

Source: "PowerNorm: Rethinking Batch Normalization in Transformers", Shen, Yao, Gholami, Mahoney, Keutzer, 2020, arXiv
2003.07845. Official code: sIncerass/powernorm, GPL-3.0; this is written from the equations. Paper and code differ: the
code divides the gradient by psi of the present batch also after the warm-up (`grad_scale="batch"`, the default here),
the paper by what the forward pass divided by ("running"). As in the code, the mean of H z is over all tokens.

At inference PN without layer scale is affine, s = g / sqrt(phi + eps), t = b, and folds; with layer scale that part
folds, and a division by the token's own mean square stays: see `fold_affine`.

Use it in transformers where batch statistics jump (text) and LayerNorm is to be replaced by something that folds. State
changes in both passes: one backward to each forward, activation checkpointing included (it is noticed), and
`accumulate` where several micro-batches make a step. Under DistributedDataParallel every process has its own psi and
the first one's phi is kept, as with batch norm.

Example:
    >>> import torch
    >>> from laconic.norm import PowerNorm
    >>> norm = PowerNorm(2, layer_scale_groups=None)
    >>> norm(torch.tensor([[3.0, 1.0], [4.0, 1.0]])).square().mean(0)
    tensor([1.0000, 1.0000], grad_fn=<MeanBackward1>)
    >>> norm.running_phi
    tensor([12.5000,  1.0000])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from laconic.core.affine import Affine, affine_of
from laconic.core.card import Card
from laconic.core.statistics import recomputing, widened

from ._quadratic_mean import Call, QuadraticMeanNorm

GRAD_SCALES = ("batch", "running")
VARIANTS = ("pn", "pn-v")


def layer_scale(x: Tensor, groups: int, eps: float, channel_dim: int = -1) -> Tensor:
    """Each group of a token's channels divided by the root of its mean square."""
    split = widened(x).unflatten(channel_dim, (groups, -1))
    inner = channel_dim % x.ndim + 1
    y = split * torch.rsqrt(split.square().mean(inner, keepdim=True) + eps)
    return y.flatten(inner - 1, inner).to(x.dtype)


class LayerScale(nn.Module):
    """`layer_scale` as a module: what is left of a `PowerNorm` when the rest is folded.

    Args:
        groups: of channels.
        eps: added to the mean square.
        channel_dim: the axis of the channels.
    """

    def __init__(self, groups: int = 1, eps: float = 1e-5, channel_dim: int = -1):
        super().__init__()
        self.groups, self.eps, self.channel_dim = groups, eps, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        return layer_scale(x, self.groups, self.eps, self.channel_dim)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}, channel_dim={self.channel_dim}"


class PowerNorm(QuadraticMeanNorm):
    """PN and PN-V.

    Args:
        num_features: channels C.
        eps: added to mean squares.
        alpha_fwd: a_f, decay of phi.
        alpha_bwd: a_b, decay of nu.
        warmup_iters: steps that divide by the present batch.
        layer_scale_groups: groups of channels of the first stage; None leaves it out.
        channel_dim: the axis of the channels.
        variant: "pn" or "pn-v".
        grad_scale: "batch" or "running".
        affine: learn g and b.
        accumulate: micro-batches to an update of phi and nu.
        device, dtype: of parameters and state.

    Raises:
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup_iters: int = 10000,
        layer_scale_groups: int | None = 1,
        channel_dim: int = -1,
        *,
        variant: str = "pn",
        grad_scale: str = "batch",
        affine: bool = True,
        accumulate: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, affine, channel_dim, accumulate, device, dtype)
        for name, decay in (("alpha_fwd", alpha_fwd), ("alpha_bwd", alpha_bwd)):
            if not 0 <= decay <= 1:
                raise ValueError(f"PowerNorm: {name} is {decay}: it must be in [0, 1]")
        if variant not in VARIANTS or grad_scale not in GRAD_SCALES:
            raise ValueError(
                f"PowerNorm: variant is one of {VARIANTS} and grad_scale of {GRAD_SCALES}, not {variant!r}, {grad_scale!r}"
            )
        if layer_scale_groups is not None and (layer_scale_groups < 1 or num_features % layer_scale_groups):
            raise ValueError(f"PowerNorm: {num_features} channels do not make {layer_scale_groups} groups")
        self.alpha_fwd, self.alpha_bwd, self.warmup_iters = alpha_fwd, alpha_bwd, warmup_iters
        self.layer_scale_groups, self.variant, self.grad_scale = layer_scale_groups, variant, grad_scale
        placed = {"device": device, "dtype": dtype}
        self.register_buffer("running_phi", torch.ones(num_features, **placed))
        self.register_buffer("running_nu", torch.zeros(num_features, **placed))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def scaled(self, x: Tensor) -> Tensor:
        """Layer scale, where there is one."""
        if self.layer_scale_groups is None:
            return x
        return layer_scale(x, self.layer_scale_groups, self.eps, self.channel_dim)

    def running(self) -> Tensor:
        """phi."""
        return self.running_phi

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y, of the shape and type of x; see `QuadraticMeanNorm.forward`."""
        if self.variant == "pn" or not self.training:
            return super().forward(x, mask)
        self.check(x)
        wide = self.scaled(widened(x))
        _, seen, count = self.batch_moments(wide, mask, centred=False)
        if count and not recomputing():
            self._follow(seen.detach())
        return self._divided(wide, seen if count else self.running_phi).to(x.dtype)

    def smooth(self, seen: Tensor, update: bool) -> Call:
        """S = psi^2 in the warm-up, phi before this step afterwards."""
        warming = int(self.num_batches_tracked) + 1 <= self.warmup_iters
        squared = seen if warming else widened(self.running_phi).clone()
        if update:
            self._follow(seen)
        return Call(seen, squared, seen if self.grad_scale == "batch" else squared)

    def gradient_state(self) -> tuple[Tensor, ...]:
        """nu."""
        return (widened(self.running_nu).clone(),)

    def smooth_gradient(self, call: Call, gz: Tensor, zz: Callable[[], Tensor], update: bool) -> Tensor:
        """(1 - a_b) nu; nu grows by the mean of H z."""
        assert call.past is not None
        nu = (1 - self.alpha_bwd) * call.past[0]
        means = self._backward_means.add(gz - nu * zz()) if update else None
        if means is not None:
            self.running_nu.add_(means[0].to(self.running_nu.dtype))
        return nu

    def _follow(self, seen: Tensor) -> None:
        means = self._forward_means.add(seen)
        if means is None:
            return
        self.num_batches_tracked.add_(1)
        step, phi = int(self.num_batches_tracked), widened(self.running_phi)
        if step < self.warmup_iters:
            phi = phi * (step - 1) / step + means[0] / step
        self.running_phi.copy_(self.alpha_fwd * phi + (1 - self.alpha_fwd) * means[0])

    def as_affine(self) -> Affine | None:
        """s = g / sqrt(phi + eps), t = b; None with layer scale, of which `split_affine` tells.

        Raises:
            ValueError: in training mode.
        """
        if self.layer_scale_groups is not None:
            return None
        return self.split_affine()[1]

    def split_affine(self) -> tuple[nn.Module, Affine]:
        """What stays at inference, and the affine map after it.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("PowerNorm is in training mode: call model.eval() first")
        groups = self.layer_scale_groups
        rest = nn.Identity() if groups is None else LayerScale(groups, self.eps, self.channel_dim)
        return rest.eval(), affine_of(self.running_phi, self.eps, None, self.weight, self.bias)


CARD = Card(
    id="powernorm",
    title="PowerNorm: Rethinking Batch Normalization in Transformers",
    authors="Shen, Yao, Gholami, Mahoney, Keutzer",
    year=2020,
    source="arXiv 2003.07845",
    family="norm",
    summary="Batch norm without centring, with running quadratic means in the forward and the backward pass, for "
    "transformers on text.",
    objects={"PowerNorm": "Layer"},
    traits={"PowerNorm": ("gradient:stateful", "batch_independent_eval")},
    use="Transformers on text whose norms are to fold at inference.",
    avoid="Second derivatives, or several backward passes to a forward: the backward pass has a state.",
    composes=("fold_affine", "unified_norm"),
    vectors=("powernorm",),
    code="github.com/sIncerass/powernorm, GPL-3.0",
    claim={
        "text": "In a language model PowerNorm is better than batch norm; here: a character transformer needs fewer "
        "bits to a character, by more than 0.05, at evaluation.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("batchnorm", "powernorm"),
        "seeds": 5,
        "minutes": 5,
        "task": "chars",
    },
)
