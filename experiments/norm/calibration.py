"""The claim of `calibration`: the temperature that 1,000 held-out images give, on 2,000 others.

Both arms train the same perceptron on 300 images for 60 epochs, until it is right on all of them and surer than it
should be. The arm "temperature" divides its logits by T.
"""

from __future__ import annotations

import math

from laconic.norm import CalibrationProbe, TemperatureScaling
from laconic.tasks.small import small

IMAGES, EPOCHS = 300, 60


def run(arm: str, seed: int, quick: bool = False) -> float:
    """log2 of the expected calibration error of one arm; `quick` tests the code and shows nothing."""
    task = small("mnist-mlp", seed=seed, size=50 if quick else IMAGES)
    model = task.model(seed)
    task.train(model, seed, epochs=5 if quick else EPOCHS)
    probe = CalibrationProbe(15, {"temperature": TemperatureScaling()})
    table = probe(model, task.data["test"].columns, fit_on=task.data["validate"].columns).table
    return math.log2(next(row["ece"] for row in table if row["method"] == {"as trained": "as it is"}.get(arm, arm)))
