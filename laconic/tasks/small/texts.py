"""From texts to rows of word ids: a vocabulary of the training texts, so that nothing leaks from the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .base import Baseline, ClassTask, Rows, three_ways
from .networks import TextClassifier

__all__ = ["UNKNOWN", "encode", "text_task", "vocabulary", "words"]

END, UNKNOWN = 0, 1  # ids; words have the others
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[!?$%]")


def words(text: str) -> list[str]:
    """Lower-case words, numbers, and the marks that tell one kind of text from another."""
    return _WORD.findall(text.lower())


def vocabulary(texts: Iterable[list[str]], most: int) -> dict[str, int]:
    """Ids of the most frequent words, ties by the alphabet: `most` ids in all, the two reserved ones included."""
    counts = Counter(word for text in texts for word in text)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: most - 2]
    return {word: i for i, word in enumerate(ranked, 2)}


def encode(texts: list[list[str]], ids: dict[str, int], length: int) -> Tensor:
    """The first `length` words of each text: (n, length), filled up with 0."""
    rows = torch.full((len(texts), length), END)
    for row, text in zip(rows, texts, strict=True):
        known = [ids.get(word, UNKNOWN) for word in text[:length]]
        row[: len(known)] = torch.tensor(known, dtype=torch.long)
    return rows


def text_task(
    name: str,
    texts: list[str],
    labels: np.ndarray,
    *,
    length: int,
    most: int,
    baseline: Baseline,
    seed: int,
    size: int | None,
) -> ClassTask:
    """A text classification: rows (ids, class), and a transformer encoder as the baseline network."""
    split_texts, answers = [words(text) for text in texts], torch.from_numpy(labels.astype(np.int64))
    splits = three_ways(name, labels, size, seed)
    ids = vocabulary((split_texts[i] for i in splits["train"]), most)
    data = {
        split: Rows(encode([split_texts[i] for i in chosen], ids, length), answers[chosen])
        for split, chosen in splits.items()
    }
    classes = int(labels.max()) + 1
    return ClassTask(name, data, lambda: TextClassifier(len(ids) + 2, length, classes), baseline, seed)
