"""Search by words: BM25 over short texts, in numpy.

    score(q, d) = sum over words w of q:  idf(w)  tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(w) = ln(1 + (N - n_w + 1/2) / (n_w + 1/2))

with tf how often w stands in d, |d| the words of d, n_w the texts that hold w. Source: "The Probabilistic Relevance
Framework: BM25 and Beyond", Robertson, Zaragoza, 2009.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["Words", "split"]

K1, B = 1.2, 0.75
# Words that say how a wish is put, and not what is wished.
_STOP = """
a an and are as at be but by can do does for from has have how i in into is it its me my no not of on or our so than
that the their them then there these they this to too use used using want was we what when where which while who will
with without you your method methods
"""
STOP = frozenset(_STOP.split())


def split(text: str) -> list[str]:
    """The words of a text, lower-case, without their commonest endings.

    >>> split("Training with batches of size one, in 4 bits: RMSNorm")
    ['train', 'batch', 'size', 'one', '4', 'bit', 'rmsnorm', 'rms', 'norm']
    """
    words: list[str] = []
    for word in re.findall(r"[A-Za-z]+|\d+", text):
        parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", word)
        # A name of several words is found whole and by its parts: RMSNorm, rms, norm.
        for part in [word, *parts] if len(parts) > 1 else [word]:
            lower = part.lower()
            if lower not in STOP:
                words.append(_stem(lower))
    return words


def _stem(word: str) -> str:
    """Not linguistics: only so that "quantizing", "quantized" and "quantizes" meet."""
    for ending in (
        "izations",
        "ization",
        "isations",
        "isation",
        "ising",
        "ised",
        "ises",
        "izing",
        "ized",
        "izes",
        "izer",
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + "ize"
    for ending, put in (("ies", "y"), ("ing", ""), ("ches", "ch"), ("sses", "ss"), ("ed", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)] + put
            break
    return word[:-1] if word.endswith("e") and len(word) > 4 and not word.endswith("ize") else word


class Words:
    """BM25 over texts, each given as fields with weights: a word in a field of weight 3 counts three times."""

    def __init__(self, texts: Sequence[Sequence[tuple[str, int]]]):
        """`texts`: for every text its (field, weight) pairs."""
        counts = [Counter[str]() for _ in texts]
        for count, fields in zip(counts, texts, strict=True):
            for field, weight in fields:
                for word in split(field):
                    count[word] += weight
        self._index = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
        tf = np.zeros((len(texts), len(self._index)))
        for row, count in enumerate(counts):
            for word, n in count.items():
                tf[row, self._index[word]] = n
        length = tf.sum(1, keepdims=True)
        mean = max(float(length.mean()), 1.0) if len(texts) else 1.0
        held = (tf > 0).sum(0)
        idf = np.log1p((len(texts) - held + 0.5) / (held + 0.5))
        self._scores = idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * length / mean))

    def scores(self, query: str) -> np.ndarray:
        """(texts,) the score of every text; 0 where it shares no word with the query."""
        known = [self._index[word] for word in dict.fromkeys(split(query)) if word in self._index]
        return self._scores[:, known].sum(1)
