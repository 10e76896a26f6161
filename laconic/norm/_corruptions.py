"""The fifteen corruptions of ImageNet-C, drawn in numpy and torch, each image from a seed of its own.

    noise     gaussian_noise  shot_noise  impulse_noise
    blur      defocus_blur  glass_blur  motion_blur  zoom_blur
    weather   snow  frost  fog  brightness
    digital   contrast  elastic_transform  pixelate  jpeg_compression

Severities 1 to 5 are the published ones, in two sets: for photographs of about 224 pixels, and for small pictures of up
to 64 (those of CIFAR-10-C), where the same radius would leave nothing to see. Snow, frost and fog are drawn from fractal
noise, so no picture is needed; frost, for which the original pastes photographs of frost, is the least like it. Glass
really swaps pixels. JPEG is the lossy part of it: colour conversion, half-sized colour, the quantized cosine transform.

Source: "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", Hendrycks, Dietterich, 2019,
arXiv 1903.12261; the parameters are those of hendrycks/robustness (Apache-2.0), of which no code was used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import fft, ndimage
from torch import Tensor
from torch.nn import functional as F

from laconic.errors import BadInput

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in GROUPS.values() for name in names)
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
SMALL_SIDE = 64  # pixels; up to here the parameters for small pictures hold

Level = tuple[float, ...]
Rngs = Sequence[np.random.Generator]

# What the numbers mean is said by the parameters of the functions below, in their order.
LARGE: dict[str, tuple[Level, ...]] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
}  # fmt: skip
SMALL: dict[str, tuple[Level, ...]] = {
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
}  # fmt: skip


def corrupt(images: Tensor, name: str, severity: int, seeds: Sequence[int], scale: str = "auto") -> Tensor:
    """Corrupted images, of the same shape and in [0, 1]; an image depends on its own seed alone.

    Args:
        images: (n, 1 or 3, h, w) in [0, 1].
        name: one of `CORRUPTIONS`.
        severity: 1 to 5; 0 returns the images.
        seeds: n of them.
        scale: "small" or "large", the set of parameters; "auto" takes the small one up to 64 pixels.

    Raises:
        BadInput: a name, severity or scale that there is not, or other shapes.
    """
    table = check(name, severity, scale)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(seeds) != len(images):
        raise BadInput(
            f"{name}: images are (n, 1 or 3, h, w) with n seeds, not {tuple(images.shape)} with {len(seeds)}"
        )
    if severity == 0 or not len(images):
        return images.clone()
    if table is None:
        table = SMALL if min(images.shape[2:]) <= SMALL_SIDE else LARGE
    rngs = [np.random.default_rng(seed) for seed in seeds]
    x = images.detach().cpu().float().numpy()
    found = FUNCTIONS[name](x, rngs, *table[name][severity - 1])
    return torch.from_numpy(np.ascontiguousarray(found, np.float32)).clamp_(0, 1).to(images)


def check(name: str, severity: int, scale: str) -> dict[str, tuple[Level, ...]] | None:
    """The table that `scale` names, None for "auto", once all three are known to exist."""
    if name not in CORRUPTIONS:
        raise BadInput(f"there is no corruption {name!r}: there are {', '.join(CORRUPTIONS)}")
    if severity not in range(6):
        raise BadInput(f"{name}: the severity is 1 to 5 (0 changes nothing), not {severity}")
    if scale not in ("auto", "small", "large"):
        raise BadInput(f"{name}: the scale is auto, small or large, not {scale!r}")
    return {"small": SMALL, "large": LARGE}.get(scale)


# --- noise ------------------------------------------------------------------------------------------


def gaussian_noise(x: np.ndarray, rngs: Rngs, deviation: float) -> np.ndarray:
    return x + deviation * _normal(rngs, x.shape[1:])


def shot_noise(x: np.ndarray, rngs: Rngs, photons: float) -> np.ndarray:
    """`photons` reach a white pixel."""
    return np.stack([rng.poisson(image * photons) for rng, image in zip(rngs, x, strict=True)]) / photons


def impulse_noise(x: np.ndarray, rngs: Rngs, share: float) -> np.ndarray:
    """A share of all values becomes black or white."""
    drawn = _uniform(rngs, x.shape[1:])
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


# --- blur -------------------------------------------------------------------------------------------


def defocus_blur(x: np.ndarray, rngs: Rngs, radius: float, alias: float) -> np.ndarray:
    """A disk, its edge softened."""
    reach = math.ceil(radius) + 2
    at = np.arange(-reach, reach + 1)
    disk = (at[:, None] ** 2 + at[None, :] ** 2 <= radius**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), alias, mode="constant", radius=1 if radius <= 8 else 2)
    return ndimage.convolve(x, (kernel / kernel.sum())[None, None], mode="mirror")


def glass_blur(x: np.ndarray, rngs: Rngs, deviation: float, reach: float, rounds: float) -> np.ndarray:
    """Pixels change places with neighbours, between two slight blurs."""
    blurred, d = _blur(x, deviation), int(reach)
    n, _, height, width = x.shape
    rows, columns, each = range(height - 1 - d, d - 1, -1), range(width - 1 - d, d - 1, -1), np.arange(n)
    moves = np.stack([rng.integers(-d, d + 1, (int(rounds), height, width, 2)) for rng in rngs])
    for i in range(int(rounds)):
        for r in rows:
            for c in columns:
                to_r, to_c = r + moves[:, i, r, c, 0], c + moves[:, i, r, c, 1]
                here = blurred[:, :, r, c].copy()
                blurred[:, :, r, c] = blurred[each, :, to_r, to_c]
                blurred[each, :, to_r, to_c] = here
    return _blur(blurred, deviation)


def motion_blur(x: np.ndarray, rngs: Rngs, radius: float, deviation: float) -> np.ndarray:
    return _moved(x, np.array([rng.uniform(-45, 45) for rng in rngs]), radius, deviation)


def zoom_blur(x: np.ndarray, rngs: Rngs, most: float, step: float) -> np.ndarray:
    """The mean over zooms from 1 to less than `most`, and the picture."""
    zooms = np.arange(1, most, step)
    return (x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


# --- weather ----------------------------------------------------------------------------------------


def snow(
    x: np.ndarray, rngs: Rngs, mean: float, deviation: float, zoom: float, least: float, radius: float, blur: float,
    share: float,
) -> np.ndarray:  # fmt: skip
    """Flakes: what of normal noise exceeds `least`, enlarged and falling; the picture is whitened to 1 - `share`."""
    flakes = mean + deviation * _normal(rngs, (1, *x.shape[2:]))
    flakes = _zoomed(flakes, zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _moved(flakes, np.array([rng.uniform(-135, -45) for rng in rngs]), radius, blur)
    white = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return share * x + (1 - share) * white + flakes + flakes[:, :, ::-1, ::-1]


def frost(x: np.ndarray, rngs: Rngs, share: float, strength: float) -> np.ndarray:
    """Crystals: the ridges of fractal noise, a little blue."""
    ridges = (1 - np.abs(2 * _fractal(rngs, x.shape[2:], 1.6) - 1)) ** 2
    tint = np.array([0.85, 0.95, 1.0] if x.shape[1] == 3 else [0.95]).reshape(1, -1, 1, 1)
    return share * x + strength * tint * (0.25 + 0.75 * ridges)


def fog(x: np.ndarray, rngs: Rngs, strength: float, decay: float) -> np.ndarray:
    most = x.max((1, 2, 3), keepdims=True)
    return (x + strength * _fractal(rngs, x.shape[2:], decay)) * most / (most + strength)


def brightness(x: np.ndarray, rngs: Rngs, more: float) -> np.ndarray:
    """More of the value in HSV; hue and saturation stay."""
    value = x.max(1, keepdims=True)
    to = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * to / np.maximum(value, 1e-6), to)


# --- digital ----------------------------------------------------------------------------------------


def contrast(x: np.ndarray, rngs: Rngs, share: float) -> np.ndarray:
    mean = x.mean((2, 3), keepdims=True)
    return (x - mean) * share + mean


def elastic_transform(x: np.ndarray, rngs: Rngs, strength: float, smooth: float, affine: float) -> np.ndarray:
    """An affine map of three points and a smooth field; all lengths are shares of the shorter side."""
    n, _, height, width = x.shape
    side = min(height, width)
    # In units of the grid, whose side is 2: corners of the middle third, moved by up to `affine` of the side.
    corners = np.array([[-1, -1], [1, -1], [-1, 1]]) / 1.5
    moved = corners + np.stack([rng.uniform(-2 * affine, 2 * affine, (3, 2)) for rng in rngs])
    homogeneous = np.concatenate([corners, np.ones((3, 1))], 1)
    matrix = np.stack([np.linalg.solve(homogeneous, points).T for points in moved])
    grid = F.affine_grid(torch.from_numpy(matrix).float(), [n, 1, height, width], align_corners=False)
    if strength:
        field = np.stack([rng.uniform(-1, 1, (2, height, width)) for rng in rngs])
        field = ndimage.gaussian_filter(field, (0, 0, smooth * side, smooth * side), mode="reflect", truncate=3)
        grid = grid + 2 * strength * torch.from_numpy(field).float().permute(0, 2, 3, 1)
    return F.grid_sample(torch.from_numpy(x), grid, padding_mode="reflection", align_corners=False).numpy()


def pixelate(x: np.ndarray, rngs: Rngs, share: float) -> np.ndarray:
    """The mean over each of fewer, larger pixels."""
    size = [max(1, int(side * share)) for side in x.shape[2:]]
    small = np.einsum("ih,nchw,jw->ncij", _areas(x.shape[2], size[0]), x, _areas(x.shape[3], size[1]), optimize=True)
    return F.interpolate(torch.from_numpy(small), x.shape[2:], mode="nearest-exact").numpy()


def jpeg_compression(x: np.ndarray, rngs: Rngs, quality: float) -> np.ndarray:
    height, width = x.shape[2:]
    block = 16 if x.shape[1] == 3 else 8
    bytes_ = np.round(255 * np.pad(x, ((0, 0), (0, 0), (0, -height % block), (0, -width % block)), mode="edge"))
    if x.shape[1] == 1:
        return (_quantized(bytes_ - 128, LUMA, quality) + 128)[:, :, :height, :width] / 255
    ycc = np.einsum("ij,njhw->nihw", TO_YCC, bytes_)
    light = _quantized(ycc[:, :1] - 128, LUMA, quality) + 128
    n, _, tall, wide = ycc.shape
    halves = ycc[:, 1:].reshape(n, 2, tall // 2, 2, wide // 2, 2).mean((3, 5))
    colour = _quantized(halves, CHROMA, quality).repeat(2, 2).repeat(2, 3)
    whole = np.concatenate([light, colour], 1)[:, :, :height, :width]
    return np.round(np.einsum("ij,njhw->nihw", np.linalg.inv(TO_YCC), whole)) / 255


TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
# The tables of Annex K of the JPEG standard, for quality 50.
LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def _quantized(planes: np.ndarray, table: np.ndarray, quality: float) -> np.ndarray:
    """Planes (n, k, h, w) around 0, through the cosine transform of 8 x 8 blocks and its quantization."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = np.clip(np.floor((table * scale + 50) / 100), 1, 255)
    n, k, height, width = planes.shape
    blocks = planes.reshape(n, k, height // 8, 8, width // 8, 8)
    spectrum = fft.dctn(blocks, axes=(3, 5), norm="ortho")
    steps = steps[:, None, :]
    return fft.idctn(np.round(spectrum / steps) * steps, axes=(3, 5), norm="ortho").reshape(planes.shape)


def _areas(old: int, new: int) -> np.ndarray:
    """(new, old): which share of a new pixel each old one is."""
    edges = np.arange(new + 1) * old / new
    at = np.arange(old)
    shared = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return np.clip(shared, 0, None) * new / old


# --- what they share --------------------------------------------------------------------------------


def _normal(rngs: Rngs, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])


def _uniform(rngs: Rngs, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([rng.random(shape, np.float32) for rng in rngs])


def _grey(x: np.ndarray) -> np.ndarray:
    weights = TO_YCC[0] if x.shape[1] == 3 else np.ones(1)
    return np.einsum("j,njhw->nhw", weights, x)[:, None]


def _blur(x: np.ndarray, deviation: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, 0, deviation, deviation), mode="nearest")


def _zoomed(x: np.ndarray, zoom: float) -> np.ndarray:
    """Enlarged about the middle, of the same size."""
    n, _, height, width = x.shape
    matrix = torch.tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]], dtype=torch.float32).expand(n, 2, 3)
    grid = F.affine_grid(matrix, [n, 1, height, width], align_corners=False)
    tensor = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    return F.grid_sample(tensor, grid, padding_mode="border", align_corners=False).numpy()


def _moved(x: np.ndarray, angles: np.ndarray, radius: float, deviation: float) -> np.ndarray:
    """Each picture drawn out in its direction (degrees), by a half Gaussian of 2 radius + 1 pixels."""
    n, channels, height, width = x.shape
    places = np.arange(2 * int(radius) + 1)
    weights = np.exp(-(places**2) / (2 * deviation**2))
    turned = np.deg2rad(angles)
    each, channel = np.arange(n)[:, None, None, None], np.arange(channels)[None, :, None, None]
    total = np.zeros_like(x)
    for place, weight in zip(places, weights / weights.sum(), strict=True):
        down, right = np.round(place * np.sin(turned)).astype(int), np.round(place * np.cos(turned)).astype(int)
        rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)[:, None, :, None]
        columns = np.clip(np.arange(width) + right[:, None], 0, width - 1)[:, None, None, :]
        total += weight * x[each, channel, rows, columns]
    return total


def _fractal(rngs: Rngs, size: tuple[int, ...], decay: float) -> np.ndarray:
    """(n, 1, h, w) in [0, 1]: random grids, each twice as fine and `decay` times as faint as the one before."""
    total = torch.zeros(len(rngs), 1, *size)
    for octave in range(1, max(2, math.ceil(math.log2(max(size))) + 1)):
        points = 2**octave + 1
        grid = torch.from_numpy(_uniform(rngs, (1, points, points)))
        total += decay**-octave * F.interpolate(grid, list(size), mode="bilinear", align_corners=True)
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return ((total - low) / (high - low).clamp(min=1e-6)).numpy()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur, "glass_blur": glass_blur, "motion_blur": motion_blur, "zoom_blur": zoom_blur,
    "snow": snow, "frost": frost, "fog": fog, "brightness": brightness, "contrast": contrast,
    "elastic_transform": elastic_transform, "pixelate": pixelate, "jpeg_compression": jpeg_compression,
}  # fmt: skip

CARD = None  # a part of `robustness_probe`
