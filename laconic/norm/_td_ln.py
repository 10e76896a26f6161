"""`td_ln`: layer norm whose gain and shift depend on the time of a diffusion, by four vectors each.

For log_snr (B,), the logarithm of the signal-to-noise ratio of each example, elementwise over the shape of a parameter:

    tau = log_snr / 4
    s(t) = sigmoid(tau (1 + w) + b),       theta(t) = s(t) p0 + (1 - s(t)) p1
    LayerNorm:   y = gain(t) (x - mean) / sqrt(var + eps) + shift(t)
    RMSNorm:     y = gain(t) x / (|x| / sqrt(d) + eps)

w and b start at 0, p0 and p1 both at what the parameter usually starts at: 1 for gains, 0 for shifts. So at the start
nothing depends on time. adaLN computes the same numbers by a matrix from an embedding of time, with d_c d weights each.

Source: "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer
Normalization", Liu, Zeng, He, Yu, Xu, Kortylewski, Yuille, Chen, Shen, 2024, arXiv 2406.09416. Official code:
qihao067/DiMR, Apache-2.0. The multi-resolution network of the paper is not part of this.

Nothing folds at inference but at a fixed time: `norm.gain(log_snr)` is then an ordinary gain.

Use it in diffusion networks in place of adaLN. The time is that of the sampler's log_snr, not a step number. It is given
to all norms of a model once a forward pass, `at_time(model, log_snr)`; where activations are recomputed the backward pass
must be inside too. w and b get no weight decay: `decay_groups`.

Example:
    >>> import torch
    >>> from laconic.norm import TimeDependentLayerNorm, at_time
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), TimeDependentLayerNorm(4))
    >>> with at_time(model, torch.tensor([0.0, 2.0])):
    ...     model(torch.randn(2, 4)).shape
    torch.Size([2, 4])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.statistics import moments, widened


class TimeDependentParameter(nn.Module):
    """theta(t).

    Args:
        shape: of the parameter.
        init: first value of p0 and p1.
        divisor: of log_snr.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        init: float,
        *,
        divisor: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.divisor = divisor
        for name, value in (("p0", init), ("p1", init), ("w", 0.0), ("b", 0.0)):
            self.register_parameter(name, nn.Parameter(torch.full(self.shape, value, device=device, dtype=dtype)))

    def forward(self, log_snr: Tensor) -> Tensor:
        """theta (B, *shape) at log_snr (B,).

        Raises:
            ValueError: log_snr has other axes.
        """
        if log_snr.ndim != 1:
            raise ValueError(
                f"td_ln: log_snr is one number to an example, (batch,), and this is {tuple(log_snr.shape)}"
            )
        tau = log_snr.to(self.w.dtype).view(-1, *[1] * len(self.shape)) / self.divisor
        s = torch.sigmoid(tau * (1 + self.w) + self.b)
        return s * self.p0 + (1 - s) * self.p1

    def extra_repr(self) -> str:
        return f"{self.shape}, divisor={self.divisor}"


class _TimeDependentNorm(nn.Module):
    """The frame of both norms over the last axis."""

    log_snr: Tensor | None = None

    def __init__(self, d: int, eps: float, shift: bool, divisor: float, placed: dict[str, Any]):
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"{type(self).__name__}: eps is {eps}: it must not be negative")
        self.d, self.eps = d, eps
        self.gain = TimeDependentParameter(d, 1.0, divisor=divisor, **placed)
        self.shift = TimeDependentParameter(d, 0.0, divisor=divisor, **placed) if shift else None

    def normalized(self, x: Tensor) -> Tensor:
        """x without gain and shift."""
        raise NotImplementedError

    def forward(self, x: Tensor, log_snr: Tensor | None = None) -> Tensor:
        """y, of the shape and type of x (B, ..., d).

        Args:
            x: the batch.
            log_snr: (B,), or (1,) for all; what `at_time` said by default.

        Raises:
            ValueError: another width or batch size, or no time.
        """
        log_snr = self.log_snr if log_snr is None else log_snr
        if log_snr is None:
            raise ValueError(f"{type(self).__name__}: at which time? call the model within at_time(model, log_snr)")
        if x.ndim < 2 or x.shape[-1] != self.d:
            raise ValueError(f"{type(self).__name__}: the input is (batch, ..., {self.d}), not {tuple(x.shape)}")
        if log_snr.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{type(self).__name__}: {log_snr.shape[0]} times for a batch of {x.shape[0]}")
        y = self.normalized(widened(x)) * self._rows(self.gain(log_snr), x)
        if self.shift is not None:
            y = y + self._rows(self.shift(log_snr), x)
        return y.to(x.dtype)

    def _rows(self, theta: Tensor, x: Tensor) -> Tensor:
        return theta.view(theta.shape[0], *[1] * (x.ndim - 2), self.d)

    def extra_repr(self) -> str:
        return f"{self.d}, eps={self.eps}"


class TimeDependentLayerNorm(_TimeDependentNorm):
    """LayerNorm with gain and shift at a time.

    Args:
        d: width.
        eps: added to the variance.
        divisor: of log_snr.
        device, dtype: of the parameters.

    Raises:
        ValueError: eps is negative.
    """

    def __init__(
        self,
        d: int,
        eps: float = 1e-5,
        *,
        divisor: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(d, eps, True, divisor, {"device": device, "dtype": dtype})

    def normalized(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1."""
        mean, var = moments(x, -1)
        assert mean is not None
        return (x - mean) * torch.rsqrt(var + self.eps)


class TimeDependentRMSNorm(_TimeDependentNorm):
    """RMSNorm with a gain at a time; eps stands outside the root.

    Args:
        d: width.
        eps: added to the root mean square.
        divisor: of log_snr.
        device, dtype: of the parameters.

    Raises:
        ValueError: eps is negative.
    """

    def __init__(
        self,
        d: int,
        eps: float = 1e-8,
        *,
        divisor: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(d, eps, False, divisor, {"device": device, "dtype": dtype})

    def normalized(self, x: Tensor) -> Tensor:
        """Root mean square 1."""
        return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.d**-0.5 + self.eps)


def set_time(model: nn.Module, log_snr: Tensor | None) -> int:
    """Tell all time-dependent norms of a model the time, until it is told anew; returns how many there are.

    Where it is the same for the whole batch, their parameters are computed once and not for each example.
    """
    if log_snr is not None and log_snr.numel() and bool((log_snr == log_snr.flatten()[0]).all()):
        log_snr = log_snr.flatten()[:1]
    norms = [module for module in model.modules() if isinstance(module, _TimeDependentNorm)]
    for norm in norms:
        norm.log_snr = log_snr
    return len(norms)


@contextmanager
def at_time(model: nn.Module, log_snr: Tensor) -> Iterator[None]:
    """Within, the time-dependent norms of a model are at this time.

    Args:
        model: the model.
        log_snr: (batch,).

    Raises:
        ValueError: the model has no such norm.
    """
    if not set_time(model, log_snr):
        raise ValueError(f"at_time: {type(model).__name__} has no time-dependent norm")
    try:
        yield
    finally:
        set_time(model, None)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A model's parameters as groups of an optimizer: w and b of time-dependent ones are not decayed."""
    free = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TimeDependentParameter)
        for parameter in (module.w, module.b)
    }
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        groups[id(parameter) in free].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


CARD = Card(
    id="td_ln",
    title="Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer "
    "Normalization",
    authors="Liu, Zeng, He, Yu, Xu, Kortylewski, Yuille, Chen, Shen",
    year=2024,
    source="arXiv 2406.09416",
    family="norm",
    summary="Layer norm for diffusion networks, whose gain and shift follow the noise level by four vectors each.",
    objects={
        "TimeDependentParameter": "Layer",
        "TimeDependentLayerNorm": "Layer",
        "TimeDependentRMSNorm": "Layer",
    },
    traits={
        "TimeDependentParameter": ("gradient:exact", "batch_independent_eval"),
        "TimeDependentLayerNorm": ("gradient:exact", "batch_independent_eval"),
        "TimeDependentRMSNorm": ("gradient:exact", "batch_independent_eval"),
    },
    use="Diffusion networks, in place of adaLN, at a fraction of its parameters.",
    avoid="Conditions that are not one number on a line, such as classes.",
    composes=("rmsnorm",),
    vectors=("td_ln",),
    code="github.com/qihao067/DiMR, Apache-2.0",
    claim={
        "text": "Time-dependent layer norm denoises better than adaLN-Zero, with fewer parameters; here: the logarithm "
        "of the denoising loss of a small network on digits is lower.",
        "metric": "log of the denoising loss",
        "direction": "lower",
        "margin": 0.0,
        "arms": ("adaln_zero", "td_ln"),
        "seeds": 5,
        "minutes": 5,
        "task": "digits",
    },
)
