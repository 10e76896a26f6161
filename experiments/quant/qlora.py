"""The claim of `qlora`: adapters on a character model whose weights are in 4 bits.

Both arms train the same model, pack its linear layers in blocks of 64, and train adapters of rank 8 on further windows. The
arms differ in the levels and the scales: 4-bit floats (e2m1) with plain scales, or NormalFloat with nested ones.
"""

from __future__ import annotations

import torch

from laconic.numerics import Levels, Scale, Scheme
from laconic.quant import qlora_
from laconic.tasks.small import small

WINDOWS, MORE, RANK, LR = 4000, 800, 8, 2e-4
FP4 = Scheme(Levels("fp4"), Scale("group", group=64))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arm == "nf4":
            qlora_(model, RANK)
        else:
            qlora_(model, RANK, scheme=FP4)
    more = small("chars", seed=seed + 1000, size=32 if quick else MORE)
    adapters = [p for p in model.parameters() if p.requires_grad]
    more.train(model, seed, optimizer=torch.optim.AdamW(adapters, LR), clip=0.3)
    return task.evaluate(model).value
