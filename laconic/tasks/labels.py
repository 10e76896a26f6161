"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from laconic.errors import BadInput

from .base import Batch, Progress, Task, cut
from .metrics import ACCURACY, Evaluation

__all__ = ["AccuracyTask"]


class AccuracyTask(Task):
    """The share of examples whose largest output is at their label.

    Args:
        id: the task's name.
        inputs: per split, what the model reads: a tuple of tensors, or tensors by argument name.
        labels: per split, (n,) class numbers.
        classes: the classes' names, or None to use numbers.
        examples: per split, a short text of each example.
    """

    def __init__(
        self,
        id: str,
        inputs: dict[str, Batch],
        labels: dict[str, np.ndarray],
        *,
        classes: Sequence[str] | None = None,
        examples: dict[str, list[str]] | None = None,
        model_name: str | None = None,
        seed: int = 0,
        batch: int = 32,
    ):
        super().__init__(id, ACCURACY, model_name=model_name, seed=seed, batch=batch)
        self.inputs, self.labels, self.classes = inputs, labels, classes
        self.examples = examples or {
            split: [f"{split} {i}" for i in range(len(y))] for split, y in labels.items()
        }
        self.sizes = {split: len(y) for split, y in labels.items()}

    def rows(self, split: str, seq: int | None = None) -> Batch:
        return cut(self.inputs[split], seq)

    def measure(self, model: nn.Module, split: str, progress: Progress | None) -> Evaluation:
        logits = torch.cat([output.flatten(1) for _, output in self.outputs(model, split, progress)])
        labels = self.labels[split]
        if labels.max() >= logits.shape[1]:
            raise BadInput(
                f"label {labels.max()} of {self.id} is beyond the model's {logits.shape[1]} classes (0 to "
                f"{logits.shape[1] - 1})"
            )
        answers = torch.nan_to_num(logits, nan=-torch.inf).argmax(1).numpy()
        hits = (answers == labels).astype(np.float64)
        said = [self.classes[i] if self.classes else int(i) for i in answers]
        return Evaluation(ACCURACY.value(hits), hits, {}, said, self.examples[split])
