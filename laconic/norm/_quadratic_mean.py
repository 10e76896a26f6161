"""Norms that divide by a smoothed quadratic mean per channel, and smooth what the backward pass takes away.

For x with channels c, statistics over all other axes, G = g dy r:

    forward:   z = x / sqrt(S + eps),  y = g z + b               S: a smoothed mean of x^2
    backward:  dx = (G - nu z) / sqrt(D + eps)                   nu: a smoothed mean of G z
               dg = sum r z dy,  db = sum dy                     r: compensates for how far S is from its past

Where S = D is the mean of x^2 in this batch, nu the mean of G z, and r = 1, this is the exact gradient. `PowerNorm` and
`UnifiedNorm` differ in how S, D, nu and r come about, which is what a subclass of `QuadraticMeanNorm` says.

The state changes in the forward pass and again in the backward pass, once for each call. A forward that is run again
for activation checkpointing is told by the mean of x^2 that it sees, and gets what the first one got.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from laconic.core.statistics import recomputing, widened

from ._channels import ChannelNorm

PENDING = 16  # calls whose backward has not come yet that can be recomputed


@dataclass(eq=False)
class Call:
    """What one call in training mode divides by, kept until its backward pass.

    Attributes:
        seen: mean of x^2 (C,), by which a recomputed call is known.
        forward: S (C,).
        backward: D (C,).
        ratio: r (C,); None for 1.
        notes: what the subclass has to remember.
        past: the state of the backward pass as its first one found it.
    """

    seen: Tensor
    forward: Tensor
    backward: Tensor
    ratio: Tensor | None = None
    notes: Any = None
    past: tuple[Tensor, ...] | None = None


class MicroBatchMean:
    """Means of tensors over so many micro-batches: `add` gives them at the last one, and None before."""

    def __init__(self, count: int):
        self.count, self.calls = count, 0
        self.sums: list[Tensor] = []

    def add(self, *values: Tensor) -> list[Tensor] | None:
        """Count one micro-batch."""
        self.sums = [a + b for a, b in zip(self.sums, values, strict=True)] if self.sums else list(values)
        self.calls += 1
        if self.calls < self.count:
            return None
        means = [total / self.count for total in self.sums] if self.count > 1 else self.sums
        self.sums, self.calls = [], 0
        return means


class QuadraticMeanNorm(ChannelNorm):
    """The frame: subclasses give `smooth`, `smooth_gradient` and `running`.

    Args:
        num_features: channels C.
        eps: added to the mean of x^2.
        affine: learn g and b.
        channel_dim: the axis of the channels.
        accumulate: micro-batches to an update of the state.
        device, dtype: of the parameters.

    Raises:
        ValueError: no channels, or `accumulate` is below 1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        channel_dim: int,
        accumulate: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__(num_features, channel_dim)
        if accumulate < 1:
            raise ValueError(f"{type(self).__name__}: accumulate is {accumulate}: it must be 1 or more")
        self.eps, self.affine = eps, affine
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            made = torch.full((num_features,), value, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(made) if affine else None)
        self._forward_means, self._backward_means = MicroBatchMean(accumulate), MicroBatchMean(accumulate)
        self._pending: deque[Call] = deque(maxlen=PENDING)

    # --- what a subclass says -----------------------------------------------------------------------

    def running(self) -> Tensor:
        """What evaluation divides by, (C,), squared."""
        raise NotImplementedError

    def smooth(self, seen: Tensor, update: bool) -> Call:
        """What a call that sees this mean of x^2 divides by; the state follows it if `update`."""
        raise NotImplementedError

    def gradient_state(self) -> tuple[Tensor, ...]:
        """Copies of what `smooth_gradient` starts from."""
        raise NotImplementedError

    def smooth_gradient(self, call: Call, gz: Tensor, zz: Callable[[], Tensor], update: bool) -> Tensor:
        """nu of a call from `call.past` and the mean of G z and, on demand, of z^2, both (C,); see `smooth`."""
        raise NotImplementedError

    def scaled(self, x: Tensor) -> Tensor:
        """What is done to x first, in both modes."""
        return x

    # --- what all do --------------------------------------------------------------------------------

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y, of the shape and type of x.

        Args:
            x: with the channels on their axis.
            mask: of x's shape without the channels; False leaves a token out of the mean of x^2.

        Raises:
            ValueError: other channels, or a mask of another shape.
        """
        self.check(x)
        wide = self.scaled(widened(x))
        if not self.training:
            return self._divided(wide, self.running()).to(x.dtype)
        with torch.no_grad():
            _, seen, count = self.batch_moments(wide, mask, centred=False)
        call = self._call(seen, count)
        y = _Quadratic.apply(
            wide,
            self.weight,
            self.bias,
            torch.rsqrt(call.forward + self.eps),
            torch.rsqrt(call.backward + self.eps),
            call.ratio,
            partial(self._correction, call) if count else _no_correction,
            self.axes(x),
            self.shape(x),
        )
        return y.to(x.dtype)

    def _divided(self, x: Tensor, squared: Tensor) -> Tensor:
        factor, shape = torch.rsqrt(widened(squared) + self.eps), self.shape(x)
        if self.weight is None:
            return x * factor.view(shape)
        return x * (self.weight * factor).view(shape) + self.bias.view(shape)

    def _call(self, seen: Tensor, count: int) -> Call:
        again = recomputing()
        if again and self._pending:
            # The same bits, unless a kernel sums in another order the second time: then the nearest.
            return min(self._pending, key=lambda call: float((call.seen - seen).abs().sum()))
        if count == 0:  # nothing but padding: nothing is learned from it
            squared = widened(self.running()).clone()
            return Call(squared, squared, squared)
        call = self.smooth(seen, update=not again)
        if not again:
            self._pending.append(call)
        return call

    def _correction(self, call: Call, gz: Tensor, zz: Callable[[], Tensor]) -> Tensor:
        # A second backward through the same graph starts from the same state, and leaves it as it is.
        first = call.past is None
        if first:
            call.past = self.gradient_state()
            if call in self._pending:
                self._pending.remove(call)
        return self.smooth_gradient(call, gz, zz, update=first)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, channel_dim={self.channel_dim}" + ", affine=False" * (
            not self.affine
        )


def _no_correction(gz: Tensor, zz: Callable[[], Tensor]) -> Tensor:
    return torch.zeros_like(gz)


class _Quadratic(torch.autograd.Function):
    """y = g x f + b, with the backward pass of the module's docstring; `correct(mean of G z, of z^2)` gives nu."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        factor: Tensor,
        back: Tensor,
        ratio: Tensor | None,
        correct: Callable[[Tensor, Callable[[], Tensor]], Tensor],
        axes: Sequence[int],
        shape: list[int],
    ) -> Tensor:
        z = x * factor.view(shape)
        ctx.save_for_backward(z, weight, back, ratio)
        ctx.correct, ctx.axes, ctx.shape = correct, tuple(axes), shape
        if weight is None or bias is None:
            return z.clone()
        return z * weight.view(shape) + bias.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, back, ratio = ctx.saved_tensors
        axes, shape = ctx.axes, ctx.shape
        grad_bias = grad.sum(axes)
        scaled = grad if ratio is None else grad * ratio.view(shape)
        grad_weight = (scaled * z).sum(axes)
        count = max(z.numel() // max(grad_weight.numel(), 1), 1)
        gz = grad_weight / count
        if weight is not None:
            scaled, gz = scaled * weight.view(shape), gz * weight
        nu = ctx.correct(gz, lambda: z.square().mean(axes))
        grad_x = (scaled - nu.view(shape) * z) * back.view(shape)
        if weight is None:
            return grad_x, *[None] * 8
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *[None] * 6


CARD = None
