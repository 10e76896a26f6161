"""The state of all generators that code may draw from without naming one: torch, CUDA, NumPy, Python."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = [
    "derived_seed",
    "masks_state",
    "preserved",
    "random_state",
    "seed_all",
    "seeded_on_cpu",
    "set_masks_state",
    "set_random_state",
]


def derived_seed(*parts: int) -> int:
    """A seed in [0, 2^63) that depends on every part: neighbours (seed, epoch) give unrelated streams."""
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global generator of this process, as tensors and plain values."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def masks_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators alone, which modules draw from: cheap enough to take at every step."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_masks_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `masks_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the global generators as they were found."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def seeded_on_cpu(seed: int) -> Iterator[None]:
    """Start the generators that code on the CPU draws from at a seed; afterwards they are as they were found."""
    states = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    # Not torch.manual_seed, which deals with every accelerator: that takes longer than many a training step.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
