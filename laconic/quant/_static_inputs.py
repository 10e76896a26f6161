"""`InputRange`: one scale for the inputs of a layer, known before it runs, from what was seen in calibration.

Magnitudes are counted in bins of equal width, whose range doubles where something larger comes (pairs of bins become
one), so that no batch is kept. The scale is that of the clipping point c of least squared error on the counts n_j at the
centres m_j, of the points c = i 2^-7 of the range:

    s = c / 127          error(c) = sum_j n_j (m_j - s min(127, round(m_j / s)))^2

Clipping a few large values makes every step smaller, so c is below the maximum where tails are heavy.

Source: the search over clipping points is that of Choukroun et al. (2019), "Low-bit Quantization of Neural Networks for
Efficient Inference", arXiv 1902.06822, and of TensorRT's calibration with squares for its divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 8192
POINTS = 128  # clipping points tried
LEVELS = 127


class InputRange:
    """What is known of the magnitudes of one layer's inputs.

    Attributes:
        counts: (BINS,) float64, of magnitudes in [0, top].
        top: the end of the range: a power of two times the first batch's largest magnitude.
        largest: the largest magnitude seen.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.top = self.largest = 0.0

    def add(self, x: Tensor) -> None:
        """Count a batch, of any shape and floating type.

        Raises:
            ValueError: it holds something that is not finite.
        """
        sizes = x.detach().abs().float().reshape(-1).cpu()
        if not sizes.numel():
            return
        largest = float(sizes.max())
        if not torch.isfinite(sizes.max()):
            raise ValueError("inputs that are not finite have no scale")
        self.largest = max(self.largest, largest)
        if self.top == 0.0:
            if largest == 0.0:
                self.counts[0] += sizes.numel()
                return
            self.top = largest
        while self.top < largest:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.top *= 2
        self.counts += torch.histc(sizes, BINS, 0, self.top).double()

    def scale(self) -> float:
        """The scale of least squared error; 1 where nothing but zeros was seen."""
        if self.top == 0.0:
            return 1.0
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.top / BINS)
        best, least = self.largest / LEVELS, float("inf")
        for point in range(1, POINTS + 1):
            step = min(self.top * point / POINTS, self.largest) / LEVELS
            error = float(((centres - (centres / step).round().clamp(max=LEVELS) * step).square() * self.counts).sum())
            if error < least:
                best, least = step, error
        return best

CARD = None
