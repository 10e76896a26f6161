"""The claim of `rsq`: a character model rotated and rounded to 2 bits, its tokens counted alike or by attention."""

from __future__ import annotations

import torch

from laconic.numerics import Int, Scale, Scheme
from laconic.quant import rsq
from laconic.tasks.small import small
from laconic.zoo import LlamaLM, LlamaLMConfig

WINDOWS, CALIBRATION = 4000, 64
SCHEME = Scheme(Int(2), Scale("channel", rule="mse"))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaLM(LlamaLMConfig(len(task.alphabet) + 1, width=64, layers=2, heads=4, hidden=160))
    task.train(model, seed)
    windows = task.data["train"].columns[0][: 8 if quick else CALIBRATION]
    rsq(model.eval(), list(windows.split(16)), SCHEME, token_weight=arm, seed=seed)
    return task.evaluate(model).value
