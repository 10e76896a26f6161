"""The claim of `jlcm`: a perceptron for digits, each weight an index of 2 bits into the codebook of its group of rows.

Both arms train the same network and start from the same codebooks, by k-means weighted by the inputs of 512 training images.
The arm "jlcm" then trains codebooks and indices on the outputs of each layer for these images.
"""

from __future__ import annotations

from laconic.quant import jlcm
from laconic.tasks.small import small

IMAGES, STEPS, BITS, GROUPS = 512, 1500, 2, 8


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("mnist-mlp", seed=seed, size=256 if quick else None)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if quick else None)
    model.eval()
    images = task.data["train"].columns[0][:IMAGES]
    jlcm(model, [images], BITS, groups=GROUPS, steps=0 if arm == "k-means" else 10 if quick else STEPS, seed=seed)
    return task.evaluate(model).value
