"""The claim of `confidence_neurons`: how much of what neurons do to the loss the final norm mediates.

Both arms look at the same trained character transformer: at the five neurons of the last layer with the largest rho, or
at five random ones. The value is the mean over the five.
"""

from __future__ import annotations

from laconic.norm import ConfidenceNeurons
from laconic.tasks.small import small

TOP, TEXTS = 5, 64


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean share of one arm; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed)
    model = task.model(seed)
    task.train(model, seed, steps=5 if quick else 400)
    tokens = task.data["test"].columns[0][:TEXTS]
    table = ConfidenceNeurons(TOP, seed=seed)(model, tokens).table
    shares = [row["norm_mediated"] for row in table if row["kind"] == arm.partition(" ")[0]]
    return sum(shares) / len(shares)
