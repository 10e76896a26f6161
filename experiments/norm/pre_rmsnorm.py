"""The claim of `pre_rmsnorm`: what a forward of a GPT-2-shaped model costs before and after the exact conversion.

The model has four layers of width 256 and first weights, which do not change the time. One thread; a forward is timed in
processor time on windows of Moby Dick, and the median is taken, so that what else the machine does matters little.
"""

from __future__ import annotations

import math
import statistics
import time

import torch

from laconic.norm import to_pre_rmsnorm
from laconic.tasks.small import small

ROUNDS, WARM = 60, 5


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Log of the seconds of a forward."""
    from transformers import GPT2Config, GPT2LMHeadModel

    task = small("chars", seed=seed, size=64)
    config = GPT2Config(
        vocab_size=len(task.alphabet) + 1,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    if arm == "rmsnorm":
        to_pre_rmsnorm(model)
    ids, times, threads = task.train_data()[torch.arange(8)][0], [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(WARM + (5 if quick else ROUNDS)):
                start = time.process_time()
                model(ids)
                times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return math.log(statistics.median(times[WARM:]))
