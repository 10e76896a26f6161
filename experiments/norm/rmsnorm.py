"""The claim of `rmsnorm`: what a training step costs with it, and with torch's LayerNorm in its place.

Both arms train the same character transformer with one thread; a step is timed in processor time, and the median over
steps is taken, so that what else the machine does matters little.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import nn

from laconic.core.hooks import Hook, Run
from laconic.norm import RMSNorm
from laconic.tasks.small import small

WARM = 5


class StepTimes(Hook):
    """Processor seconds from one step to the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self, run: Run) -> None:
        self.last = time.process_time()

    def step(self, run: Run) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = now


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Log of the seconds of a step."""
    task = small("chars", seed=seed)
    model = task.model(seed)
    if arm == "rmsnorm":
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm):
                model.set_submodule(path, RMSNorm(module.normalized_shape))
    times, threads = StepTimes(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task.train(model, seed, steps=WARM + (10 if quick else 120), hooks=[times])
    finally:
        torch.set_num_threads(threads)
    return math.log(statistics.median(times.seconds[WARM:]))
