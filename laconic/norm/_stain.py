"""`stain`: bring histology images of different laboratories to one look, by Macenko's or Reinhard's method.

An image is a (h, w, 3) tensor of uint8. **Macenko**: light that passes stained tissue is absorbed (Beer and Lambert),
so that with I_0 the light without tissue, optical density is a product of stain colours S (3, 2), hematoxylin first,
and concentrations C (2, pixels):

    D = -log((I + 1) / I_0) = S C

S is found from the pixels with all of D at least `beta`. Let e_1, e_2 be the eigenvectors of their covariance (n - 1)
with the middle and the largest eigenvalue. The angles phi = atan2(D . e_2, D . e_1) have an `alpha` and a
(100 - alpha) percentile; the directions cos(phi) e_1 + sin(phi) e_2 there are the stains, and the one that absorbs
more red is hematoxylin. C is the least-squares solution for all pixels, M its 99th percentile per stain, and with the
target's S' and M' the new image is

    I' = min(255, floor(I_0 exp(-S' (C M' / M))))

**Reinhard**: in CIE Lab colours (D65; L stretched to 255, a and b moved by 128) each channel x gets the target's mean
m' and deviation s':  (x - m) s' / s + m'. In the "modified" form a and b are only moved, and L keeps its mean and
becomes m + (x - m)(1 + q) with q = (s' - s) / s', or 0.05 where that is not positive.

Source: the methods are Macenko et al., 2009, "A method for normalizing histology slides for quantitative analysis",
and Reinhard et al., 2001, "Color transfer between images"; that they help pathology foundation models is "Enhancing
Whole Slide Pathology Foundation Models through Stain Normalization", Yun, Hu, Kim, Jang, Lee, 2024, arXiv 2408.00380
(it takes Macenko's), which has no code for it. The reference is torchstain, EIDOSLAB, MIT. We differ from it in: e_2 is
turned towards the pixels, so that no angle crosses the cut of atan2; an image with too little tissue is returned
unchanged, with a warning; a stain or a channel that does not vary is left alone, where torchstain divides by zero.

It runs before the network and folds into nothing. With stains other than hematoxylin and eosin give Macenko another
reference, and where colour itself is what tells the classes apart use neither.

Example:
    >>> import torch
    >>> from laconic.norm import MacenkoNormalizer
    >>> pink = torch.randint(60, 200, (32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    >>> MacenkoNormalizer()(pink).shape
    torch.Size([32, 32, 3])
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, Self

import torch
from torch import Tensor

from laconic.core.card import Card
from laconic.errors import BadInput

# The usual reference: stains as columns (red, green, blue down), and their 99th percentiles.
REFERENCE = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
REFERENCE_CONCENTRATION = (1.9705, 1.0308)

_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)  # D65
_TINY = 1e-12


class Stained(NamedTuple):
    """A normalized image, and what either stain alone would show: (h, w, 3) of uint8 each."""

    image: Tensor
    hematoxylin: Tensor
    eosin: Tensor


class Collapse(NamedTuple):
    """How far features say which group (slide, laboratory) an example is from; all are 0 or near it where they do not.

    Attributes:
        explained: share of the features' variance that lies between the groups' means (one-way ANOVA), in [0, 1].
        silhouette: mean over examples of (b - a) / max(a, b), a the mean distance to the own group and b to the
            nearest other one, in [-1, 1].
        retrieved: share of examples whose nearest neighbour is of their group; by chance it is about the groups' share.
    """

    explained: float
    silhouette: float
    retrieved: float


def optical_density(image: Tensor, light: float) -> Tensor:
    """D, (3, pixels) in float64, of a (h, w, 3) image."""
    return -((image.reshape(-1, 3).double() + 1) / light).log().T


def stain_colours(density: Tensor, alpha: float) -> Tensor:
    """S, (3, 2), from the density (3, n) of tissue."""
    vectors = torch.linalg.eigh(torch.cov(density)).eigenvectors[:, 1:]
    projections = vectors.T @ density
    # Densities are positive, so that they lie on one side of zero along the largest direction: the positive one here.
    towards = torch.stack([projections.new_ones(()), projections[1].mean().sign() + (projections[1].mean() == 0)])
    vectors, projections = vectors * towards, projections * towards[:, None]
    angles = torch.atan2(projections[1], projections[0])
    ends = torch.quantile(angles, angles.new_tensor([alpha / 100, 1 - alpha / 100]))
    stains = vectors @ torch.stack([ends.cos(), ends.sin()])
    return stains if stains[0, 0] > stains[0, 1] else stains.flip(1)


def concentrations(density: Tensor, stains: Tensor) -> Tensor:
    """C, (2, pixels)."""
    return torch.linalg.lstsq(stains, density).solution


class MacenkoNormalizer:
    """Gives an image the stain colours and strengths of a target.

    Args:
        stain_matrix: S' of the target, (3, 2), hematoxylin first; the usual reference by default, `fit` takes an
            image's.
        max_concentration: M' of the target, (2,).
        light: I_0, brightness without tissue.
        alpha: percentile of the angles that is taken for a pure stain.
        beta: optical density below which a pixel is no tissue.
        percentile: of the concentrations, for M.
        least_pixels: with fewer pixels of tissue an image is not normalized.

    Raises:
        BadInput: an option is out of its range, or of the wrong shape.
    """

    def __init__(
        self,
        stain_matrix: Tensor | None = None,
        max_concentration: Tensor | None = None,
        *,
        light: float = 240.0,
        alpha: float = 1.0,
        beta: float = 0.15,
        percentile: float = 99.0,
        least_pixels: int = 50,
    ):
        if not light > 0 or not 0 <= alpha < 50 or not 0 < percentile <= 100 or least_pixels < 2:
            raise BadInput(
                f"MacenkoNormalizer: {light=}, {alpha=}, {percentile=}, {least_pixels=}: light is positive, alpha in "
                "[0, 50), the percentile in (0, 100], and two pixels are the least"
            )
        given = REFERENCE if stain_matrix is None else stain_matrix
        strength = REFERENCE_CONCENTRATION if max_concentration is None else max_concentration
        self.stain_matrix = torch.as_tensor(given, dtype=torch.float64)
        self.max_concentration = torch.as_tensor(strength, dtype=torch.float64)
        if self.stain_matrix.shape != (3, 2) or self.max_concentration.shape != (2,):
            raise BadInput(
                f"MacenkoNormalizer: a stain matrix of {tuple(self.stain_matrix.shape)} and concentrations of "
                f"{tuple(self.max_concentration.shape)}: they are (3, 2) and (2,)"
            )
        self.light, self.alpha, self.beta = light, alpha, beta
        self.percentile, self.least_pixels = percentile, least_pixels

    def fit(self, image: Tensor) -> Self:
        """Take the stain colours and strengths of a target image.

        Raises:
            BadInput: it is no (h, w, 3) image of uint8, or has too little tissue.
        """
        found = self._stains(_checked(image, "MacenkoNormalizer"))
        if found is None:
            raise BadInput(
                f"MacenkoNormalizer: fewer than {self.least_pixels} pixels of the target are tissue (optical density "
                f"of {self.beta} or more): choose another image, or a smaller beta"
            )
        self.stain_matrix, _, self.max_concentration = found
        return self

    def __call__(self, image: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The normalized image. Nothing is drawn: `generator` is what every transform takes.

        Raises:
            BadInput: it is no (h, w, 3) image of uint8.
        """
        return self.separate(image).image

    def separate(self, image: Tensor) -> Stained:
        """The normalized image and either stain alone; the image itself three times if it has too little tissue.

        Raises:
            BadInput: it is no (h, w, 3) image of uint8.
        """
        found = self._stains(_checked(image, "MacenkoNormalizer"))
        if found is None:
            few = f"fewer than {self.least_pixels} pixels of a {tuple(image.shape)} image are tissue"
            warnings.warn(f"MacenkoNormalizer: {few}: it is left as it is", stacklevel=3)
            return Stained(image.clone(), image.clone(), image.clone())
        _, amounts, strongest = found
        # A stain that is not there has nothing to be brought to the target's strength.
        scale = torch.where(strongest > _TINY, self.max_concentration / strongest, torch.ones_like(strongest))
        amounts = amounts * scale[:, None]
        return Stained(
            *(self._shown(self.stain_matrix[:, which], amounts[which], image) for which in ([0, 1], [0], [1]))
        )

    def _stains(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """S, C and M of an image, or None where there is too little tissue."""
        density = optical_density(image, self.light)
        tissue = density[:, (density >= self.beta).all(0)]
        if tissue.shape[1] < self.least_pixels:
            return None
        stains = stain_colours(tissue, self.alpha)
        amounts = concentrations(density, stains)
        return stains, amounts, torch.quantile(amounts, self.percentile / 100, dim=1)

    def _shown(self, stains: Tensor, amounts: Tensor, like: Tensor) -> Tensor:
        light = self.light * torch.exp(-(stains @ amounts))
        return light.clamp_max(255).T.reshape(like.shape).to(torch.uint8)


class ReinhardNormalizer:
    """Gives an image the mean and the deviation of a target's colours; `fit` it first.

    Args:
        method: None, or "modified", which moves the colours and only stretches the lightness.
        least_stretch: q of the modified form where the target varies less than the image.

    Raises:
        BadInput: there is no such method.
    """

    def __init__(self, method: str | None = None, *, least_stretch: float = 0.05):
        if method not in (None, "modified"):
            raise BadInput(f"ReinhardNormalizer: method is {method!r}: choose None or 'modified'")
        self.method, self.least_stretch = method, least_stretch
        self.mean: Tensor | None = None
        self.deviation: Tensor | None = None

    def fit(self, image: Tensor) -> Self:
        """Take the colours of a target image.

        Raises:
            BadInput: it is no (h, w, 3) image of uint8.
        """
        colours = to_lab(_checked(image, "ReinhardNormalizer"))
        self.mean, self.deviation = colours.mean((0, 1)), colours.std((0, 1), correction=0)
        return self

    def __call__(self, image: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The normalized image. Nothing is drawn: `generator` is what every transform takes.

        Raises:
            BadInput: there is no target, or it is no (h, w, 3) image of uint8.
        """
        if self.mean is None or self.deviation is None:
            raise BadInput("ReinhardNormalizer: it has no target: call fit(image) first")
        colours = to_lab(_checked(image, "ReinhardNormalizer"))
        mean, deviation = colours.mean((0, 1)), colours.std((0, 1), correction=0)
        if self.method is None:
            # A channel that does not vary has only a mean to be moved.
            stretch = torch.where(deviation > _TINY, self.deviation / deviation, torch.ones_like(deviation))
            return from_lab((colours - mean) * stretch + self.mean)
        target, own = self.deviation[0].item(), deviation[0].item()
        more = (target - own) / target if target > own else self.least_stretch
        centre = torch.cat([mean[:1], self.mean[1:]])
        return from_lab((colours - mean) * colours.new_tensor([1 + more, 1, 1]) + centre)


def to_lab(image: Tensor) -> Tensor:
    """CIE Lab of a (h, w, 3) image in sRGB: float64, L in [0, 255], a and b around 128."""
    rgb = image.double() / 255
    rgb = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = rgb @ rgb.new_tensor(_XYZ).T / rgb.new_tensor(_WHITE)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([(116 * y - 16) * 2.55, 500 * (x - y) + 128, 200 * (y - z) + 128], -1)


def from_lab(colours: Tensor) -> Tensor:
    """The image of `to_lab`'s colours: uint8, clipped to what can be shown, and cut to whole numbers."""
    lightness, a, b = (colours - colours.new_tensor([0, 128, 128])).unbind(-1)
    y = (lightness / 2.55 + 16) / 116
    xyz = torch.stack([y + a / 500, y, (y - b / 200).clamp_min(0)], -1)
    xyz = torch.where(xyz > 0.2068966, xyz**3, (xyz - 16 / 116) / 7.787) * xyz.new_tensor(_WHITE)
    rgb = xyz @ torch.linalg.inv(xyz.new_tensor(_XYZ)).T
    rgb = torch.where(rgb > 0.0031308, 1.055 * rgb.clamp_min(0) ** (1 / 2.4) - 0.055, 12.92 * rgb)
    # Rounding may leave a whole number a little below itself, and it must not be cut to the one before.
    return (rgb.clamp(0, 1) * 255 + 1e-6).to(torch.uint8)


def group_collapse(features: Tensor, groups: Tensor) -> Collapse:
    """How far features (n, d) say which of several groups (n,) each example is from.

    Raises:
        BadInput: the shapes do not fit, there is only one group, or a group has only one example.
    """
    if features.ndim != 2 or groups.shape != features.shape[:1]:
        raise BadInput(f"group_collapse: features {tuple(features.shape)} and groups {tuple(groups.shape)} do not fit")
    names, index, counts = groups.unique(return_inverse=True, return_counts=True)
    if len(names) < 2 or counts.min() < 2:
        raise BadInput(f"group_collapse: groups of {counts.tolist()} examples: two groups of two are the least")
    x = features.double()
    member = torch.nn.functional.one_hot(index, len(names)).double()
    means = member.T @ x / counts[:, None]
    centred = x - x.mean(0)
    total = centred.square().sum()
    between = (counts[:, None] * (means - x.mean(0)).square()).sum()
    distance = torch.cdist(x, x)
    sums = distance @ member
    own = sums.gather(1, index[:, None])[:, 0] / (counts[index] - 1)  # an example is no neighbour of its own
    other = (sums / counts).scatter(1, index[:, None], torch.inf).amin(1)
    nearest = distance.fill_diagonal_(torch.inf).argmin(1)
    return Collapse(
        explained=(between / total.clamp_min(_TINY)).item(),
        silhouette=((other - own) / torch.maximum(own, other).clamp_min(_TINY)).mean().item(),
        retrieved=(index[nearest] == index).double().mean().item(),
    )


def _checked(image: Tensor, who: str) -> Tensor:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.numel():
        raise BadInput(f"{who}: a (h, w, 3) image of uint8 is needed, found {tuple(image.shape)} of {image.dtype}")
    return image


CARD = Card(
    id="stain",
    title="Enhancing Whole Slide Pathology Foundation Models through Stain Normalization",
    authors="Yun, Hu, Kim, Jang, Lee",
    year=2024,
    source="arXiv 2408.00380",
    family="norm",
    summary="Brings the colours of histology images from different laboratories to those of a target image.",
    objects={"MacenkoNormalizer": "Data", "ReinhardNormalizer": "Data"},
    traits={"MacenkoNormalizer": ("transform",), "ReinhardNormalizer": ("transform",)},
    use="Slides of laboratories that the network was not trained on, stained with hematoxylin and eosin.",
    avoid="Images where colour itself tells the classes apart, or of other stains than those of the target.",
    vectors=("stain",),
    code="torchstain, EIDOSLAB, MIT (the paper has none)",
    claim={
        "text": "Normalizing stains makes a network recognize tissue better on slides that were stained elsewhere.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.01,
        "arms": ("none", "macenko"),
        "seeds": 5,
        "minutes": 3,
        "task": "digits",
    },
)
