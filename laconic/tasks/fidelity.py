"""Fidelity: how near a model's outputs are to the float model's, where there is nothing better to measure.

With y_i the float model's output for example i and y'_i the other model's, both as one long vector, the
metric is the mean over examples of cos(y_i, y'_i) = y_i . y'_i / (|y_i| |y'_i|).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .base import Batch, Progress, Task, call, cut, main_output
from .metrics import FIDELITY, Evaluation

__all__ = ["FidelityTask"]

KEPT_NUMBERS = 1 << 26  # of all outputs together: 256 MB in float32


class FidelityTask(Task):
    """Mean cosine of the outputs with the float model's; see `laconic.tasks.metrics.pair`.

    Outputs at padding (attention mask 0) are zero on both sides. Of outputs too large to keep for all
    examples, a random choice of coordinates is kept, the same for both models.

    Args:
        id: the task's name.
        inputs: per split, what the model reads: a tuple of tensors, or tensors by argument name.
        classifier: the output has one number for each class, so that its largest is an answer.
        examples: per split, a short text of each example.
    """

    def __init__(
        self,
        id: str,
        inputs: dict[str, Batch],
        *,
        classifier: bool = False,
        examples: dict[str, list[str]] | None = None,
        seed: int = 0,
        batch: int = 32,
    ):
        super().__init__(id, FIDELITY, seed=seed, batch=batch)
        self.inputs, self.classifier = inputs, classifier
        for split, rows in inputs.items():
            self.sizes[split] = len(next(iter(rows.values())) if isinstance(rows, dict) else rows[0])
        self.examples = examples or {
            split: [f"{split} {i}" for i in range(n)] for split, n in self.sizes.items()
        }

    def rows(self, split: str, seq: int | None = None) -> Batch:
        return cut(self.inputs[split], seq)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        output = main_output(call(model, batch))
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        if (
            mask is not None
            and "decoder_input_ids" not in batch
            and output.shape[:2] == mask.shape
            and output.dim() > 2
        ):
            output = output * mask.to(output.device, output.dtype).reshape(
                *mask.shape, *[1] * (output.dim() - 2)
            )
        return output

    def measure(self, model: nn.Module, split: str, progress: Progress | None) -> Evaluation:
        kept: list[Tensor] = []
        chosen = None
        answers: list = []
        for _, output in self.outputs(model, split, progress):
            flat = output.flatten(1)
            if self.classifier:
                answers += torch.nan_to_num(flat, nan=-torch.inf).argmax(1).tolist()
            room = max(1, KEPT_NUMBERS // self.sizes[split])
            if flat.shape[1] > room:
                if chosen is None:
                    chosen = np.random.default_rng(self.seed).choice(flat.shape[1], room, replace=False)
                    chosen = torch.from_numpy(np.sort(chosen))
                flat = flat[:, chosen]
            kept.append(flat)
        outputs = torch.cat(kept).numpy()
        ones = np.ones(len(outputs))
        return Evaluation(1.0, ones, {}, answers, self.examples[split], outputs)
