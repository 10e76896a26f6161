"""`alpha_bn`: normalize test data by a mixture of the training's and the test batch's statistics.

For x (n, C, ...), the source's running mean mu_s and variance var_s (C,), those of the batch mu_t and var_t, and
a = source_weight:

    mu  = a mu_s  + (1 - a) mu_t
    var = a var_s + (1 - a) var_t           var_t unbiased, as the code that is used for it has it
    y = g (x - mu) / sqrt(var + eps) + b    g, b of the source
    mixture: var += a (1 - a) (mu_s - mu_t)^2, which the variance of a mixture of both would have besides

a = 1 is the model as it was trained, a = 0 is test-time batch normalization ("BN-adapt"). With one value a channel
(one example, one place) the batch has no unbiased variance, and the source's stands for it.

`Core` also learns g and b, by one step a batch on the correlation between classes in the predictions P (B, K):

    C = P^T P,   C' = rows of C over their sums,   loss = (sum of C' - trace C') / K

Source: "Test-time Batch Statistics Calibration for Covariate Shift", You, Li, Zhao, 2021, arXiv 2110.04065. No official
code; the statistics are as in devavratTomar/unmixtns (Apache-2.0 header), whose alpha is 1 - a. The loss of `Core` is
not given in full where we could read it: the form above is class confusion, and its optimizer (Adam) is our choice.

Nothing folds: the statistics are the batch's. Use it where the test data are shifted (noise, weather, another
scanner) and batches are small. Where each batch is of one class, its statistics say the class: see `unmix_tns`.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.adapt import AlphaBN
    >>> model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    >>> x = torch.tensor([[4.0, 1.0], [6.0, 1.0]])
    >>> with AlphaBN.attach(model, source_weight=0.5):
    ...     model(x).mean(0)
    tensor([2.0412, 0.7071], grad_fn=<MeanBackward1>)
    >>> model(x).mean(0)
    tensor([5.0000, 1.0000], grad_fn=<MeanBackward1>)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.test_time import AdaptedNorm, Attached, attach, source_share
from laconic.errors import BadInput


def mixed_statistics(
    x: Tensor,
    source_mean: Tensor,
    source_var: Tensor,
    source_weight: float,
    *,
    unbiased: bool = True,
    mixture: bool = False,
) -> tuple[Tensor, Tensor]:
    """mu and var (C,) for x (n, C, ...).

    Args:
        x: in float32 or wider.
        source_mean, source_var: (C,).
        source_weight: a.
        unbiased: divide the batch's squares by their number less one.
        mixture: add what lies between the two means.
    """
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // max(1, x.shape[1])
    mean_s, var_s = source_mean.to(x.dtype), source_var.to(x.dtype)
    if not count:
        return mean_s, var_s
    if unbiased and count == 1:
        mean_t, var_t = x.mean(dims), var_s
    else:
        var_t, mean_t = torch.var_mean(x, dims, correction=int(unbiased))
    mean = source_weight * mean_s + (1 - source_weight) * mean_t
    var = source_weight * var_s + (1 - source_weight) * var_t
    if mixture:
        var = var + source_weight * (1 - source_weight) * (mean_s - mean_t).square()
    return mean, var


class AlphaBN(AdaptedNorm):
    """A batch norm whose statistics are the source's and the batch's together, in either mode.

    Args:
        num_features, eps, affine: as torch's batch norms have them.
        source_weight: a in [0, 1].
        unbiased, mixture: see `mixed_statistics`.
        device, dtype: of the parameters and the source's statistics.

    Raises:
        ValueError: `source_weight` is not in [0, 1].
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        source_weight: float = 0.9,
        unbiased: bool = True,
        mixture: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, eps, affine, device=device, dtype=dtype)
        self.source_weight = source_share("AlphaBN", source_weight)
        self.unbiased, self.mixture = unbiased, mixture

    @classmethod
    def attach(cls, model: nn.Module, *, source_weight: float = 0.9, **options: Any) -> Attached:
        """Put one in the place of every batch norm of a model, until `detach`; see `laconic.core.test_time`.

        Raises:
            BadInput: the model has no batch norm with statistics, or something is attached already.
        """
        return attach(model, lambda norm: cls.from_batchnorm(norm, source_weight=source_weight, **options))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = mixed_statistics(
            x, self.running_mean, self.running_var, self.source_weight, unbiased=self.unbiased, mixture=self.mixture
        )
        return self.per_channel(mean, x), self.per_channel(var, x)

    def extra_repr(self) -> str:
        flags = ", unbiased=False" * (not self.unbiased) + ", mixture=True" * self.mixture
        return f"{super().extra_repr()}, source_weight={self.source_weight}{flags}"


def class_confusion(logits: Tensor) -> Tensor:
    """The loss of `Core` on logits (B, K): 0 where no prediction mixes classes, at most (K - 1) / K."""
    p = F.softmax(logits, 1)
    together = p.T @ p
    together = together / together.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return (together.sum() - together.trace()) / p.shape[1]


class Core:
    """alpha-BN, and gains and shifts that learn from the stream; the model's own stay as they are.

    Args:
        model: classifier, input -> logits (B, K); its batch norms are replaced until `detach`.
        lr: of Adam.
        steps: on each batch.
        source_weight: see `AlphaBN`.

    Raises:
        BadInput: the model has no batch norm with gain and statistics, or fewer than one step is asked for.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, steps: int = 1, *, source_weight: float = 0.9):
        if steps < 1 or not lr > 0:
            raise BadInput(f"Core: lr={lr}, steps={steps}: a positive rate and at least one step are needed")
        self.lr, self.steps = lr, steps
        self.attached = AlphaBN.attach(model, source_weight=source_weight)
        parts = (layer for layer in dict.fromkeys(self.attached.layers.values()))
        self.learned = [p for layer in parts for p in layer.parameters()]
        if not self.learned:
            self.attached.detach()
            raise BadInput("Core: no batch norm of the model has a gain that could be learned")
        for p in self.learned:
            p.requires_grad_()
        self.optimizer = torch.optim.Adam(self.learned, lr)

    def update(self, *batch: Any) -> Tensor:
        """Logits of the next of the stream, from before the first step on it; then learn from it."""
        first = None
        for _ in range(self.steps):
            with torch.enable_grad():
                logits = self.attached.model(*batch)
                gradients = torch.autograd.grad(class_confusion(logits), self.learned, allow_unused=True)
            first = logits.detach() if first is None else first
            for p, gradient in zip(self.learned, gradients, strict=True):
                p.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad()
        assert first is not None
        return first

    def predict(self, *batch: Any) -> Tensor:
        """Logits; nothing is learned."""
        return self.attached.predict(*batch)

    def reset(self) -> None:
        """Gains and shifts of the source, and an optimizer that has seen nothing."""
        self.attached.reset()
        self.optimizer = torch.optim.Adam(self.learned, self.lr)

    def detach(self) -> nn.Module:
        """The model with its own batch norms."""
        return self.attached.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {"layers": self.attached.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.attached.load_state_dict(state["layers"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.attached.__exit__(*error)


CARD = Card(
    id="alpha_bn",
    title="Test-time Batch Statistics Calibration for Covariate Shift",
    authors="You, Li, Zhao",
    year=2021,
    source="arXiv 2110.04065",
    family="adapt",
    summary="Batch norms that mix the training's statistics with those of the test batch, and gains learned on it.",
    objects={"AlphaBN": "Layer", "Core": "Protocol"},
    traits={"AlphaBN": ("gradient:exact",), "Core": ("order:dependent",)},
    use="On test data that are shifted from the training's, in small batches of mixed classes.",
    avoid="Streams in which a batch is of one class: its statistics say the class, not the shift.",
    composes=("unmix_tns", "robustness_probe"),
    vectors=("unmix_tns",),
    code="none official; the statistics as in github.com/devavratTomar/unmixtns, Apache-2.0 header",
    claim={
        "text": "On corrupted images in batches of four, mixing in a tenth of the batch's statistics is more than two "
        "points more accurate than the source's statistics alone.",
        "metric": "mean accuracy over noises, blurs, weather and contrast",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("source", "alpha_bn"),
        "seeds": 5,
        "minutes": 3,
        "task": "mnist-cnn",
    },
)
