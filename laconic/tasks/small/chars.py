"""Small task `chars`: the next character of Moby Dick, in bits per character.

The first 90 % of the book are for training, the next 5 % validate, the last 5 % test. A row is a window of
64 characters and the 64 that follow each of them. A character that the training part lacks is unknown (id 0).
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import BadInput

from ..metrics import Evaluation, Metric
from ..smollm_moby import read_book
from .base import Baseline, Rows, SmallTask, outputs
from .networks import CharacterModel
from .sources import locate

__all__ = ["CharacterTask", "load"]

CONTEXT, SIZE = 64, 10_000
TEST = 500  # windows, as many to validate
PARTS = {"train": (0.0, 0.90), "validate": (0.90, 0.95), "test": (0.95, 1.0)}
BASELINE = Baseline(epochs=1, lr=4e-3, value=2.96, spread=0.09)
BITS = Metric("bits per character", higher_is_better=False, bounded=False)


class CharacterTask(SmallTask):
    """Rows (ids, ids shifted by one), both (n, context).

    Args:
        alphabet: characters with an id of their own, 1 and up.
    """

    metric = BITS

    def __init__(self, id: str, data: dict[str, Rows], alphabet: str, baseline: Baseline, seed: int = 0):
        super().__init__(id, data, baseline, seed, batch_size=16)
        self.alphabet = alphabet

    def build(self) -> nn.Module:
        return CharacterModel(len(self.alphabet) + 1, CONTEXT)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy in nats."""
        ids, following = batch
        return F.cross_entropy(model(ids).flatten(0, 1), following.flatten())

    def measure(self, model: nn.Module, rows: Rows) -> Evaluation:
        """Bits per character; a window's row of scores is [its bits, its characters]."""
        logits, following = outputs(model, rows), rows.columns[1]
        nats = F.cross_entropy(logits.transpose(1, 2), following, reduction="none").sum(1)
        bits = nats.double() / math.log(2)
        scores = np.stack([bits.numpy(), np.full(len(rows), following.shape[1], np.float64)], axis=1)
        return Evaluation(self.metric.value(scores), scores)


def load(
    name: str = "chars", *, seed: int = 0, size: int | None = None, cache: str | os.PathLike[str] | None = None
) -> CharacterTask:
    """The task; trains on 10,000 windows by default, which the seed draws."""
    book = read_book(locate("moby-dick", name, cache))
    parts = {split: book[int(a * len(book)) : int(b * len(book))] for split, (a, b) in PARTS.items()}
    alphabet = "".join(sorted(set(parts["train"])))
    known = {character: i for i, character in enumerate(alphabet, 1)}
    data = {}
    for split, text in parts.items():
        ids = torch.tensor([known.get(character, 0) for character in text])
        places = (len(ids) - 1) // CONTEXT  # for windows that do not overlap
        if split == "train":
            chosen = _drawn(name, places, SIZE if size is None else size, seed)
        else:
            chosen = np.linspace(0, places - 1, min(TEST, places)).astype(np.int64)
        at = torch.from_numpy(chosen)[:, None] * CONTEXT + torch.arange(CONTEXT)
        data[split] = Rows(ids[at], ids[at + 1])
    return CharacterTask(name, data, alphabet, BASELINE, seed)


def _drawn(name: str, places: int, size: int, seed: int) -> np.ndarray:
    if size > places:
        raise BadInput(f"the small task {name} has {places:,} training windows to draw from, not {size:,}")
    return np.random.default_rng(seed).permutation(places)[:size]
