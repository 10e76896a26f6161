"""`prepbn`: a transformer trained with LayerNorm that fades into a batch norm, which folds into the next layer.

For x (..., C), with mean and variance of each channel over the other axes (batch and tokens), a learned scalar alpha:

    RepBN(x) = gamma (x - mean) / sqrt(var + eps) + beta + alpha x
    training:   y = lam LN(x) + (1 - lam) RepBN(x)
    evaluation: y = RepBN(x), whatever lam is

In the first `warmup` steps y = LN(x) and RepBN is not run. Then lam = start left / steps, where `left` counts down from
`steps` to 0, one at each optimizer step: the first mixed step has lam = start. Steps are counted by `advance(model)`,
which the hook `AdvanceNorms` calls; so micro-batches and recomputed activations do not count.

Source: "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", Guo, Chen, Tang, Wang, 2024, arXiv 2405.11582. Official code: xinghaochen/SLAB, no licence found. We
differ from it in that optimizer steps are counted (it counts forward calls, which `per_call=True` does), padding can be
left out of the statistics (`mask`, `real_tokens`), and LN is not run once lam is 0.

At inference RepBN is affine, y = s x + t with s = gamma / sigma + alpha, t = beta - gamma mu / sigma,
sigma = sqrt(var + eps), and goes into every layer that reads it: W' = W diag(s), b' = b + W t. See `fold_affine`.

Use it in transformers that are trained from scratch, or for long enough, where inference must be fast. Measured before
lam is 0, a network is evaluated that was never trained alone: see `model_is_pure`. LLaMA wants `alpha=0, weight=0` and
10,000 steps of warm-up. Keep LayerNorm where batches are small or of one kind.

Example:
    >>> import torch
    >>> from laconic.norm import advance, model_is_pure, to_prepbn
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    >>> [change.after for change in to_prepbn(model, steps=2).changed]
    ['ProgressiveNorm']
    >>> advance(model), model_is_pure(model)
    (1, False)
    >>> advance(model), model_is_pure(model)
    (0, True)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.affine import Affine, affine_of
from laconic.core.card import Card
from laconic.core.hooks import Hook, Run
from laconic.core.statistics import RunningStat, recomputing, widened
from laconic.core.surgery import Swapped, Where, swap
from laconic.errors import BadInput

from ._channels import ChannelNorm


class RepBN(ChannelNorm):
    """Batch norm and the input times a learned scalar.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: of the running statistics, in torch's convention; None takes the mean over all batches.
        alpha_init: first value of alpha: 1 as in vision, 0 for language models.
        channel_dim: the axis of the channels.
        weight_init: first value of gamma: 0 with `alpha_init=0` for language models.
        accumulate: micro-batches to an update of the running statistics.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: no channels, or a momentum that cannot be.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        alpha_init: float = 1.0,
        channel_dim: int = -1,
        *,
        weight_init: float = 1.0,
        accumulate: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, channel_dim)
        self.eps, self.momentum = eps, momentum
        self.alpha_init, self.weight_init = alpha_init, weight_init
        self.stat = RunningStat(momentum, accumulate=accumulate)
        empty = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **empty))
        self.bias = nn.Parameter(torch.empty(num_features, **empty))
        self.alpha = nn.Parameter(torch.empty(1, **empty))
        self.register_buffer("running_mean", torch.zeros(num_features, **empty))
        self.register_buffer("running_var", torch.ones(num_features, **empty))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First values, and statistics of nothing seen."""
        nn.init.constant_(self.weight, self.weight_init)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.alpha, self.alpha_init)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y, of the shape and type of x.

        Args:
            x: with the channels on their axis.
            mask: of x's shape without the channels; False leaves a token out of the statistics (not of the output).

        Raises:
            ValueError: other channels, or a single token to a channel in training mode.
        """
        self.check(x)
        wide, shape = widened(x), self.shape(x)
        mean, var = self.running_mean, self.running_var
        if self.training:
            batch_mean, batch_var, count = self.batch_moments(x, mask)
            assert batch_mean is not None
            mean, var = batch_mean, batch_var
            if count == 1:
                raise ValueError(f"RepBN: one value per channel in training mode, from an input of {tuple(x.shape)}")
            if count:
                self.stat.update_moments(
                    self.running_mean, self.running_var, mean, var, count, self.num_batches_tracked
                )
        factor = self.weight * torch.rsqrt(var + self.eps)
        # Around the mean first: with s x + t, a mean that is large against the deviation would cost digits.
        y = (wide - mean.view(shape)) * factor.view(shape) + self.bias.view(shape) + self.alpha * wide
        return y.to(x.dtype)

    def as_affine(self) -> Affine:
        """s = gamma / sigma + alpha and t = beta - gamma mu / sigma.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("RepBN is in training mode: call model.eval() first")
        scale, shift = affine_of(self.running_var, self.eps, self.running_mean, self.weight, self.bias)
        return Affine(scale + self.alpha.detach().double(), shift)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, channel_dim={self.channel_dim}"


class ProgressiveNorm(nn.Module):
    """One norm that fades into another: lam old(x) + (1 - lam) new(x) in training, new(x) in evaluation.

    Args:
        old: where training starts.
        new: where it ends.
        warmup: optimizer steps with `old` alone.
        steps: optimizer steps in which lam falls from `start` to 0.
        start: lam at the first mixed step.
        per_call: count calls in training mode and not `advance()`.
        device, dtype: to which both norms go; where they are by default.

    Raises:
        ValueError: negative steps, or `start` outside [0, 1].
    """

    warmup_left: Tensor
    left: Tensor
    total: Tensor

    def __init__(
        self,
        old: nn.Module,
        new: nn.Module,
        warmup: int = 0,
        steps: int = 60000,
        start: float = 1.0,
        *,
        per_call: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if warmup < 0 or steps < 0:
            raise ValueError(f"ProgressiveNorm: warmup={warmup}, steps={steps}: neither may be negative")
        if not 0 <= start <= 1:
            raise ValueError(f"ProgressiveNorm: start is {start}: it must be in [0, 1]")
        self.old, self.new = old.to(device=device, dtype=dtype), new.to(device=device, dtype=dtype)
        self.start, self.per_call = start, per_call
        self.register_buffer("warmup_left", torch.tensor(warmup, device=device))
        self.register_buffer("left", torch.tensor(steps, device=device))
        self.register_buffer("total", torch.tensor(steps, device=device))
        self._last_mix: float | None = None

    @property
    def channel_dim(self) -> int:
        """The axis of the new norm's channels."""
        return int(getattr(self.new, "channel_dim", -1))

    @property
    def mix(self) -> float | None:
        """lam of the present step; None while warming up."""
        if self.warmup_left > 0:
            return None
        return self.start * float(self.left) / float(self.total) if self.left > 0 else 0.0

    @property
    def remaining(self) -> int:
        """Optimizer steps until only `new` is left."""
        return int(self.warmup_left) + int(self.left)

    def advance(self) -> None:
        """Count an optimizer step."""
        if self.warmup_left > 0:
            self.warmup_left -= 1
        elif self.left > 0:
            self.left -= 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y, of the shape and type of x; `mask` goes to the new norm."""
        masked = () if mask is None else (mask,)
        if not self.training:
            return self.new(x, *masked)
        lam = self._last_mix if self.per_call and recomputing() else self.mix
        self._last_mix = lam
        if self.per_call and not recomputing():
            self.advance()
        if lam is None:
            return self.old(x)
        if lam == 0:
            return self.new(x, *masked)
        return lam * self.old(x) + (1 - lam) * self.new(x, *masked)

    def as_affine(self) -> Affine | None:
        """That of the new norm.

        Raises:
            ValueError: the old one is still part of what is trained.
        """
        # On meta there are no counts to read: what can be planned there is what can be once the schedule is over.
        if not self.left.is_meta and self.remaining:
            raise ValueError(
                f"the old norm is still fading: {self.remaining} optimizer steps are left "
                f"({int(self.warmup_left)} of warm-up); fold after them"
            )
        return self.new.as_affine() if hasattr(self.new, "as_affine") else None

    def extra_repr(self) -> str:
        remaining = "?" if self.left.is_meta else self.remaining
        return f"remaining={remaining}, start={self.start}" + ", per_call=True" * self.per_call


def to_prepbn(
    model: nn.Module,
    steps: int,
    warmup: int = 0,
    where: Where = None,
    *,
    alpha: float = 1.0,
    weight: float = 1.0,
    start: float = 1.0,
    momentum: float = 0.1,
    old: type[nn.Module] | tuple[type[nn.Module], ...] = nn.LayerNorm,
) -> Swapped:
    """Let the norms over the last axis of a model fade into `RepBN`, in place.

    Args:
        model: which is changed; its optimizer must be made afterwards, for there are new parameters.
        steps, warmup, start: see `ProgressiveNorm`.
        where: which of them, as in `laconic.swap`; all by default.
        alpha, weight: first values of alpha and gamma.
        momentum: see `RepBN`.
        old: classes of the norms.

    Returns:
        What was changed, and what was not and why.
    """

    def faded(norm: nn.Module) -> ProgressiveNorm | None:
        shape = tuple(getattr(norm, "normalized_shape", ())) or tuple(norm.weight.shape)
        if len(shape) != 1:
            return None  # several axes are no channels
        like = next(norm.parameters(), torch.empty(0))
        placed = {"device": like.device, "dtype": like.dtype}
        made = RepBN(shape[0], momentum=momentum, alpha_init=alpha, weight_init=weight, **placed)
        return ProgressiveNorm(norm, made, warmup, steps, start, device=like.device)

    return swap(model, old, faded, where)


def advance(model: nn.Module) -> int:
    """Count an optimizer step in all fading norms of a model; returns how many are left until the last is done."""
    norms = fading(model)
    for norm in norms.values():
        norm.advance()
    return max((norm.remaining for norm in norms.values()), default=0)


def fading(model: nn.Module) -> dict[str, ProgressiveNorm]:
    """The progressive norms of a model that count optimizer steps, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ProgressiveNorm) and not module.per_call
    }


def model_is_pure(model: nn.Module) -> bool:
    """Whether no progressive norm of a model needs its old norm any more: evaluation is of what is trained."""
    return all(not module.remaining for module in model.modules() if isinstance(module, ProgressiveNorm))


class AdvanceNorms(Hook):
    """Counts optimizer steps in the progressive norms of the model; their counters are in its state dict.

    Raises:
        BadInput: at the start, the model has none.
    """

    def start(self, run: Run) -> None:
        if not fading(run.model):
            raise BadInput(f"AdvanceNorms: {type(run.model).__name__} has no ProgressiveNorm: call to_prepbn first")

    def step(self, run: Run) -> None:
        advance(run.model)


CARD = Card(
    id="prepbn",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
    "Normalization",
    authors="Guo, Chen, Tang, Wang",
    year=2024,
    source="arXiv 2405.11582",
    family="norm",
    summary="Trains a transformer whose LayerNorm fades into batch norm plus a scaled identity, which costs nothing at "
    "inference.",
    objects={"RepBN": "Layer", "ProgressiveNorm": "Layer"},
    traits={
        "RepBN": ("gradient:exact", "batch_independent_eval", "folds"),
        "ProgressiveNorm": ("gradient:exact", "batch_independent_eval"),
    },
    use="Transformers that are trained from scratch and must be fast at inference.",
    avoid="Small or uniform batches, and networks measured before the old norm has faded.",
    composes=("fold_affine", "sla"),
    vectors=("prepbn",),
    code="github.com/xinghaochen/SLAB, no licence found",
    claim={
        "text": "A vision transformer trained with PRepBN is more accurate than one with batch norm from the start; "
        "here: its test accuracy on digits is higher by more than half a point.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("batchnorm", "prepbn"),
        "seeds": 5,
        "minutes": 5,
        "task": "digits",
    },
)
