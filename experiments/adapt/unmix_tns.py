"""The claim of `unmix_tns`: corrupted images that come sorted by class in batches of 16, normalized by each batch's
statistics, or by components.

Both arms are the same network, trained on clean images. The test images are under noise, blur, weather and contrast at
severity 4.
"""

from __future__ import annotations

import torch

from laconic.adapt import AlphaBN, UnMixTNS
from laconic.norm import Corruption
from laconic.tasks.small import small

CORRUPTIONS = ("gaussian_noise", "impulse_noise", "motion_blur", "snow", "fog", "brightness", "contrast")
RANGE = (-0.4242, 2.8215)  # black and white in standardised pixels
SEVERITY, BATCH, IMAGES = 4, 16, 500


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean accuracy of one arm; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=200 if quick else None)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if quick else None)
    images, labels = (column[: 40 if quick else IMAGES] for column in task.data["test"].columns)
    order = torch.argsort(labels, stable=True)
    images, labels = images[order], labels[order]
    model.eval()
    hits = []
    with (
        UnMixTNS.attach(model, batch_size=BATCH, seed=seed)
        if arm == "unmix_tns"
        else AlphaBN.attach(model, source_weight=0.0)
    ) as stream:
        for number, name in enumerate(CORRUPTIONS):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            changed = Corruption(name, SEVERITY, value_range=RANGE, scale="large")(images, generator=generator)
            answers = torch.cat([stream.update(part).argmax(1) for part in changed.split(BATCH)])
            hits.append((answers == labels).double().mean())
            stream.reset()
    return float(torch.stack(hits).mean())
