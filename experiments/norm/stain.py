"""The claim of `stain`: a classifier trained on slides of two laboratories, tested on slides of others.

A slide is a mosaic of handwritten digits. A digit's pixels are the concentration of hematoxylin, noise is that of
eosin, and Beer and Lambert's law with the slide's own stain colours and strengths gives the image. All training slides
come from two laboratories; every test slide has one of its own. With the method, each slide is brought to the look of
the first training slide before the digits are cut out of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.norm import MacenkoNormalizer
from laconic.tasks.small import Rows, small
from laconic.tasks.small.networks import mlp

SIDE, PER_SLIDE = 8, 64  # pixels of a digit; digits of a slide
LABORATORIES = 2
STAINS = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
LIGHT = 240.0
COLOUR, STRENGTH = 0.12, 0.35  # how far laboratories differ: deviation of a stain's colour, of the log of its strength


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=200 if quick else None)
    generator = torch.Generator().manual_seed(seed)
    laboratories = [laboratory(generator) for _ in range(LABORATORIES)]
    data = {}
    normalizer = None
    for split in ("train", "test"):
        pixels, labels = task.data[split].columns
        slides = []
        for number, digits in enumerate(pixels.split(PER_SLIDE)):
            colours = laboratories[number % LABORATORIES] if split == "train" else laboratory(generator)
            image = slide(digits, colours, generator)
            if arm == "macenko":
                normalizer = normalizer or MacenkoNormalizer(light=LIGHT).fit(image)
                image = normalizer(image)
            slides.append(cut(image, len(digits)))
        data[split] = Rows(torch.cat(slides), labels)
    task.data = {**task.data, **data}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp(3 * SIDE * SIDE, (64,), 10)
    task.train(model, seed, epochs=1 if quick else None)
    return task.evaluate(model).value


def laboratory(generator: torch.Generator) -> Tensor:
    """Its stains (3, 2): directions around the usual ones, times strengths around 1."""
    drawn = torch.tensor(STAINS) + COLOUR * torch.randn(3, 2, generator=generator)
    strengths = torch.exp(STRENGTH * torch.randn(2, generator=generator))
    colours = drawn.clamp_min(0.05)
    return colours / colours.norm(dim=0) * strengths


def slide(digits: Tensor, stains: Tensor, generator: torch.Generator) -> Tensor:
    """The image (h, w, 3) of n digits (n, 64), one below the other."""
    eosin = 0.3 + 0.3 * torch.rand(digits.shape, generator=generator)
    amounts = torch.stack([1.5 * digits.reshape(-1), eosin.reshape(-1)])
    light = LIGHT * torch.exp(-(stains @ amounts)).T
    return light.clamp(0, 255).round().to(torch.uint8).reshape(len(digits) * SIDE, SIDE, 3)


def cut(image: Tensor, count: int) -> Tensor:
    """The digits of a slide again: (n, 192), around 0."""
    return image.reshape(count, math.prod(image.shape) // count).float() / 127.5 - 1
