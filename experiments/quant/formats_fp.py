"""The claim of `formats_fp`: the signal-to-noise ratio of two 4-bit formats on numbers with heavy tails."""

from __future__ import annotations

import torch

from laconic.quant import MXFP, NVFP4, quantize_blocks

FORMATS = {"mxfp4": MXFP(4), "nvfp4": NVFP4()}
ROWS, COLUMNS, DEGREES = 256, 1024, 4


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Decibels of one arm on the numbers of one seed; `quick` tests the code and shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (8 if quick else ROWS, COLUMNS)
    normal = torch.randn(shape, generator=generator)
    chi = torch.randn(*shape, DEGREES, generator=generator).square().sum(-1)
    x = normal / (chi / DEGREES).sqrt()
    noise = quantize_blocks(x, FORMATS[arm]).dequantize() - x
    return float(10 * torch.log10(x.square().sum() / noise.square().sum()))
