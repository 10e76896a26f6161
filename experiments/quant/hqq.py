"""The claim of `hqq`: a character model with the weights of its linear layers in 3 bits, a scale and a zero point for each 64.

Both arms train the same model and round the same weights. Zero points of the arm "hqq" are stored in 16 bits, those of "rtn" in
3: 3.5 bits a weight against 3.3.
"""

from __future__ import annotations

from torch import nn

from laconic.numerics import Scheme, fake_quantize
from laconic.tasks.small import small

WINDOWS = 4000
SCHEMES = {
    "rtn": Scheme.parse("v1/int3/group64/float16/minmax/zint/nearest"),
    "hqq": Scheme.parse("v1/int3/group64/float16/hqq/zreal/nearest"),
}


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    for path, layer in model.eval().named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = fake_quantize(layer.weight.detach(), SCHEMES[arm], path)
    return task.evaluate(model).value
