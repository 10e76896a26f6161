"""Small task `digits`: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. Needs no download."""

from __future__ import annotations

import importlib.util
import os

import torch

from laconic.errors import BadInput

from .base import Baseline, ClassTask, Rows, three_ways
from .networks import mlp

__all__ = ["load"]

BASELINE = Baseline(epochs=20, lr=3e-3, value=0.966, spread=0.025)


def load(
    name: str = "digits",
    *,
    seed: int = 0,
    size: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> ClassTask:
    """The task: pixels in [0, 1] as (n, 64); trains on 1,079 of them by default."""
    if importlib.util.find_spec("sklearn") is None:
        raise BadInput("the small task digits is data of scikit-learn; run `pip install scikit-learn`")
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target).long()
    splits = three_ways(name, found.target, size, seed)
    data = {split: Rows(images[i], labels[i]) for split, i in splits.items()}
    return ClassTask(name, data, lambda: mlp(64, (64,), 10), BASELINE, seed)
