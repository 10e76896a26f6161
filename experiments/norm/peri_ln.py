"""The claim of `peri_ln`: the characters of Moby Dick at a high learning rate, Peri-LN against Pre-LN.

Both arms are Llama-like, 8 layers of width 32, trained by Adam without weight decay for 220 steps, the first tenth of them
a warm-up to a learning rate of 3e-2; nothing but the placement differs.
"""

from __future__ import annotations

import torch

from laconic.tasks.small import small
from laconic.zoo import LlamaLM, LlamaLMConfig

LAYERS, WIDTH, STEPS, RATE = 8, 32, 220, 3e-2


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else None)
    steps = 3 if quick else STEPS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaLM(LlamaLMConfig(len(task.alphabet) + 1, WIDTH, LAYERS, heads=2, placement=arm))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))
    task.train(model, seed, optimizer=optimizer, schedule=warm, steps=steps)
    return task.evaluate(model).value
