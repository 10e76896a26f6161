"""Small real tasks for training: data in memory, a baseline network, a metric; each loads in seconds.

A claim of a method is tested on one of these, so that all claims share data, networks and measures:

    task = small("mnist-cnn", seed=0)
    model = task.model(seed=0)
    ...                                      # train it on task.train_data() by task.loss
    task.evaluate(model).value

`SMALL` says what there is. A task's `baseline` says how its network is trained and what it then reaches.
"""

from __future__ import annotations

import difflib
import importlib
import os

from laconic.errors import BadInput

from .base import Baseline, Rows, SmallTask

__all__ = ["SMALL", "Baseline", "Rows", "SmallTask", "small"]

SMALL: dict[str, str] = {
    "digits": "scikit-learn's 1,797 digits of 8 x 8 pixels, and a perceptron",
    "mnist-mlp": "handwritten digits of 28 x 28 pixels, and a perceptron",
    "mnist-cnn": "handwritten digits of 28 x 28 pixels, and a convolutional network with batch normalization",
    "cifar-small": "photographs of 32 x 32 pixels in ten classes, and a residual network",
    "spam": "e-mails, wanted or not, and a transformer encoder",
    "bbc": "news articles on five topics, and a transformer encoder",
    "chars": "the characters of Moby Dick, and a transformer that predicts the next",
    "table-NAME": "a table of the KEEL collection (magic, letter, spambase, ...), and a perceptron",
    "karate": "the karate club of 34 members, two labelled in each half, and a graph convolution",
    "kg-NAME": "a knowledge graph (nations, kinships, umls) with missing triples, and ComplEx",
}
"""Every task and what it is; NAME stands for one of several."""

_MODULES = {
    "digits": "digits", "mnist-mlp": "mnist", "mnist-cnn": "mnist", "cifar-small": "cifar", "spam": "spam",
    "bbc": "bbc", "chars": "chars", "table": "tables", "karate": "karate", "kg": "knowledge",
}  # fmt: skip


def small(
    name: str, seed: int = 0, size: int | None = None, *, cache: str | os.PathLike[str] | None = None
) -> SmallTask:
    """A small task by name.

    Args:
        name: a name of `SMALL`, as "digits", "table-magic" or "kg-umls".
        seed: of the training examples that are drawn, and of the split where the data comes without one.
        size: training examples; each task has its own default.
        cache: where fetched packages lie, as in `laconic.tasks.fetch`.

    Raises:
        BadInput: there is no such task, its data is not fetched, or it does not have that many examples.
    """
    prefix, dash, rest = name.partition("-")
    key = prefix if dash and rest and f"{prefix}-NAME" in SMALL else name
    if key not in _MODULES or f"{key}-NAME" in SMALL and key == name:
        near = difflib.get_close_matches(name, SMALL, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"there is no small task {name!r}{hint} Known are: {', '.join(SMALL)}")
    if size is not None and size < 1:
        raise BadInput(f"the size of a small task is a number of training examples, at least 1, not {size}")
    module = importlib.import_module(f".{_MODULES[key]}", __name__)
    return module.load(name, seed=seed, size=size, cache=cache)
