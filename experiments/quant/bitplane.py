"""The claim of `bitplane`: the time of a vector times a matrix of 4096 x 4096, in float32 or in two planes a side.

One thread; the median over the products of half a second, rounding the vector included. Values are drawn by the seed.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import nn

from laconic.quant import BitPlaneLinear

WIDTH, SECONDS = 4096, 0.5


def run(arm: str, seed: int, quick: bool = False) -> float:
    """log2 of microseconds a product; `quick` tests the code and shows nothing."""
    width = 256 if quick else WIDTH
    torch.manual_seed(seed)
    layer: nn.Module = nn.Linear(width, width, bias=False)
    if arm == "w2a2":
        layer = BitPlaneLinear.from_float(layer, bits_w=2, bits_a=2)
    x = torch.randn(1, width)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            layer(x)
            return math.log2(1e6 * _median(lambda: layer(x), 0.01 if quick else SECONDS))
    finally:
        torch.set_num_threads(threads)


def _median(call, seconds: float) -> float:
    took: list[float] = []
    while sum(took) < seconds:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
