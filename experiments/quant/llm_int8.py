"""The claim of `llm_int8`: a character model with two planted outlier features, its linear layers in 8-bit integers.

Both arms train the same model. Then two channels of every norm that feeds linear layers are multiplied by 30, and the
columns that read them divided by 30, which changes nothing of the function. The arms differ in the threshold: 0, or 6.
"""

from __future__ import annotations

import torch

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.quant import LLMInt8, smooth_norm
from laconic.tasks.small import small

WINDOWS, FACTOR, PLANTED = 4000, 30.0, 2
THRESHOLDS = {"vector-wise": 0.0, "decomposed": 6.0}


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    model.eval()
    structure = Structure.build(model, ((task.data["train"].columns[0][:2],), {}))
    generator = torch.Generator().manual_seed(seed)
    for norm, readers in structure.norms.items():
        if readers.complete:
            width = model.get_submodule(norm).weight.numel()
            scale = torch.ones(width)
            scale[torch.randperm(width, generator=generator)[:PLANTED]] = 1 / FACTOR
            smooth_norm(model, structure, norm, scale)
    run_pass(LLMInt8(THRESHOLDS[arm], skip=()), Context(model, structure, seed=seed))
    return task.evaluate(model).value
