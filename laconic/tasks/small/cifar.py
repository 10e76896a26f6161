"""Small task `cifar-small`: a part of CIFAR-10, photographs of 32 x 32 pixels in ten classes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from ..cifar_cnn import read_images
from .base import Baseline, ClassTask, Rows, draw
from .networks import ResidualNetwork
from .sources import locate

__all__ = ["load"]

SIZE, VALIDATE = 5000, 1000
TEST = slice(None, None, 5)  # of the 10,000 test images
FILES, PER_FILE = 5, 10_000  # of the training images
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels in [0, 1]
BASELINE = Baseline(epochs=5, lr=3e-3, value=0.511, spread=0.04)


def load(
    name: str = "cifar-small",
    *,
    seed: int = 0,
    size: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> ClassTask:
    """The task: standardised pixels (n, 3, 32, 32); trains on 5,000 images by default, tests on 2,000."""
    folder = locate("cifar10", name, cache)
    train = SIZE if size is None else size
    # The files are random parts of the collection, so as few are read as hold what is asked for.
    files = min(FILES, 1 + (train + VALIDATE) // (PER_FILE * 3 // 4))
    labels = np.array(json.loads((folder / "train_lables.json").read_text()), np.int64)[: files * PER_FILE]
    splits = draw(name, labels, {"validate": VALIDATE, "train": train}, seed)
    images = np.concatenate([read_images(folder / f"data_batch_{i + 1}.png") for i in range(files)])
    data = {split: _rows(images[i], labels[i]) for split, i in splits.items()}
    data["test"] = _test_rows(folder)
    return ClassTask(name, data, lambda: ResidualNetwork(10), BASELINE, seed)


def _test_rows(folder: Path) -> Rows:
    answers = np.array(json.loads((folder / "test_lables.json").read_text()), np.int64)
    return _rows(read_images(folder / "test_batch.png")[TEST], answers[TEST])


def _rows(images: np.ndarray, labels: np.ndarray) -> Rows:
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, DEVIATION))
    pixels = (torch.from_numpy(images.astype(np.float32)) / 255 - mean) / deviation
    return Rows(pixels, torch.from_numpy(labels))
