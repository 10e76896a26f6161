"""Statistics of activations: the moments that every normalization divides by, and their running values.

A normalization is a choice of axes to pool, of moments, and of a source (this batch, running values, a mixture). The
first two are `moments`, the third is the method's own, with `RunningStat` for what is kept from step to step:

    mean    = sum w x / sum w                            over the pooled axes
    spread  = sum w |x - mean|^p / sum w                 centred, biased, without a root
    spread  = sum w |x|^p / sum w                        not centred: the mean square for p = 2
    running <- (1 - m) running + m batch                 momentum m in torch's convention

Papers that write `running <- a running + (1 - a) batch` mean m = 1 - a.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RunningStat", "column_sums", "moments", "pooled", "recomputing", "widened"]

RUN = 256  # rows that `column_sums` adds in float32


def moments(
    x: Tensor,
    dims: int | Sequence[int],
    *,
    centred: bool = True,
    power: int = 2,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    keepdim: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Mean and spread of x over some axes.

    The mean is taken first and the spread around it afterwards, so a mean that is large against the deviation costs no
    digits. float16 and bfloat16 are computed, and returned, in float32. Where nothing is pooled, because the mask takes
    everything away or an axis is empty, mean and spread are 0. What is masked or has weight 0 may be NaN.

    Args:
        x: the values.
        dims: the axes that are pooled.
        centred: take the spread around the mean, rather than around 0.
        power: 2 for the mean square, 1 for the mean magnitude.
        mask: broadcasts against x; False leaves a value out.
        weights: broadcasts against x; not negative.
        keepdim: keep the pooled axes, with size 1.

    Returns:
        The mean, None if not centred, and the spread.

    Raises:
        ValueError: another power, no axis, or mask or weights that do not broadcast against x.
    """
    if power not in (1, 2):
        raise ValueError(f"moments: power is {power}: it must be 1 or 2")
    axes = (dims,) if isinstance(dims, int) else tuple(dims)
    if not axes:
        raise ValueError("moments: dims is empty: name the axes that are pooled")
    wide = widened(x)
    if mask is None and weights is None and pooled(x, axes):
        return _plain(wide, axes, centred, power, keepdim)
    return _weighted(wide, axes, centred, power, _share(wide, mask, weights), keepdim)


def pooled(x: Tensor, dims: int | Sequence[int], mask: Tensor | None = None) -> Tensor | int:
    """How many values of x are pooled: a number, or with a mask a tensor that keeps the pooled axes with size 1."""
    axes = (dims,) if isinstance(dims, int) else tuple(dims)
    if mask is not None:
        return _broadcast("mask", mask, x).sum(axes, keepdim=True)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return count


def widened(x: Tensor) -> Tensor:
    """x, in float32 if it is float16 or bfloat16: the type that statistics are computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def recomputing() -> bool:
    """Whether a backward pass is under way in this thread.

    A forward that runs inside one was run before: activation checkpointing (`torch.utils.checkpoint`, in both of its
    forms) computes it again for what it did not store. What a training step changes must not be changed again.
    """
    return torch._C._current_graph_task_id() != -1


class RunningStat:
    """How running values follow those of batches; the values themselves are buffers of the module that owns this.

    Args:
        momentum: m in torch's convention; None takes the mean over all batches so far.
        unbiased: keep sum / (n - 1) of a spread over n values, as torch's batch norm does; sum / n otherwise.
        accumulate: micro-batches to an update. The running values then follow the mean over so many batches, once.

    Raises:
        ValueError: the momentum is outside [0, 1], or `accumulate` is below 1.
    """

    def __init__(self, momentum: float | None = 0.1, *, unbiased: bool = True, accumulate: int = 1):
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"RunningStat: momentum is {momentum}: it must be in [0, 1], or None")
        if accumulate < 1:
            raise ValueError(f"RunningStat: accumulate is {accumulate}: it must be 1 or more")
        self.momentum, self.unbiased, self.accumulate = momentum, unbiased, accumulate
        self._sums: list[Tensor] = []
        self._calls = 0

    @torch.no_grad()
    def update(self, running: Sequence[Tensor], batch: Sequence[Tensor], tracked: Tensor | None = None) -> bool:
        """Let buffers follow a batch's values, in place; nothing happens while activations are recomputed.

        Args:
            running: the buffers.
            batch: the values, with as many entries each as the buffers.
            tracked: the buffer that counts updates (`num_batches_tracked`); needed where the momentum is None.

        Returns:
            Whether the buffers were changed.

        Raises:
            ValueError: the momentum is None, and there is no count.
        """
        if self.momentum is None and tracked is None:
            raise ValueError("RunningStat: a mean over all batches (momentum None) needs the count of batches, tracked")
        if recomputing():
            return False
        values = [value.detach().reshape(buffer.shape) for buffer, value in zip(running, batch, strict=True)]
        if self.accumulate > 1:
            self._sums = [a + b for a, b in zip(self._sums, values, strict=True)] if self._sums else values
            self._calls += 1
            if self._calls < self.accumulate:
                return False
            values = [total / self.accumulate for total in self._sums]
            self._sums, self._calls = [], 0
        if tracked is not None:
            tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            assert tracked is not None
            momentum = 1.0 / float(tracked)
        for buffer, value in zip(running, values, strict=True):
            # In the wider of the two types: a bfloat16 buffer would not move by a tenth of a small difference.
            wide = widened(buffer)
            buffer.copy_(wide + momentum * (value.to(wide.dtype) - wide))
        return True

    def update_moments(
        self,
        mean: Tensor,
        spread: Tensor,
        batch_mean: Tensor,
        batch_spread: Tensor,
        count: Tensor | int,
        tracked: Tensor | None = None,
    ) -> bool:
        """`update` of a mean and of a spread (biased, over `count` values), which is made unbiased if that is asked."""
        return self.update((mean, spread), (batch_mean, self.corrected(batch_spread, count)), tracked)

    def corrected(self, spread: Tensor, count: Tensor | int) -> Tensor:
        """n / (n - 1) of a biased spread over n values, or the spread as it is; a single value has spread 0."""
        if not self.unbiased:
            return spread
        if isinstance(count, int):
            return spread * (count / max(count - 1, 1))
        return spread * (count / (count - 1).clamp_min(1))

    def __repr__(self) -> str:
        more = f", accumulate={self.accumulate}" if self.accumulate > 1 else ""
        return f"RunningStat(momentum={self.momentum}, unbiased={self.unbiased}{more})"


def _plain(x: Tensor, axes: tuple[int, ...], centred: bool, power: int, keepdim: bool) -> tuple[Tensor | None, Tensor]:
    if not centred:
        return None, (x.square() if power == 2 else x.abs()).mean(axes, keepdim=keepdim)
    if power == 2:
        spread, mean = torch.var_mean(x, axes, correction=0, keepdim=keepdim)
        return mean, spread
    mean = x.mean(axes, keepdim=True)
    spread = (x - mean).abs().mean(axes, keepdim=keepdim)
    return (mean if keepdim else mean.squeeze(axes)), spread


def _weighted(
    x: Tensor, axes: tuple[int, ...], centred: bool, power: int, share: Tensor, keepdim: bool
) -> tuple[Tensor | None, Tensor]:
    total = share.expand(x.shape).sum(axes, keepdim=True)
    share = share / torch.where(total > 0, total, torch.ones_like(total))
    # Where the weight is 0, x is taken out and not multiplied by 0: it may be NaN.
    seen = torch.where(share > 0, x, torch.zeros_like(x))
    mean = (share * seen).sum(axes, keepdim=True) if centred else None
    off = seen if mean is None else seen - mean
    spread = (share * (off.square() if power == 2 else off.abs())).sum(axes, keepdim=True)
    if keepdim:
        return mean, spread
    return (None if mean is None else mean.squeeze(axes)), spread.squeeze(axes)


def _share(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """What every value counts, of x's type; broadcasts against x."""
    share = x.new_ones(()) if weights is None else _broadcast("weights", weights, x).to(x.dtype)
    if mask is not None:
        share = share * _broadcast("mask", mask, x).to(x.dtype)
    return share.expand(x.shape)


def _broadcast(name: str, given: Tensor, x: Tensor) -> Tensor:
    try:
        return given.expand(x.shape)
    except RuntimeError:
        raise ValueError(f"moments: {name} {tuple(given.shape)} does not broadcast against {tuple(x.shape)}") from None


def column_sums(x: Tensor) -> Tensor:
    """Sum over the rows of (n, K): (K,) float64.

    Runs of `RUN` rows are summed in float32 and their sums in float64. That rounds as a short sum does, and costs a tenth
    of widening a matrix that does not fit in the cache.
    """
    x = x.float()
    whole = len(x) // RUN * RUN
    runs = x[:whole].unflatten(0, (-1, RUN)).sum(1)
    return runs.sum(0, dtype=torch.float64) + x[whole:].sum(0, dtype=torch.float64)
