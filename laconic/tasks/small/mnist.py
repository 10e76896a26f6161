"""Small tasks `mnist-mlp` and `mnist-cnn`: handwritten digits of 28 x 28 pixels, in the published split."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from laconic.errors import BadInput

from .base import Baseline, ClassTask, Rows, draw
from .networks import cnn, mlp
from .sources import locate

__all__ = ["load", "read_idx"]

SIZE, VALIDATE = 6000, 1000
TEST = slice(None, None, 5)  # of the 10,000 test images: the two halves are not equally hard
MEAN, DEVIATION = 0.1307, 0.3081  # of the training pixels in [0, 1]
BASELINES = {
    "mnist-mlp": Baseline(epochs=5, lr=1e-3, value=0.929, spread=0.012),
    "mnist-cnn": Baseline(epochs=3, lr=1e-3, value=0.962, spread=0.015),
}


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type 8, the number of dimensions, each as 4 bytes, the data.

    Raises:
        BadInput: the file is something else, or not whole.
    """
    raw = path.read_bytes()
    if raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise BadInput(f"{path} is no IDX file of bytes; fetch mnist again")
    shape = tuple(np.frombuffer(raw, ">u4", raw[3], 4).tolist())
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != np.prod(shape):
        raise BadInput(f"{path} holds {values.size:,} bytes for an array of {shape}; fetch mnist again")
    return values.reshape(shape)


def load(
    name: str, *, seed: int = 0, size: int | None = None, cache: str | os.PathLike[str] | None = None
) -> ClassTask:
    """The task: standardised pixels (n, 1, 28, 28); trains on 6,000 images by default, tests on 2,000."""
    folder = locate("mnist", name, cache)
    images, labels = read_idx(folder / "train-images-idx3-ubyte"), read_idx(folder / "train-labels-idx1-ubyte")
    test, answers = read_idx(folder / "t10k-images-idx3-ubyte"), read_idx(folder / "t10k-labels-idx1-ubyte")
    splits = draw(name, labels, {"validate": VALIDATE, "train": SIZE if size is None else size}, seed)
    data = {split: _rows(images[i], labels[i]) for split, i in splits.items()}
    # The test images are the same for every seed: what differs between seeds is the training alone.
    data["test"] = _rows(test[TEST], answers[TEST])
    network = (lambda: mlp(784, (128,), 10)) if name == "mnist-mlp" else (lambda: cnn((8, 16), 28, 10))
    return ClassTask(name, data, network, BASELINES[name], seed)


def _rows(images: np.ndarray, labels: np.ndarray) -> Rows:
    pixels = (torch.from_numpy(images.astype(np.float32)) / 255 - MEAN) / DEVIATION
    return Rows(pixels.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))
