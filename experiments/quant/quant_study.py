"""The claim of `quant_study`: a character model in fp4 or nf4, at the temperatures where 4 bits were said to matter.

Both arms train the same model. Its own continuations of 32 windows of the test part, 4 of each, are what the divergence is
measured on.
"""

from __future__ import annotations

import math

import torch

from laconic.quant import QuantStudy
from laconic.tasks.small import small

WINDOWS, PROMPTS, PROMPT, TOKENS, SEEDS = 4000, 32, 16, 24, 4
TEMPERATURES = (0.5, 0.65, 0.8)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """log10 of the mean KL of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    rows = torch.randperm(len(task.data["test"]), generator=torch.Generator().manual_seed(seed))[:PROMPTS]
    prompts = task.data["test"].columns[0][rows, :PROMPT]
    study = QuantStudy((arm,), TEMPERATURES, max_new_tokens=2 if quick else TOKENS, seeds=1 if quick else SEEDS)
    table = study(model, prompts).table
    return math.log10(sum(row["kl"] for row in table) / len(table))
