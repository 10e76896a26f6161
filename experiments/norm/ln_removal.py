"""The claim of `ln_removal`: characters of Moby Dick without layer norms, removed one by one or all at once.

Both arms train the same Llama-like transformer with layer norms, four layers of width 48, for 220 steps. One then trains
for 130 steps more and loses a norm every few of them. The other trains as long with its norms, and loses them all at once
at the end, divided by their running averages. Both are folded: no norm is left in what is measured.
"""

from __future__ import annotations

import torch
from torch import nn

from laconic.norm import LayerNormRemover, RemovalSchedule
from laconic.tasks.small import small
from laconic.zoo import LlamaLM, LlamaLMConfig

FIRST, MORE = 220, 130
SCHEDULE = RemovalSchedule(start=10, gap_mlp=6, gap_attention=8, gap_last=6, gap_bos=10)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else None)
    first, more = (2, 2) if quick else (FIRST, MORE)
    schedule = SCHEDULE if arm == "scheduled" and not quick else RemovalSchedule(start=more, gap_mlp=0, gap_attention=0,
                                                                                gap_last=0, gap_bos=0)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaLMConfig(len(task.alphabet) + 1, 48, 4, heads=4)
        model = LlamaLM(config, norm=lambda width: nn.LayerNorm(width))
    task.train(model, seed, steps=first)
    remover = LayerNormRemover(
        model, schedule, n_ctx=64, example=((torch.zeros(1, 4, dtype=torch.long),), {}),
        aux_weight=0.1 if arm == "scheduled" else 0.0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    task.train(model, seed + 1, optimizer=optimizer, steps=more, hooks=[remover], clip=1.0)
    remover.fold()
    return task.evaluate(model).value
