"""`bss`: give all pictures of a batch the style of one of them, so that a learner cannot tell them apart by style.

For pictures x (B, C, H, W), with amplitudes and phases of each channel's Fourier transform, and one reference k:

    A_n, phi_n = |FFT(x_n)|, arg FFT(x_n)
    A_n <- A_k inside the square of low frequencies                  |u| <= floor(sqrt(r) H / 2), |v| <= floor(sqrt(r) W / 2)
    x'_n = Re IFFT(A_n e^(i phi_n)), clipped to the range of values  r drawn once for the batch, from `ratio`

Low amplitudes hold the style: mean colour (frequency 0), light, contrast at large. With a reference to each view of a
batch, in contrastive learning, negatives share a style while positives differ in it. Fourier augmentation, the baseline,
draws a reference for each picture (`per_image`).

Source: "Towards domain-invariant Self-Supervised Learning with Batch Styles Standardization", Scalbert, Vakalopoulou,
Couzinie-Devy, 2023, arXiv 2303.06088. The official code could not be reached, and the paper was read in part: how r is
distributed (here: evenly) and whether crops come first are the caller's to say. The square is symmetric about frequency
0, so that what comes back is real.

Nothing is left of it at inference. Use it in self-supervised or supervised learning for pictures from places that were
not seen in training. Not where style is what is asked for. Pictures of a batch must be of one size.

Example:
    >>> import torch
    >>> from laconic.norm import BatchStyleStandardization
    >>> style = BatchStyleStandardization(ratio=(0.0, 0.0))  # frequency 0 alone: the mean colour
    >>> x = torch.full((2, 1, 8, 8), 0.25)
    >>> x[1] += 0.5
    >>> same = style(x, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(same[0], same[1])
    True
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laconic.core.card import Card
from laconic.core.statistics import widened


def low_frequencies(height: int, width: int, ratio: float) -> Tensor:
    """Whether each frequency of a transform lies in the square, (height, width) booleans, frequency 0 first.

    Args:
        height: H.
        width: W.
        ratio: r, in [0, 1].
    """

    def low(size: int) -> Tensor:
        reach = min(math.floor(math.sqrt(ratio) * size / 2), (size - 1) // 2)
        frequency = torch.arange(size)
        return torch.minimum(frequency, size - frequency) <= reach

    return low(height)[:, None] & low(width)


def standardize_style(x: Tensor, reference: Tensor, ratio: float, valid: Sequence[float] = (0.0, 1.0)) -> Tensor:
    """x', of x's shape and type; computed in float32 at least.

    Args:
        x: (B, C, H, W).
        reference: (B,), the picture whose style each one gets.
        ratio: r.
        valid: the range that values are clipped to.
    """
    wide = widened(x)
    spectrum = torch.fft.fft2(wide)
    amplitude = spectrum.abs()
    low = low_frequencies(x.shape[2], x.shape[3], ratio).to(x.device)
    changed = torch.polar(torch.where(low, amplitude[reference], amplitude), spectrum.angle())
    return torch.fft.ifft2(changed).real.clamp(*valid).to(x.dtype)


class BatchStyleStandardization:
    """The transform of a batch (B, C, H, W); call it once for each view.

    Args:
        ratio: lowest and highest r, the share of the plane of frequencies that is taken over.
        per_image: draw a reference for each picture: Fourier augmentation.
        valid: the range of values.
        jitter: strength of a change of brightness and contrast, drawn once for the batch; 0 leaves them.

    Raises:
        ValueError: ratios that are not ordered in [0, 1], an empty range, or a negative strength; in the call, an input
            that is no batch of pictures.
    """

    def __init__(
        self,
        ratio: tuple[float, float] = (0.0, 0.1),
        *,
        per_image: bool = False,
        valid: tuple[float, float] = (0.0, 1.0),
        jitter: float = 0.0,
    ):
        if not 0 <= ratio[0] <= ratio[1] <= 1:
            raise ValueError(f"bss: ratio is {ratio}: it must be two numbers in [0, 1], the lower first")
        if not valid[0] < valid[1]:
            raise ValueError(f"bss: the range {valid} of values is empty")
        if not jitter >= 0:
            raise ValueError(f"bss: jitter is {jitter}: it must not be negative")
        self.ratio, self.per_image, self.valid, self.jitter = ratio, per_image, valid, jitter

    def __call__(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The pictures in the style of one of them."""
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"bss: {x.dtype} of shape {tuple(x.shape)}: a batch (B, C, H, W) of floats is needed")
        low, high = self.ratio
        ratio = low + (high - low) * float(torch.rand((), generator=generator))
        draws = torch.rand(2, generator=generator)
        if not len(x):
            return x.clone()
        references = torch.randint(len(x), (len(x),), generator=generator)
        reference = references if self.per_image else references[:1].expand(len(x))
        y = standardize_style(x, reference.to(x.device), ratio, self.valid)
        if not self.jitter:
            return y
        contrast, shift = (1 + self.jitter * (2 * float(draws[0]) - 1), self.jitter * (2 * float(draws[1]) - 1))
        middle = sum(self.valid) / 2
        width = self.valid[1] - self.valid[0]
        return (middle + contrast * (y - middle) + shift * width / 2).clamp(*self.valid)


CARD = Card(
    id="bss",
    title="Towards domain-invariant Self-Supervised Learning with Batch Styles Standardization",
    authors="Scalbert, Vakalopoulou, Couzinie-Devy",
    year=2023,
    source="arXiv 2303.06088",
    family="norm",
    summary="Gives all pictures of a batch the low frequencies of one of them, so that features do not depend on style.",
    objects={"BatchStyleStandardization": "Data"},
    traits={"BatchStyleStandardization": ("transform",)},
    use="Learning from pictures of several places for places that were not seen.",
    avoid="Tasks where colour or light is what is asked for.",
    composes=("ibn", "byol_gn_ws"),
    code="gitlab vitadx/articles, not reachable",
    claim={
        "text": "Features learned by contrast from digits in three styles classify digits in a fourth style more "
        "accurately with one style to a batch than with a random style to each picture, by more than two points.",
        "metric": "accuracy in the unseen style",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("fourier_augmentation", "bss"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
