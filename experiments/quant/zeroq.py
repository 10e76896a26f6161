"""The claim of `zeroq`: a small network for digits in 4-bit weights and inputs, without a single real picture.

Both arms train the same network and make 32 pictures: noise N(0, 1), or pictures whose statistics its batch norms remember.
Then batch norms are folded, ranges of inputs are those seen on the pictures, and everything is rounded.
"""

from __future__ import annotations

import torch

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.norm import FoldBatchNorm
from laconic.quant import bn_matched_data, zeroq
from laconic.tasks.small import small

TRAINED_ON, PICTURES, STEPS, BITS = 2000, 32, 500, 4


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=256 if quick else TRAINED_ON)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if quick else None)
    model.eval()
    shape = tuple(task.data["train"].columns[0].shape[1:])
    if arm == "zeroq":
        pictures = bn_matched_data(model, shape, PICTURES, steps=5 if quick else STEPS, seed=seed).inputs
    else:
        pictures = torch.randn(PICTURES, *shape, generator=torch.Generator().manual_seed(seed))
    run_pass(FoldBatchNorm(), Context(model, Structure.build(model, ((pictures[:2],), {})), seed=seed))
    return task.evaluate(zeroq(model, [pictures], BITS, input_bits=BITS)).value
