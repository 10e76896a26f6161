"""The claim of `lq_lora`: adapters on a character model whose weights are in 3 bits.

Both arms train the same model, store its linear layers in 3-bit NormalFloat with nested scales, blocks of 64, and train
adapters of rank 8 on further windows. The arms differ in the start: zero adapters, or the decomposition, without Fisher.
"""

from __future__ import annotations

import torch

from laconic.numerics import Levels, Scale, Scheme
from laconic.quant import NFConfig, lq_lora_, qlora_
from laconic.tasks.small import small

WINDOWS, MORE, RANK, LR, ITERATIONS = 4000, 800, 8, 2e-4, 30
NF3 = Scheme(Levels("nf3"), Scale("group", group=64))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arm == "lq_lora":
            lq_lora_(model, RANK, NFConfig(3), iterations=2 if quick else ITERATIONS)
        else:
            qlora_(model, RANK, alpha=RANK, scheme=NF3)
    more = small("chars", seed=seed + 1000, size=32 if quick else MORE)
    adapters = [p for p in model.parameters() if p.requires_grad]
    more.train(model, seed, optimizer=torch.optim.AdamW(adapters, LR), clip=0.3)
    return task.evaluate(model).value
