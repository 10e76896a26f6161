"""The claim of `neural_redshift`: how much more complex random networks become as their weights grow.

Both arms draw the same weights and biases from U(-a, a), for perceptrons of two inputs, three hidden layers of 64 and
one output; eight networks a seed, on a grid of 96 by 96.
"""

from __future__ import annotations

import torch

from laconic.norm import RandomNetwork, complexity, redraw_

LOW, HIGH, NETWORKS, GRID, DIMS = 0.3, 10.0, 8, 96, (2, 64, 64, 64, 1)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Rise of the mean frequency of one arm; `quick` tests the code and shows nothing."""
    rises = []
    for number in range(1 if quick else NETWORKS):
        low, high = (
            complexity(
                redraw_(RandomNetwork(DIMS, arm), amplitude, torch.Generator().manual_seed(100 * seed + number)),
                grid=24 if quick else GRID,
            )
            for amplitude in (LOW, HIGH)
        )
        rises.append(high - low)
    return sum(rises) / len(rises)
