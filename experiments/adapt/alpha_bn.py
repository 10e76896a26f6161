"""The claim of `alpha_bn`: corrupted images in batches of four, the training's statistics alone against nine tenths of
them and a tenth of the batch's.

Both arms are the same network, trained on clean images. The test images are under noise, blur, weather and contrast at
severity 4, in an order without a plan.
"""

from __future__ import annotations

import torch

from laconic.adapt import AlphaBN
from laconic.norm import Corruption
from laconic.tasks.small import small

CORRUPTIONS = ("gaussian_noise", "impulse_noise", "motion_blur", "snow", "fog", "brightness", "contrast")
RANGE = (-0.4242, 2.8215)  # black and white in standardised pixels
SEVERITY, BATCH, IMAGES, SHARE = 4, 4, 500, 0.9


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean accuracy of one arm; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=200 if quick else None)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if quick else None)
    images, labels = (column[: 40 if quick else IMAGES] for column in task.data["test"].columns)
    model.eval()
    hits = []
    with AlphaBN.attach(model, source_weight=1.0 if arm == "source" else SHARE) as attached:
        for number, name in enumerate(CORRUPTIONS):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            changed = Corruption(name, SEVERITY, value_range=RANGE, scale="large")(images, generator=generator)
            answers = torch.cat([attached.update(part).argmax(1) for part in changed.split(BATCH)])
            hits.append((answers == labels).double().mean())
            attached.reset()
    return float(torch.stack(hits).mean())
