"""The claim of `layer_bits`: a character model of six blocks at 4 bits, more and more of them moved to 2 bits.

Both arms train the same model, and round the weights of its blocks to nearest in groups of 32. They differ in which
blocks go first: those of least LIM on 64 windows of the training part, or in an order that is drawn.
"""

from __future__ import annotations

import torch

from laconic.quant import LayerBits
from laconic.quant._rounded import rounded, scheme_of, weights_of
from laconic.tasks.small import small
from laconic.tasks.small.networks import CharacterModel

WINDOWS, CALIBRATION = 1600, 64
LAYERS, WIDTH, GROUP, HIGH, LOW = 6, 32, 32, 4, 2


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character, the mean over one to all but one blocks at 2 bits; `quick` shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    torch.manual_seed(seed)
    model = CharacterModel(len(task.alphabet) + 1, 64, width=WIDTH, layers=LAYERS)
    task.train(model, seed)
    model.eval()
    found = LayerBits()(model, task.data["train"].columns[0][:CALIBRATION])
    if arm == "lim":
        order = sorted(range(LAYERS), key=lambda i: found.table[i]["lim"])
    else:
        order = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed)).tolist()
    paths = [row["block"] for row in found.table]
    weights = weights_of(model, paths)
    scores = []
    for moved in (1,) if quick else range(1, LAYERS):
        low = {name for i in order[:moved] for name in found.names[paths[i]]}
        schemes = {name: scheme_of(LOW if name in low else HIGH, GROUP) for name in weights}
        with rounded(weights, schemes):
            scores.append(task.evaluate(model).value)
    return sum(scores) / len(scores)
