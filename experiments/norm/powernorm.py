"""The claim of `powernorm`: a character transformer with PowerNorm, and with batch norm over all characters of a batch.

Both arms train the baseline network, its LayerNorms replaced, on the same text in the same order. The paper's warm-up
is shortened as the training is.
"""

from __future__ import annotations

from torch import Tensor, nn

from laconic.core.surgery import swap
from laconic.norm import PowerNorm
from laconic.tasks.small import small

STEPS, WARM = 300, 50


class CharacterBatchNorm(nn.BatchNorm1d):
    """Batch norm of (n, t, channels) over n and t."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character on the test text of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed)
    model = task.model(seed)
    if arm == "batchnorm":
        swap(model, nn.LayerNorm, lambda norm: CharacterBatchNorm(*norm.normalized_shape))
    else:
        swap(model, nn.LayerNorm, lambda norm: PowerNorm(*norm.normalized_shape, warmup_iters=WARM))
    task.train(model, seed, steps=5 if quick else STEPS)
    return task.evaluate(model).value
