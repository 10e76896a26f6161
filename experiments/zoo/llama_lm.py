"""The claim of `llama_lm`: the characters of Moby Dick, against the task's own transformer.

That one has layer norm, learned positions and a perceptron with GELU; both have two layers of width 64, four heads and
about as many parameters, and are trained by the task's recipe.
"""

from __future__ import annotations

import torch

from laconic.tasks.small import small
from laconic.zoo import LlamaLM, LlamaLMConfig


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=32 if quick else None)
    if arm == "gpt":
        model = task.model(seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaLM(LlamaLMConfig(len(task.alphabet) + 1, width=64, layers=2, heads=4))
    task.train(model, seed)
    return task.evaluate(model).value
