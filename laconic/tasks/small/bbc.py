"""Small task `bbc`: the topic of a news article, one of five, by its first words."""

from __future__ import annotations

import os

from ..minilm_bbc import read_articles
from .base import Baseline, ClassTask
from .sources import locate
from .texts import text_task

__all__ = ["load"]

LENGTH, VOCABULARY = 96, 4000
BASELINE = Baseline(epochs=5, lr=3e-3, value=0.954, spread=0.02)


def load(
    name: str = "bbc", *, seed: int = 0, size: int | None = None, cache: str | os.PathLike[str] | None = None
) -> ClassTask:
    """The task: the first 96 words of an article as ids; trains on 60 % of all by default."""
    texts, labels, _ = read_articles(locate("bbc", name, cache))
    return text_task(name, texts, labels, length=LENGTH, most=VOCABULARY, baseline=BASELINE, seed=seed, size=size)
