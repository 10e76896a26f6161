"""Perplexity of a causal language model on windows of text.

For a window of tokens x_1 .. x_L the loss is nll = - sum_{t>1} log p(x_t | x_1 .. x_{t-1}), over L - 1
tokens, and over all windows perplexity = exp(sum nll / sum (L - 1)). Each window starts afresh: no context is
carried over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import BadInput

from .base import Batch, Progress, Task, short
from .metrics import PERPLEXITY, Evaluation

__all__ = ["PerplexityTask", "check_length", "spread_windows", "window_losses"]

LOGIT_BYTES = 128 << 20  # what a batch's logits may take in float32


def window_losses(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, number of predicted tokens and number of them predicted right, of each window.

    Args:
        logits: (n, L, V).
        ids: (n, L) tokens.
        mask: (n, L), 0 at padding; a token counts where it and the token before it are text.
    """
    counts = torch.ones_like(ids[:, 1:]) if mask is None else (mask[:, 1:] * mask[:, :-1]).to(ids.dtype)
    losses, right = [], []
    for row, target, count in zip(
        logits[:, :-1].float(), ids[:, 1:], counts, strict=True
    ):  # window by window: memory
        losses.append((F.cross_entropy(row, target, reduction="none") * count).sum())
        right.append(((row.argmax(-1) == target) * count).sum())
    return torch.stack(losses), counts.sum(1), torch.stack(right)


def check_length(name: str, length: int) -> None:
    """Refuse windows in which no token comes after another.

    Raises:
        BadInput: fewer than two tokens.
    """
    if length < 2:
        raise BadInput(
            f"{name}: in windows of {length} token there is nothing to predict: take a seq of 2 at least, and "
            "examples as long"
        )


def spread_windows(tokens: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Windows (count, length) that do not overlap, spread evenly over a text from a random start.

    Raises:
        BadInput: the text is too short for them.
    """
    stride = len(tokens) // count
    if stride < length:
        raise BadInput(
            f"{len(tokens)} tokens are too few for {count} windows of {length}: {count * length} are needed"
        )
    starts = np.arange(count) * stride + rng.integers(stride - length + 1)
    return np.stack([tokens[start : start + length] for start in starts])


class PerplexityTask(Task):
    """Perplexity on windows of tokens.

    Args:
        id: the task's name.
        windows: per split, (n, L) tokens.
        tokenizer: turns tokens back into text for the report, or None.
        masks: per split, (n, L), 0 at padding; None where every window is full.
        vocabulary: rows of the model's logits, which bound a batch's memory; None if unknown.

    Raises:
        BadInput: the windows have fewer than two tokens.
    """

    def __init__(
        self,
        id: str,
        windows: dict[str, np.ndarray],
        *,
        tokenizer: Any = None,
        masks: dict[str, np.ndarray] | None = None,
        vocabulary: int | None = None,
        model_name: str | None = None,
        seed: int = 0,
        batch: int | None = None,
    ):
        self.length = next(iter(windows.values())).shape[1]
        check_length(id, self.length)
        fitting = LOGIT_BYTES // (4 * self.length * (vocabulary or 32_768))
        super().__init__(
            id, PERPLEXITY, model_name=model_name, seed=seed, batch=batch or max(1, min(32, fitting))
        )
        self.windows = {split: torch.as_tensor(rows, dtype=torch.long) for split, rows in windows.items()}
        self.masks = (
            None if masks is None else {split: torch.as_tensor(rows) for split, rows in masks.items()}
        )
        self.tokenizer = tokenizer
        self.sizes = {split: len(rows) for split, rows in self.windows.items()}

    def rows(self, split: str, seq: int | None = None) -> Batch:
        """Windows; a smaller `seq` cuts each into pieces of that length (what is left over is dropped)."""
        if seq is not None and seq > self.length:
            raise BadInput(
                f"the task {self.id} has windows of {self.length} tokens, fewer than seq={seq}: take a seq of "
                f"{self.length} at most"
            )
        check_length(self.id, self.length if seq is None else seq)
        rows = {"input_ids": self.windows[split]}
        if self.masks is not None:
            rows["attention_mask"] = self.masks[split]
        if seq is None or seq == self.length:
            return rows
        whole = self.length // seq * seq
        return {name: value[:, :whole].reshape(-1, seq) for name, value in rows.items()}

    def measure(self, model: nn.Module, split: str, progress: Progress | None) -> Evaluation:
        losses, counts, right, said = [], [], [], []
        for batch, logits in self.outputs(model, split, progress):
            loss, count, hits = window_losses(logits, batch["input_ids"], batch.get("attention_mask"))
            losses.append(loss)
            counts.append(count)
            right.append(hits)
            said += logits[:, -2].argmax(-1).tolist()
        scores = torch.stack([torch.cat(losses).double(), torch.cat(counts).double()], dim=1).numpy()
        scores[:, 0] = np.nan_to_num(
            scores[:, 0], nan=np.inf
        )  # a model that breaks down is infinitely surprised
        also = {"next-token accuracy": float(torch.cat(right).sum() / scores[:, 1].sum())}
        return Evaluation(
            PERPLEXITY.value(scores), scores, also, self._text([[i] for i in said]), self._examples(split)
        )

    def _text(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        if self.tokenizer is None:
            return [" ".join(map(str, row)) for row in tokens]
        return [self.tokenizer.decode(row) for row in tokens]

    def _examples(self, split: str) -> list[str]:
        """The words before each window's last token, which `answers` predicts."""
        return ["…" + short(text) for text in self._text(self.windows[split][:, -17:-1].tolist())]
