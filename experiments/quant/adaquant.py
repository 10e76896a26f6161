"""The claim of `adaquant`: a small network for digits in 3-bit weights and 4-bit activations, by 100 training images.

Both arms train the same network, fold its batch norms and set the same first ranges from 100 images. The arm "sequential"
then trains each layer's weights, bias and ranges on the outputs that the float layer gave, one layer after the other. The
first layer keeps its 8-bit inputs.
"""

from __future__ import annotations

import copy

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.norm import FoldBatchNorm
from laconic.quant import adaquant
from laconic.tasks.small import small

TRAINED_ON, IMAGES, STEPS = 2000, 100, 500
WEIGHTS, INPUTS = 3, 4


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=256 if quick else TRAINED_ON)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if quick else None)
    model.eval()
    images = task.data["train"].columns[0][:IMAGES]
    run_pass(FoldBatchNorm(), Context(model, Structure.build(model, ((images[:2],), {})), seed=seed))
    layers = [path for path, module in model.named_modules() if hasattr(module, "weight")]
    bits = {path: 8 if path == layers[0] else INPUTS for path in layers}
    steps = 0 if arm == "rtn" else 10 if quick else STEPS
    adaquant(model, [images], WEIGHTS, input_bits=bits, steps=steps, teacher=copy.deepcopy(model), seed=seed)
    return task.evaluate(model).value
