"""`l1_norm`: normalize by the mean magnitude instead of the root of the mean square, so that integers can do it.

For x with n values pooled per channel (batch norm: over N and places) or per example (layer norm: over features):

    c = x - mean(x)        s = mean |c|        y = g c / (k s + eps) + b

k is 1, or with `gaussian_scale` sqrt(pi / 2), with which k s is the standard deviation where x is normal. With G = g dy
and t = k s + eps the gradient is

    dc = G / t - k sign(c) sum(G c) / (n t^2)        dx = dc - mean(dc)        sign(0) = 0

A magnitude and a sign need no multiplier, and sums of magnitudes stay within the bits of what is summed where squares
take twice as many. Running values, in torch's convention, are the mean and s itself: an average of mean magnitudes does
not follow from an average of variances. A `quantizer` rounds x, s and g on the way forward, with a straight-through
gradient, and the gradient dy on the way back.

Source: "Towards Accurate and Efficient Sub-8-Bit Integer Training", Guo et al., 2024, arXiv 2411.10948; the gradient
quantizer of the paper is a method of its own. L1 norms: Wu et al., 2018, arXiv 1802.09769; Hoffer et al., 2018, arXiv
1803.01814, who have the factor sqrt(pi / 2). No official code was found, and the paper's body could not be read: which
of the statistics it rounds, and to how many bits, is the caller's choice here.

At inference the batch norms are affine, scale g / (k s + eps), and fold.

Use it in training with few bits, and for converting a batch norm for such hardware (`from_batchnorm`). In floating
point a fused L2 norm is as good and usually faster.

Example:
    >>> import torch
    >>> from laconic.norm import L1LayerNorm
    >>> L1LayerNorm(4)(torch.tensor([[1.0, 3.0, 5.0, 7.0]])).detach().abs().mean().item()
    0.9999949932098389
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.affine import Affine
from laconic.core.card import Card
from laconic.core.statistics import RunningStat, moments, pooled, widened

GAUSSIAN = math.sqrt(math.pi / 2)

Quantizer = Callable[[Tensor], Tensor]


def l1_normalize(x: Tensor, mean: Tensor, magnitude: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """c / (k s + eps), of x's shape.

    Args:
        x: the values.
        mean: broadcasts against x.
        magnitude: s, broadcasts against x.
        eps: keeps the division finite where x is constant.
        scale: k.
    """
    return (x - mean) / (scale * magnitude + eps)


class _RoundGradient(torch.autograd.Function):
    """The identity, whose gradient passes a quantizer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        ctx.quantizer = quantizer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.quantizer(gradients[0]), None


class _L1Norm(nn.Module):
    """Gain, shift and quantizer of both norms."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        eps: float,
        affine: bool,
        gaussian_scale: bool,
        quantizer: Quantizer | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"l1_norm: eps is {eps}: it must not be negative")
        self.eps, self.gaussian_scale, self.quantizer = eps, gaussian_scale, quantizer
        ones = torch.ones(*shape, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(ones) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(ones)) if affine else None)

    @property
    def scale(self) -> float:
        """k."""
        return GAUSSIAN if self.gaussian_scale else 1.0

    def reset_parameters(self) -> None:
        """Gain 1, shift 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        """What the quantizer makes of x, with the gradient of x."""
        return x if self.quantizer is None else x + (self.quantizer(x) - x).detach()

    def _normalized(self, x: Tensor, mean: Tensor, magnitude: Tensor, view: Sequence[int]) -> Tensor:
        y = l1_normalize(x, mean, self._rounded(magnitude), self.eps, self.scale)
        if self.weight is not None and self.bias is not None:
            y = y * self._rounded(self.weight.to(y.dtype)).view(view) + self.bias.to(y.dtype).view(view)
        return y if self.quantizer is None else _RoundGradient.apply(y, self.quantizer)

    def extra_repr(self) -> str:
        flags = ["gaussian_scale=True"] * self.gaussian_scale + ["quantized"] * (self.quantizer is not None)
        return ", ".join([f"eps={self.eps}", *flags])


class L1LayerNorm(_L1Norm):
    """L1 layer normalization over the last dimension, or dimensions.

    Args:
        normalized_shape: the last dimension, or dimensions.
        eps: added to the mean magnitude.
        elementwise_affine: learn a gain and a shift.
        gaussian_scale: k = sqrt(pi / 2).
        quantizer: rounds x, s, g and the gradient dy.
        device, dtype: of the parameters.

    Raises:
        ValueError: eps is negative; in the call, an input of another shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        gaussian_scale: bool = False,
        quantizer: Quantizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, gaussian_scale, quantizer, device, dtype)
        self.normalized_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        if tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"l1_norm: the last dimensions of {tuple(x.shape)} must be {shape}")
        wide = self._rounded(widened(x))
        mean, magnitude = moments(wide, tuple(range(-len(shape), 0)), power=1)
        assert mean is not None
        return self._normalized(wide, mean, magnitude, shape).to(x.dtype)


class L1BatchNorm2d(_L1Norm):
    """L1 batch normalization of (N, C, H, W); `L1BatchNorm1d` is that of (N, C) and (N, C, L).

    Args:
        num_features: C.
        eps: added to the mean magnitude.
        momentum: of the running values, in torch's convention; None takes the mean over all batches.
        affine: learn a gain and a shift.
        gaussian_scale: k = sqrt(pi / 2).
        quantizer: rounds x, s, g and the gradient dy.
        device, dtype: of the parameters.

    Raises:
        ValueError: eps is negative; in the call, an input of another shape, or in training mode a single value to a
            channel.
    """

    ndims: tuple[int, ...] = (4,)
    running_mean: Tensor
    running_magnitude: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        gaussian_scale: bool = False,
        quantizer: Quantizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__((num_features,), eps, affine, gaussian_scale, quantizer, device, dtype)
        self.num_features, self.momentum = num_features, momentum
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_magnitude", ones)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    @classmethod
    def from_batchnorm(cls, old: nn.BatchNorm1d | nn.BatchNorm2d, quantizer: Quantizer | None = None) -> L1BatchNorm2d:
        """An L1 norm for a trained batch norm: the same function at inference, nearly the same in training.

        It has k = sqrt(pi / 2); its running magnitude is what makes k s + eps the batch norm's deviation.

        Raises:
            ValueError: the batch norm keeps no running statistics.
        """
        if old.running_mean is None or old.running_var is None:
            raise ValueError("l1_norm: the batch norm keeps no running statistics, so there is nothing to convert")
        new = cls(
            old.num_features,
            momentum=old.momentum,
            affine=old.affine,
            gaussian_scale=True,
            quantizer=quantizer,
            device=old.running_var.device,
            dtype=old.running_var.dtype,
        ).train(old.training)
        with torch.no_grad():
            deviation = (old.running_var.double() + old.eps).sqrt()
            new.running_magnitude.copy_(((deviation - new.eps) / GAUSSIAN).clamp_min(0))
            new.running_mean.copy_(old.running_mean)
            if old.num_batches_tracked is not None:
                new.num_batches_tracked.copy_(old.num_batches_tracked)
            if new.weight is not None and new.bias is not None:
                new.weight.copy_(old.weight)
                new.bias.copy_(old.bias)
        return new

    def reset_parameters(self) -> None:
        """Gain and running magnitude 1, shift and running mean 0."""
        super().reset_parameters()
        nn.init.ones_(self.running_magnitude)
        nn.init.zeros_(self.running_mean)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self.ndims or x.shape[1] != self.num_features:
            places = " or ".join(str(ndim) for ndim in self.ndims)
            raise ValueError(
                f"l1_norm: an input of {tuple(x.shape)}: it must have {places} dimensions, {self.num_features} channels"
            )
        view = (1, -1) + (1,) * (x.ndim - 2)
        wide = self._rounded(widened(x))
        if self.training:
            mean, magnitude = self._of_batch(wide, (0, *range(2, x.ndim)))
        else:
            mean, magnitude = (part.to(wide.dtype).view(view) for part in (self.running_mean, self.running_magnitude))
        return self._normalized(wide, mean, magnitude, view).to(x.dtype)

    def as_affine(self) -> Affine:
        """What the layer is at inference, per channel.

        Raises:
            ValueError: it is in training mode.
        """
        if self.training:
            raise ValueError("the L1 batch norm is in training mode: call model.eval() first")
        with torch.no_grad():
            scale = 1 / (self.scale * self._rounded(self.running_magnitude).double() + self.eps)
            if self.weight is not None:
                scale = scale * self._rounded(self.weight).double()
            shift = -self.running_mean.double() * scale
            return Affine(scale, shift if self.bias is None else shift + self.bias.double())

    def _of_batch(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if int(pooled(x, dims)) < 2:
            raise ValueError(f"l1_norm: an input of {tuple(x.shape)}: train on 2 values to a channel or more")
        mean, magnitude = moments(x, dims, power=1)
        assert mean is not None
        running = (self.running_mean, self.running_magnitude)
        RunningStat(self.momentum).update(running, (mean, magnitude), self.num_batches_tracked)
        return mean, magnitude

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, {super().extra_repr()}"


class L1BatchNorm1d(L1BatchNorm2d):
    """L1 batch normalization of (N, C) and (N, C, L); arguments as those of `L1BatchNorm2d`."""

    ndims = (2, 3)


CARD = Card(
    id="l1_norm",
    title="Towards Accurate and Efficient Sub-8-Bit Integer Training",
    authors="Guo, Liu, Xie, Li, Ning, Meng, Zeng, Lei, Fang, Wang",
    year=2024,
    source="arXiv 2411.10948",
    family="norm",
    summary="Normalizes by the mean magnitude: no squares, no root, and every step can be done in integers.",
    objects={"L1BatchNorm2d": "Layer", "L1BatchNorm1d": "Layer", "L1LayerNorm": "Layer"},
    traits={
        "L1BatchNorm2d": ("gradient:exact", "batch_independent_eval", "folds"),
        "L1BatchNorm1d": ("gradient:exact", "batch_independent_eval", "folds"),
        "L1LayerNorm": ("gradient:exact", "batch_independent_eval"),
    },
    use="Training with few bits, and hardware without multipliers to spare.",
    avoid="Floating point, where a fused L2 norm is as good and usually faster.",
    composes=("fold_batchnorm",),
    code="none found",
    claim={
        "text": "Where what a batch norm reads, its statistics, its gain and its gradient are rounded to 4 bits, the L1 "
        "norm is more accurate than the L2 norm, by more than half a point.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("l2_norm", "l1_norm"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
