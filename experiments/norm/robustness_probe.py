"""The claim of `robustness_probe`: what noise leaves of the accuracy of a network with batch or with group normalization.

Both arms are trained alike on clean images; groups have four channels. The noises are those of the probe at severities
2 and 4.
"""

from __future__ import annotations

from torch import nn

from laconic.norm import RobustnessProbe
from laconic.tasks.small import small

NOISES, SEVERITIES, IMAGES = ("gaussian_noise", "shot_noise", "impulse_noise"), (2, 4), 1000
RANGE = (-0.4242, 2.8215)  # black and white in standardised pixels


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Relative performance under corruption of one arm; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=200 if quick else None)
    model = task.model(seed)
    if arm == "groupnorm":
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(path, nn.GroupNorm(module.num_features // 4, module.num_features))
    task.train(model, seed, epochs=1 if quick else None)
    images, labels = (column[: 40 if quick else IMAGES] for column in task.data["test"].columns)
    probe = RobustnessProbe(NOISES, SEVERITIES, value_range=RANGE, scale="large", seed=seed)
    return probe(model, (images, labels)).rpc
