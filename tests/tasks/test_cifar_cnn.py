"""The network rebuilt from a Keras file: its arithmetic against a naive one, and its real accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from laconic.errors import BadInput
from laconic.tasks import load_task, zoo_source
from laconic.tasks.cifar_cnn import CifarCNN, load_weights

CHANNELS, HIDDEN = (4, 4, 6, 6, 5, 5), (8, 7)


def keras_file(path, rng):
    """A file laid out as Keras does, with random weights; returns them."""
    h5py = pytest.importorskip("h5py")
    weights = {}
    sides = (3, *CHANNELS)
    widths = (CHANNELS[-1], *HIDDEN, 10)
    for i in range(6):
        end = f"_{i}" if i else ""
        weights[f"conv2d{end}"] = {
            "kernel": rng.normal(size=(3, 3, sides[i], sides[i + 1])) / 6,
            "bias": rng.normal(size=sides[i + 1]),
        }
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        weights[f"batch_normalization{end}"] = {name: rng.uniform(0.5, 2, sides[i + 1]) for name in names}
    for i in range(3):
        end = f"_{i}" if i else ""
        weights[f"dense{end}"] = {
            "kernel": rng.normal(size=widths[i : i + 2]),
            "bias": rng.normal(size=widths[i + 1]),
        }
    with h5py.File(path, "w") as file:
        for layer, arrays in weights.items():
            for name, array in arrays.items():
                file[f"model_weights/{layer}/{layer}/{name}:0"] = array.astype(np.float32)
    return weights


def naive(image, weights):
    """The network on one image (32, 32, 3) in Keras' own layout, by loops."""
    x = image
    for i in range(6):
        end = f"_{i}" if i else ""
        kernel, bias = weights[f"conv2d{end}"]["kernel"], weights[f"conv2d{end}"]["bias"]
        side = x.shape[0] - 2
        out = np.empty((side, side, kernel.shape[3]))
        for r in range(side):
            for c in range(side):
                out[r, c] = np.tensordot(x[r : r + 3, c : c + 3], kernel, 3) + bias
        norm = weights[f"batch_normalization{end}"]
        x = np.maximum(out, 0)
        x = (x - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 1e-3) * norm["gamma"] + norm["beta"]
        if i in (1, 3):
            half = x.shape[0] // 2
            x = x[: 2 * half, : 2 * half].reshape(half, 2, half, 2, -1).max((1, 3))
    x = x.reshape(-1)
    for i in range(3):
        layer = weights[f"dense_{i}" if i else "dense"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x


def test_network_computes_what_keras_would(tmp_path):
    rng = np.random.default_rng(0)
    weights = keras_file(tmp_path / "m.h5", rng)
    model = load_weights(CifarCNN(CHANNELS, HIDDEN), tmp_path / "m.h5")
    assert not model.training
    images = rng.uniform(0, 255, (2, 32, 32, 3))
    with torch.no_grad():
        found = model(torch.from_numpy(images.transpose(0, 3, 1, 2)).float())
    for image, row in zip(images, found.numpy(), strict=True):
        np.testing.assert_allclose(row, naive(image, weights), rtol=1e-4, atol=1e-3)


def test_images_have_no_sequence_length():
    with pytest.raises(BadInput, match="reads images: there is no sequence length"):
        load_task("cifar-cnn", seq=8)


@pytest.mark.fetched
def test_the_real_figure(fetched):
    pytest.importorskip("h5py")
    fetched("cifar-cnn")
    task = load_task("cifar-cnn")
    model, (args, _) = zoo_source("cifar-cnn")
    assert sum(parameter.numel() for parameter in model.parameters()) == 968_394
    assert task.sizes == {"calibrate": 512, "select": 1000, "verify": 10_000}
    assert model(args[0]).shape == (2, 10)
    assert np.bincount(task.labels["select"]).tolist() == [100] * 10
    found = task.evaluate(model, "verify")
    assert found.value == pytest.approx(0.8014, abs=1e-9)
    assert task.evaluate(model, "select").value > 0.84  # the network has seen these
