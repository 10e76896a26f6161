"""`region_norm`: for pictures with holes, normalize what is known and what is not each by its own statistics.

For x (N, C, H, W) and a region, m (N, 1, H, W) of ones and zeros, per channel, over all N, H, W:

    S = sum m        mu = sum m x / S        v = sum m (x - mu)^2 / S        p = S / (N H W)
    R(x, m) = m (x - mu) sqrt(p) / sqrt(p v + eps)

Inside the region the result has mean 0 and variance 1, outside it is 0. (The paper's code fills the outside with mu,
runs a batch norm over the plane and multiplies by sqrt(p): that is the same, and where the p stems from.) With M = 1 in
the hole, and r = R(x, M) + R(x, 1 - M):

    RN-B, the mask M given:    y = r M (1 + g_f) + b_f + r (1 - M) (1 + g_b) + b_b          g, b per channel, 0 at first
    RN-L, the mask found:      s = sigmoid(conv([mean_c x, max_c x]))    M = 1[s >= threshold]    k x k convolutions
                               y = r (1 + conv_gamma(s)) + conv_beta(s)

No gradient flows through M: the first convolution of RN-L learns through gamma and beta alone. Statistics are always
those of the batch; nothing runs along.

Source: "Region Normalization for Image Inpainting", Yu, Guo, Jin, Wu, Chen, Li, Zhang, Liu, 2019, arXiv 1911.10375.
Official code: geekyutao/RN, MIT. Both shifts of RN-B are added everywhere there; `masked_bias` adds each in its own
region, as the paper describes. We differ in that float16 and bfloat16 are computed in float32.

Nothing folds at inference, and pictures of a batch influence each other, unless `per_image` takes S, mu and v over H
and W alone; the authors mention that this blurs less.

Use it in inpainting: RN-B in the encoder, where the mask is known; RN-L further on, where the hole is partly filled.
Elsewhere it is a batch norm that depends on its batch at inference.

Example:
    >>> import torch
    >>> from laconic.norm import RegionNormB
    >>> hole = torch.zeros(2, 1, 16, 16)
    >>> hole[:, :, 4:10, 4:10] = 1
    >>> RegionNormB(3)(torch.randn(2, 3, 8, 8), hole).shape
    torch.Size([2, 3, 8, 8])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.statistics import moments, widened

BATCH, IMAGE = (0, 2, 3), (2, 3)


def region_normalize(x: Tensor, region: Tensor, eps: float = 1e-5, per_image: bool = False) -> Tensor:
    """R(x, m), of x's shape and type; 0 everywhere where the region is empty.

    Args:
        x: (N, C, H, W).
        region: m, booleans that broadcast against x.
        eps: see the equation.
        per_image: take the statistics over the picture instead of the batch.
    """
    dims = IMAGE if per_image else BATCH
    wide = widened(x)
    mean, spread = moments(wide, dims, mask=region)
    assert mean is not None
    share = region.expand(x.shape).to(wide.dtype).mean(dims, keepdim=True)
    scale = share.sqrt() * torch.rsqrt(share * spread + eps)
    return torch.where(region, (wide - mean) * scale, torch.zeros_like(wide)).to(x.dtype)


def both_regions(x: Tensor, hole: Tensor, eps: float = 1e-5, per_image: bool = False) -> Tensor:
    """r = R(x, M) + R(x, 1 - M); arguments as those of `region_normalize`."""
    return region_normalize(x, hole, eps, per_image) + region_normalize(x, ~hole, eps, per_image)


class RegionNormB(nn.Module):
    """RN-B: called with x (N, C, H, W) and a mask (N, 1, H', W') that is not 0 in the hole.

    Args:
        num_features: C.
        masked_bias: add each shift in its own region instead of everywhere.
        per_image: take the statistics over each picture instead of the batch.
        eps: see the equation.
        device, dtype: of the parameters.

    Raises:
        ValueError: in the call, shapes that do not fit.
    """

    def __init__(
        self,
        num_features: int,
        masked_bias: bool = False,
        *,
        per_image: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_features, self.masked_bias, self.per_image, self.eps = num_features, masked_bias, per_image, eps
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.foreground_gamma, self.foreground_beta = nn.Parameter(zeros), nn.Parameter(zeros.clone())
        self.background_gamma, self.background_beta = nn.Parameter(zeros.clone()), nn.Parameter(zeros.clone())

    def reset_parameters(self) -> None:
        """All at 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"region_norm: an input of {tuple(x.shape)}: it must be (N, {self.num_features}, H, W)")
        if mask.ndim != 4 or mask.shape[:2] != (x.shape[0], 1):
            raise ValueError(f"region_norm: a mask of {tuple(mask.shape)}: it must be ({x.shape[0]}, 1, H, W)")
        hole = F.interpolate(mask.detach().to(torch.float32), size=x.shape[2:], mode="nearest") != 0
        r = both_regions(x, hole, self.eps, self.per_image)
        gain = torch.where(hole, 1 + _planes(self.foreground_gamma), 1 + _planes(self.background_gamma))
        front, back = _planes(self.foreground_beta), _planes(self.background_beta)
        return r * gain + (torch.where(hole, front, back) if self.masked_bias else front + back)

    def extra_repr(self) -> str:
        flags = [f"{name}=True" for name in ("masked_bias", "per_image") if getattr(self, name)]
        return ", ".join([f"{self.num_features}", *flags])


class RegionNormL(nn.Module):
    """RN-L: finds the hole by itself; called with x (N, C, H, W) of any number of channels.

    Args:
        num_features: C, checked in the call.
        threshold: of s.
        kernel_size: of the three convolutions, odd.
        per_image: take the statistics over each picture instead of the batch.
        eps: see the equation.
        device, dtype: of the parameters.

    Raises:
        ValueError: an even kernel; in the call, an input of another shape.
    """

    def __init__(
        self,
        num_features: int,
        threshold: float = 0.8,
        kernel_size: int = 7,
        *,
        per_image: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"region_norm: kernel_size is {kernel_size}: it must be odd, so that the map keeps its size"
            )
        self.num_features, self.threshold, self.per_image, self.eps = num_features, threshold, per_image, eps
        pad = kernel_size // 2
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=pad, bias=False, device=device, dtype=dtype)
        self.gamma_conv = nn.Conv2d(1, 1, kernel_size, padding=pad, device=device, dtype=dtype)
        self.beta_conv = nn.Conv2d(1, 1, kernel_size, padding=pad, device=device, dtype=dtype)

    def found(self, x: Tensor) -> Tensor:
        """s (N, 1, H, W), how much each place is taken for a hole."""
        return torch.sigmoid(self.conv1(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"region_norm: an input of {tuple(x.shape)}: it must be (N, {self.num_features}, H, W)")
        s = self.found(x)
        r = both_regions(x, s.detach() >= self.threshold, self.eps, self.per_image)
        return r * (1 + self.gamma_conv(s)) + self.beta_conv(s)

    def extra_repr(self) -> str:
        return f"{self.num_features}, threshold={self.threshold}" + ", per_image=True" * self.per_image


def _planes(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


CARD = Card(
    id="region_norm",
    title="Region Normalization for Image Inpainting",
    authors="Yu, Guo, Jin, Wu, Chen, Li, Zhang, Liu",
    year=2019,
    source="arXiv 1911.10375",
    family="norm",
    summary="Normalizes the hole and the rest of a picture each by its own statistics; the hole is given, or found.",
    objects={"RegionNormB": "Layer", "RegionNormL": "Layer"},
    traits={"RegionNormB": ("gradient:exact",), "RegionNormL": ("gradient:exact",)},
    use="Networks that fill holes in pictures: RN-B where the mask is known, RN-L further on.",
    avoid="Anything without regions, or where a picture's result must not depend on its batch: see per_image.",
    composes=("ibn",),
    vectors=("region_norm",),
    code="github.com/geekyutao/RN, MIT",
    claim={
        "text": "A small network that fills holes in digits has a lower error in the hole with region normalization than "
        "with batch normalization: the natural logarithm of the L1 error falls by more than 0.03.",
        "metric": "log of the L1 error in the hole",
        "direction": "lower",
        "margin": 0.03,
        "arms": ("batchnorm", "region_norm"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
