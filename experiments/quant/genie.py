"""The claim of `genie`: a small network for digits in 2-bit weights and 4-bit inputs, without a single real picture.

Both arms train the same network, make the same 64 pictures by its batch norms and fold these. Scales of weights and inputs
come from the same search. The arm "genie" then trains scales and roundings of each layer on these pictures. The first and
last layer have 8-bit weights, and the first 8-bit inputs, as in the paper. Steps are fewer than there, at rates larger by 20.
"""

from __future__ import annotations

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.norm import FoldBatchNorm
from laconic.quant import GenieRates, distilled_images, genie_reconstruct
from laconic.tasks.small import small

TRAINED_ON, PICTURES, MAKING, STEPS = 2000, 64, 100, 300
WIDTH = 32  # of the generator, for pictures of 28 x 28
RATES = GenieRates(rounding=2e-2, weight_scale=2e-3, input_scale=8e-4)
WEIGHTS, INPUTS = 2, 4


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=256 if quick else TRAINED_ON)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if quick else None)
    model.eval()
    shape = tuple(task.data["train"].columns[0].shape[1:])
    made = distilled_images(
        model, shape, 32 if quick else PICTURES, steps=3 if quick else MAKING, width=WIDTH, seed=seed
    )
    pictures = made.inputs
    run_pass(FoldBatchNorm(), Context(model, Structure.build(model, ((pictures[:2],), {})), seed=seed))
    layers = [path for path, module in model.named_modules() if hasattr(module, "weight")]
    weights = {path: 8 if path in (layers[0], layers[-1]) else WEIGHTS for path in layers}
    inputs = {path: 8 if path == layers[0] else INPUTS for path in layers}
    steps = 0 if arm == "rtn" else 10 if quick else STEPS
    genie_reconstruct(model, [pictures], weights, input_bits=inputs, steps=steps, rates=RATES, seed=seed)
    return task.evaluate(model).value
