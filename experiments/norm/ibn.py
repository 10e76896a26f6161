"""The claim of `ibn`: digits trained on as they are, and tested on with another contrast and brightness.

Both arms have the baseline network of the task and its training; in one of them both batch norms are IBN.
"""

from __future__ import annotations

from laconic.norm import to_ibn
from laconic.tasks.small import Rows, small

# Of the standardised pixels: what they are multiplied by, and what is added.
CHANGES = ((0.4, 0.0), (0.4, 1.0), (1.0, 1.0), (1.5, -0.5))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean accuracy on the test images under each change, after one pass over 2,000 unchanged ones."""
    task = small("mnist-cnn", seed=seed, size=100 if quick else 2000)
    model = task.model(seed)
    if arm == "ibn":
        to_ibn(model, where="*")
    task.train(model, seed, epochs=1)
    images, labels = task.data["test"].columns
    values = []
    for contrast, brightness in CHANGES:
        task.data["test"] = Rows(contrast * images + brightness, labels)
        values.append(task.evaluate(model).value)
    return sum(values) / len(values)
