"""The claim of `sla`: what a call of an attention layer costs on 1,024 tokens, and of softmax attention in its place.

A call is timed in processor time with one thread, and the median over calls is taken.
"""

from __future__ import annotations

import math
import statistics
import time

import torch

from laconic.norm import SimplifiedLinearAttention
from laconic.tasks.small.networks import Attention

WIDTH, HEADS, TOKENS, BATCH = 96, 3, 1024, 4
WARM = 3


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Log of the seconds of a call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.randn(BATCH, TOKENS, WIDTH)
        layer = (
            SimplifiedLinearAttention(WIDTH, HEADS, TOKENS) if arm == "sla" else Attention(WIDTH, HEADS, causal=False)
        )
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(WARM + (3 if quick else 40)):
                start = time.process_time()
                layer.eval()(x)
                seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return math.log(statistics.median(seconds[WARM:]))
