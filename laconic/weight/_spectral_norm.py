"""`spectral_norm`: divide a weight by its largest singular value, so that the layer stretches nothing.

The weight as a matrix W (out, rest), with two vectors u (out,), v (rest,) kept between calls. At each use in training:

    u <- W v / |W v|,   v <- W^T u / |W^T u|         n_power_iterations times, no gradient
    sigma = u^T W v                                  u, v held constant
    W' = W / sigma                                   mode "divide": the paper, and torch
    W' = W / max(1, sigma)                           mode "clip": shrinks, and never stretches

    dL/dW = (G - <G, W'> u v^T) / sigma              G = dL/dW'

In evaluation u and v stay as they are, and sigma follows the present W. sigma lies below the true largest value
until the vectors have converged: what is certified takes `laconic.core.spectral.largest_singular_value` instead. For a
convolution sigma is that of the flattened kernel; with stride 1 the layer itself stretches by at most
sqrt(kernel entries) times it.

Source: "Spectral Normalization for Generative Adversarial Networks", Miyato, Kataoka, Koyama, Yoshida, 2018, arXiv
1802.05957. Official code: pfnet-research/sngan_projection, MIT (Chainer). It computes what
`torch.nn.utils.parametrizations.spectral_norm` does, bit for bit, with a generator for the first vectors and "clip"
besides.

At inference W' is baked into the weight, `torch.nn.utils.parametrize.remove_parametrizations`, and costs nothing.

Use it in the discriminator of a GAN, and wherever a layer must be 1-Lipschitz. A weight that is used several times in
one step gets as many iterations: use `torch.nn.utils.parametrize.cached()` there. For a classifier it costs accuracy,
and a small discriminator may become too flat to hold its generator: layers that stretch by at most one shrink what goes
through them, one after the other.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.weight import spectral_norm
    >>> layer = spectral_norm(nn.Linear(20, 30), n_power_iterations=30)
    >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 2)
    1.0
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.spectral import as_matrix, power_iteration, rayleigh, start_vectors
from laconic.errors import BadInput

from ._layers import output_dim

MODES = ("divide", "clip")
WARM_UP = 15  # iterations from random vectors when it is registered, as in torch

M = TypeVar("M", bound=nn.Module)


def spectrally_normalized(weight: Tensor, u: Tensor, v: Tensor, *, dim: int = 0, mode: str = "divide") -> Tensor:
    """W', given the singular vectors.

    Args:
        weight: W.
        u: (outputs,), of unit length.
        v: (rest,), of unit length.
        dim: the axis of the outputs.
        mode: "divide" or "clip".
    """
    sigma = rayleigh(as_matrix(weight, dim), u, v)
    return weight / (sigma if mode == "divide" else sigma.clamp(min=1))


class SpectralNorm(nn.Module):
    """The parametrization, for `torch.nn.utils.parametrize.register_parametrization`; `spectral_norm` registers it.

    Args:
        weight: that it will be registered on; gives sizes and the first vectors.
        n_power_iterations: at each use in training.
        eps: of the vectors' lengths.
        dim: the axis of the outputs.
        mode: "divide", or "clip" to leave weights alone whose sigma is below one.
        generator: of the first vectors.

    Raises:
        ValueError: no iterations, eps is not positive, another mode, no such axis, or an empty weight.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        dim: int = 0,
        mode: str = "divide",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if n_power_iterations < 1:
            raise ValueError(f"spectral_norm: n_power_iterations is {n_power_iterations}: it must be 1 or more")
        if not eps > 0:
            raise ValueError(f"spectral_norm: eps is {eps}: it must be positive")
        if mode not in MODES:
            raise ValueError(f"spectral_norm: mode is {mode!r}: it must be one of {', '.join(MODES)}")
        if weight.numel() == 0 or not -weight.ndim <= dim < weight.ndim:
            raise ValueError(
                f"spectral_norm: a weight of shape {tuple(weight.shape)} has no rows along dimension {dim}"
            )
        self.n_power_iterations, self.eps, self.dim, self.mode = n_power_iterations, eps, dim, mode
        if weight.ndim > 1:  # the singular value of a vector is its length
            u, v = start_vectors(as_matrix(weight, dim), WARM_UP, eps, generator)
            self.register_buffer("u", u)
            self.register_buffer("v", v)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            if self.mode == "divide":
                return F.normalize(weight, dim=0, eps=self.eps)
            return weight / torch.linalg.vector_norm(weight).clamp(min=1)
        if self.training:
            u, v = power_iteration(as_matrix(weight, self.dim), self.u, self.v, self.n_power_iterations, self.eps)
            self.u.copy_(u)
            self.v.copy_(v)
        # Copies: a later use changes the buffers in place, and a backward through this one still needs these values.
        return spectrally_normalized(weight, self.u.clone(), self.v.clone(), dim=self.dim, mode=self.mode)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself, which is its own normalization where its largest singular value is one."""
        return weight

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, eps={self.eps}, dim={self.dim}, mode={self.mode!r}"


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    mode: str = "divide",
    generator: torch.Generator | None = None,
) -> M:
    """Register `SpectralNorm` on a module's parameter, in place, and return the module.

    Args:
        module: a layer.
        name: of its parameter.
        n_power_iterations, eps, mode, generator: see `SpectralNorm`.
        dim: the axis of the outputs; the layer's own by default.

    Raises:
        BadInput: the module has no parameter of that name.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise BadInput(f"spectral_norm: {type(module).__name__} has no parameter {name!r}")
    dim = output_dim(module) if dim is None else dim
    options = {"n_power_iterations": n_power_iterations, "eps": eps, "dim": dim, "mode": mode}
    parametrize.register_parametrization(module, name, SpectralNorm(weight, **options, generator=generator))
    return module


CARD = Card(
    id="spectral_norm",
    title="Spectral Normalization for Generative Adversarial Networks",
    authors="Miyato, Kataoka, Koyama, Yoshida",
    year=2018,
    source="arXiv 1802.05957",
    family="weight",
    summary="Divides a weight by its largest singular value, found by power iteration, so that the layer is "
    "1-Lipschitz and a GAN's discriminator trains stably.",
    objects={"SpectralNorm": "Weight"},
    traits={"SpectralNorm": ("gradient:stateful", "right_inverse")},
    use="The discriminator of a GAN, and layers that must not stretch what goes through them.",
    avoid="Classifiers where no bound is needed: it costs accuracy; and certificates, which need the exact value.",
    composes=("weight_standardization",),
    vectors=("spectral_norm",),
    code="github.com/pfnet-research/sngan_projection, MIT",
    claim={
        "text": "At a learning rate ten times the usual one, a GAN whose discriminator has spectral normalization "
        "covers more of the modes of its data, by more than half a mode of eight.",
        "metric": "modes covered",
        "direction": "higher",
        "margin": 0.5,
        "arms": ("plain", "spectral_norm"),
        "seeds": 5,
        "minutes": 6,
        "task": "eight Gaussians on a ring",
    },
)
