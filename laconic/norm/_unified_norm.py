"""`unified_norm`: a quadratic-mean norm smoothed by a geometric mean over the last steps, which folds like batch norm.

For x (..., C), x2 = mean of x^2 over the tokens per channel, at call t = 1, 2, ..., with a window of w steps:

    Bx[t mod w] <- x2                                               the last w statistics
    var = x2 if t <= w or t < warmup or skip, else exp(mean_w log Bx)
    z = x / sqrt(var + eps),  y = g z + b,  rv <- (1 - m) rv + m var
    r = sqrt(var + eps) / sqrt(rv before + eps) in [1/5, 5]; 1 while t <= max(1000, warmup), and if skip
    backward:  G = g dy r,  gz = mean(G z),  Bg[t mod w] <- e if skip, else gz
               mg = gz if t <= w or t < warmup or skip, else mean_w Bg;  e <- (1 - m) e + m mg
               dx = (G - nu z) / sqrt(var + eps),  nu = mg if skip, else e;  dg = sum r z dy,  db = sum dy
    evaluation: y = g x / sqrt(rv + eps) + b

Outlier filtration, where it is on and t >= warmup: with v the variance of all entries of sqrt(Bx) before this step, skip
if arithmetic minus geometric mean over the window exceeds v w in any channel; then Bx[t mod w] <- rv. A window of 1
always skips, and leaves the exact gradient.

r multiplies the gradient though the forward is not multiplied by it: it makes up for a scale that jumps. So the backward
pass is no derivative, on purpose.

Source: "Unified Normalization for Accelerating and Stabilizing Transformers", Yang, Zhang, Xu, Chen, Jia, Jiang, Xie,
2022, arXiv 2208.01313. Official code: hikvision-research/Unified-Normalization, Apache-2.0. We differ in that
nothing is filtered before the window is full (the logarithm of its zeros is minus infinity, so every step would be an
outlier; `filter_while_filling` does it as the code), padding can be left out, and recomputed activations do not count
twice.

At inference s = g / sqrt(rv + eps), t = b: diagonal, W' = W diag(s), b' = b + W t. See `fold_affine`.

Use it in place of LayerNorm where inference must be fast; `outlier_filtration=True` for vision. Keep LayerNorm where
training is short against `warmup_iters`, or batches are small. One backward to each forward, as for `powernorm`.

Example:
    >>> import torch
    >>> from laconic.norm import UnifiedNorm
    >>> norm = UnifiedNorm(2)
    >>> norm(torch.tensor([[3.0, 1.0], [4.0, 1.0]])).square().mean(0)
    tensor([1.0000, 1.0000], grad_fn=<MeanBackward1>)
    >>> norm.eval().as_affine().shift
    tensor([0., 0.], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from laconic.core.affine import Affine, affine_of
from laconic.core.card import Card
from laconic.core.statistics import widened

from ._quadratic_mean import Call, QuadraticMeanNorm


class _Place(NamedTuple):
    """Of a call: its slot in the window, whether it is smoothed by the window, and whether it was skipped."""

    slot: int
    smoothed: bool
    skip: bool


class UnifiedNorm(QuadraticMeanNorm):
    """UN.

    Args:
        num_features: channels C.
        window: w, steps that statistics are smoothed over.
        warmup_iters: steps that use their own statistics.
        outlier_filtration: let steps with outliers bypass the window.
        eps: added to mean squares.
        momentum: m of rv and e, in torch's convention (the paper's 0.9 is 0.1).
        channel_dim: the axis of the channels.
        affine: learn g and b.
        ratio_one_until: steps in which r is 1, at least.
        ratio_clamp: bounds of r afterwards.
        filter_while_filling: filter in the first `window` steps too, as the released code does.
        accumulate: micro-batches to an update of the state.
        device, dtype: of parameters and state.

    Raises:
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        num_features: int,
        window: int = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        channel_dim: int = -1,
        *,
        affine: bool = True,
        ratio_one_until: int = 1000,
        ratio_clamp: tuple[float, float] = (0.2, 5.0),
        filter_while_filling: bool = False,
        accumulate: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, affine, channel_dim, accumulate, device, dtype)
        if window < 1 or not 0 <= momentum <= 1:
            raise ValueError(f"UnifiedNorm: window={window}, momentum={momentum}: at least 1, and in [0, 1]")
        self.window, self.warmup_iters, self.outlier_filtration = window, warmup_iters, outlier_filtration
        self.momentum, self.ratio_one_until, self.ratio_clamp = momentum, ratio_one_until, tuple(ratio_clamp)
        self.filter_while_filling = filter_while_filling
        placed = {"device": device, "dtype": dtype}
        self.register_buffer("running_var", torch.ones(num_features, **placed))
        self.register_buffer("ema_gz", torch.zeros(num_features, **placed))
        self.register_buffer("buffer_x2", torch.zeros(window, num_features, **placed))
        self.register_buffer("buffer_gz", torch.zeros(window, num_features, **placed))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        self.register_buffer("skip_counter", torch.tensor(0, device=device))

    def running(self) -> Tensor:
        """rv."""
        return self.running_var

    def smooth(self, seen: Tensor, update: bool) -> Call:
        """S = D = var, and r."""
        step = int(self.num_batches_tracked) + 1
        slot = step % self.window
        before, past = widened(self.buffer_x2), widened(self.running_var).clone()
        inserted = before.clone()
        inserted[slot] = seen
        outlier = (
            self.outlier_filtration
            and step >= (self.warmup_iters if self.filter_while_filling else max(self.warmup_iters, self.window))
            and _has_outlier(before, inserted, self.window)
        )
        skip = outlier or self.window == 1
        smoothed = not (step <= self.window or step < self.warmup_iters or skip)
        var = inserted.log().mean(0).exp() if smoothed else seen
        ratio = None
        if step > max(self.ratio_one_until, self.warmup_iters) and not skip:
            ratio = ((var + self.eps) / (past + self.eps)).sqrt().clamp(*self.ratio_clamp)
        if update:
            means = self._forward_means.add(past if outlier else seen, var)
            self.skip_counter.add_(int(outlier))
            if means is not None:
                self.buffer_x2[slot] = means[0].to(self.buffer_x2.dtype)
                self.running_var.copy_(past + self.momentum * (means[1] - past))
                self.num_batches_tracked.add_(1)
        return Call(seen, var, var, ratio, _Place(slot, smoothed, skip))

    def gradient_state(self) -> tuple[Tensor, ...]:
        """e and Bg."""
        return widened(self.ema_gz).clone(), widened(self.buffer_gz).clone()

    def smooth_gradient(self, call: Call, gz: Tensor, zz: Callable[[], Tensor], update: bool) -> Tensor:
        """nu = e after this step; this step's own mean of G z if it was skipped."""
        assert call.past is not None
        place: _Place = call.notes
        past, window = call.past[0], call.past[1].clone()
        kept = past if place.skip else gz
        window[place.slot] = kept
        mean = window.mean(0) if place.smoothed else gz
        means = self._backward_means.add(kept, mean) if update else None
        if means is not None:
            self.buffer_gz[place.slot] = means[0].to(self.buffer_gz.dtype)
            self.ema_gz.copy_(past + self.momentum * (means[1] - past))
        return mean if place.skip else past + self.momentum * (mean - past)

    def as_affine(self) -> Affine:
        """s = g / sqrt(rv + eps), t = b.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("UnifiedNorm is in training mode: call model.eval() first")
        return affine_of(self.running_var, self.eps, None, self.weight, self.bias)


def _has_outlier(before: Tensor, inserted: Tensor, window: int) -> bool:
    """Whether arithmetic and geometric mean of the window are further apart than its record allows."""
    allowed = before.sqrt().var() * window
    return bool((inserted.mean(0) - inserted.log().mean(0).exp() > allowed).any())


CARD = Card(
    id="unified_norm",
    title="Unified Normalization for Accelerating and Stabilizing Transformers",
    authors="Yang, Zhang, Xu, Chen, Jia, Jiang, Xie",
    year=2022,
    source="arXiv 2208.01313",
    family="norm",
    summary="Divides by a quadratic mean smoothed over the last steps in both passes, skips outlying steps, and folds "
    "into the next layer at inference.",
    objects={"UnifiedNorm": "Layer"},
    traits={"UnifiedNorm": ("gradient:stateful", "batch_independent_eval", "folds")},
    use="Transformers whose norms must cost nothing at inference.",
    avoid="Short trainings, small batches, second derivatives.",
    composes=("fold_affine", "powernorm"),
    vectors=("unified_norm", "unified_norm_late"),
    code="github.com/hikvision-research/Unified-Normalization, Apache-2.0",
    claim={
        "text": "Unified normalization comes up to LayerNorm, where batch norm does not; here: a character "
        "transformer with it needs fewer bits to a character than with batch norm, by more than 0.05, at evaluation.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("batchnorm", "unified_norm"),
        "seeds": 5,
        "minutes": 5,
        "task": "chars",
    },
)
