"""`unmix_tns`: test-time statistics that stay fair when the stream shows one class after another.

Each batch norm keeps K components, means m_k and variances v_k (K, C), which stand for K kinds of instances. They start
around the source's statistics, a random part alpha of its variance being given to the means:

    m_k = mu_s + sqrt(alpha K / (K - 1)) sqrt(var_s) z_k,   v_k = (1 - alpha) var_s       z_k normal; K = 1: the source

For x (n, C, h, w) with each instance's own mean mu_b and biased variance v_b over its places, both (n, C):

    p_bk = softmax_k(cos(mu_b, m_k) / temperature)                 which component an instance is of; no gradient
    m_bk = (1 - p_bk) m_k + p_bk mu_b,   v_bk = (1 - p_bk) v_k + p_bk v_b
    M_b = mean_k m_bk,   V_b = mean_k v_bk + mean_k m_bk^2 - M_b^2                        (n, C)
    y = g (x - M) / sqrt(V + eps) + b

So an instance is normalized as if the batch had K different ones, whatever is beside it. Then, without gradient,

    m_k += r mean_b p_bk (mu_b - m_k),   v_k += r mean_b p_bk (v_b - v_k),   r = 1 - (1 - momentum)^(batch / batch_max)

with the momentum of the batch norm, torch's convention.

Source: "Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation", Tomar, Vray, Thiran,
Bozorgtabar, 2024, arXiv 2401.08328. Official code: devavratTomar/unmixtns, no licence file, of which none was used. We
differ from it in that the random start is seeded.

Nothing folds: every instance has statistics of its own. Use it for streams in which neighbours are of one class or
scene, and for batches of one. Reset it where a new domain begins. One-dimensional batch norms keep the source's
statistics, for an instance has no places there to take statistics over.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.adapt import UnMixTNS
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> with UnMixTNS.attach(model, batch_size=1) as stream:
    ...     stream.update(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 4, 6, 6])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.test_time import AdaptedNorm, Attached, attach

TWO_DIMENSIONS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_momentum(momentum: float, batch_size: int, batch_size_max: int) -> float:
    """r: as many steps of it as fill the largest batch move as far as one step of the batch norm's momentum."""
    return 1.0 - (1.0 - momentum) ** (batch_size / batch_size_max)


def first_components(
    mean: Tensor, var: Tensor, components: int, alpha: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """m and v (K, C) around the source's mean and variance (C,); drawn on the CPU."""
    if components == 1:
        return mean[None].clone(), var[None].clone()
    noise = torch.randn(components, len(mean), generator=generator).to(mean)
    means = mean + math.sqrt(alpha * components / (components - 1)) * var.sqrt() * noise
    return means, ((1 - alpha) * var).expand_as(means).clone()


def assignments(instance_mean: Tensor, means: Tensor, temperature: float) -> Tensor:
    """p (n, K) of instances with these means (n, C), without gradient."""
    with torch.no_grad():
        alike = F.cosine_similarity(instance_mean[:, None], means[None], dim=2)
        return F.softmax(alike / temperature, dim=1)


def unmixed_statistics(
    instance_mean: Tensor, instance_var: Tensor, means: Tensor, variances: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """M and V (n, C).

    Args:
        instance_mean, instance_var: (n, C), each instance's own.
        means, variances: (K, C) of the components.
        p: (n, K).
    """
    share = p[:, :, None]
    mean = (1 - share) * means + share * instance_mean[:, None]
    var = (1 - share) * variances + share * instance_var[:, None]
    middle = mean.mean(1)
    # The mean square about the middle, which does not lose the small difference of two large squares.
    return middle, var.mean(1) + (mean - middle[:, None]).square().mean(1)


class UnMixNorm(AdaptedNorm):
    """A batch norm that normalizes each instance by K components and its own statistics, and moves the components.

    Args:
        num_features, eps, affine: as torch's batch norms have them.
        batch_size: of the stream.
        components: K.
        batch_size_max: the batch at which the components move with the batch norm's momentum.
        temperature: of the assignment.
        alpha: share of the source's variance that lies between the components at the start.
        momentum: of the batch norm.
        generator: of the components' start.
        device, dtype: of parameters, statistics and components.

    Attributes:
        component_means, component_vars: (K, C).

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        batch_size: int = 64,
        components: int = 16,
        batch_size_max: int = 64,
        temperature: float = 0.07,
        alpha: float = 0.5,
        momentum: float = 0.1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, affine, device=device, dtype=dtype)
        if components < 1 or batch_size < 1 or batch_size_max < 1:
            raise ValueError(
                f"UnMixTNS: components={components}, batch_size={batch_size}, batch_size_max={batch_size_max}: all are "
                "at least 1"
            )
        if not temperature > 0 or not 0 <= alpha <= 1 or not 0 <= momentum <= 1:
            raise ValueError(
                f"UnMixTNS: temperature={temperature}, alpha={alpha}, momentum={momentum}: the temperature is "
                "positive, the others are in [0, 1]"
            )
        self.components, self.temperature, self.alpha, self.momentum = components, temperature, alpha, momentum
        self.rate = batch_momentum(momentum, batch_size, batch_size_max)
        self.component_means: Tensor
        self.component_vars: Tensor
        means, variances = first_components(self.running_mean, self.running_var, components, alpha, generator)
        self.register_buffer("component_means", means)
        self.register_buffer("component_vars", variances)

    def take_source(self, norm: nn.Module) -> None:
        """Components that were drawn around 0 and 1 stand around the source's statistics instead."""
        with torch.no_grad():
            self.component_means.mul_(self.running_var.sqrt()).add_(self.running_mean)
            self.component_vars.mul_(self.running_var)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = list(range(2, x.ndim))
        if places:
            var, mean = torch.var_mean(x, places, correction=0)
        else:
            var, mean = torch.zeros_like(x), x
        means, variances = self.component_means.to(x.dtype), self.component_vars.to(x.dtype)
        p = assignments(mean, means, self.temperature)
        middle, spread = unmixed_statistics(mean, var, means, variances, p)
        if len(x):
            self._move(mean.detach(), var.detach(), p)
        return self.per_channel(middle, x), self.per_channel(spread, x)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, p: Tensor) -> None:
        # mean_b p_bk (s_b - c_k) = (p^T s)_k / n - (mean_b p_bk) c_k: no (n, K, C) tensor is needed.
        share = p.mean(0)[:, None].to(self.component_means.dtype)
        for component, instance in ((self.component_means, mean), (self.component_vars, var)):
            drawn = (p.T @ instance / len(p)).to(component.dtype)
            component.add_(drawn - share * component, alpha=self.rate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={self.components}, temperature={self.temperature}, rate={self.rate:.3g}"


class UnMixTNS:
    """The protocol: `attach` puts an `UnMixNorm` in the place of each batch norm over places, and gives the stream."""

    @staticmethod
    def attach(
        model: nn.Module,
        *,
        batch_size: int,
        components: int = 16,
        batch_size_max: int = 64,
        temperature: float = 0.07,
        alpha: float = 0.5,
        seed: int = 0,
    ) -> Attached:
        """See `laconic.core.test_time.Attached`: `update`, `predict`, `reset`, `detach`, and a context manager.

        Args:
            model: which is changed until `detach`; put it into evaluation mode first.
            batch_size: of the stream that is to come.
            components, batch_size_max, temperature, alpha: see `UnMixNorm`.
            seed: of the components' start.

        Raises:
            BadInput: the model has no batch norm over places with statistics, or something is attached already.
            ValueError: an option out of its range.
        """
        generator = torch.Generator().manual_seed(seed)

        def make(norm: nn.Module) -> nn.Module:
            return UnMixNorm.from_batchnorm(
                norm, batch_size=batch_size, components=components, batch_size_max=batch_size_max,
                temperature=temperature, alpha=alpha, momentum=0.1 if norm.momentum is None else norm.momentum,
                generator=generator,
            )  # fmt: skip

        return attach(model, make, kinds=TWO_DIMENSIONS)


CARD = Card(
    id="unmix_tns",
    title="Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation",
    authors="Tomar, Vray, Thiran, Bozorgtabar",
    year=2024,
    source="arXiv 2401.08328",
    family="adapt",
    summary="Test-time batch norms for streams that show one class after another: K components remember what a mixed "
    "batch would look like.",
    objects={"UnMixTNS": "Protocol"},
    traits={"UnMixTNS": ("order:dependent",)},
    use="On shifted test data that come sorted by class or scene, or one by one.",
    avoid="Large batches of mixed classes, where the batch's own statistics are as good and cheaper.",
    composes=("alpha_bn", "robustness_probe"),
    vectors=("unmix_tns",),
    code="github.com/devavratTomar/unmixtns, no licence file",
    claim={
        "text": "On corrupted images that come sorted by class in batches of 16, it is more than ten points more "
        "accurate than the statistics of each batch.",
        "metric": "mean accuracy over noises, blurs, weather and contrast",
        "direction": "higher",
        "margin": 0.1,
        "arms": ("batch statistics", "unmix_tns"),
        "seeds": 5,
        "minutes": 3,
        "task": "mnist-cnn",
    },
)
