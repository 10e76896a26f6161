"""`laconic find`: the methods that fit a wish put in plain words.

By meaning, where the encoder is at hand: every card is embedded field by field, kept as sign bits, and a method is as
near as its nearest field. By words always (BM25). The two orders are merged by reciprocal ranks, which need no common
scale:

    score(d) = 1 / (k + rank by meaning) + 1 / (k + rank by words)

Source of the merging: "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", Cormack,
Clarke, Buettcher, 2009.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laconic.catalog.codes import Codes, encode
from laconic.catalog.read import Catalog
from laconic.catalog.source import Method
from laconic.catalog.words import Words
from laconic.errors import BadInput

__all__ = ["Found", "Hit", "find"]

# A small constant lets the first places count; the usual 60 is for lists of thousands.
RANK_CONSTANT = 10
# Codes looked at again with the query's own magnitudes, for every hit asked for.
SHORTLIST = 8
CACHED = "find-codes.npz"

Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Hit:
    """A method and how well it fits; scores compare within one search only."""

    method: Method
    score: float


@dataclass(frozen=True)
class Found:
    """The hits, best first, and how they were searched for, as a sentence."""

    hits: tuple[Hit, ...]
    how: str


def find(
    query: str,
    catalog: Catalog,
    *,
    limit: int = 5,
    words_only: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """The methods nearest to a wish.

    Args:
        query: in plain words.
        catalog: where to look.
        limit: hits at most.
        words_only: do without the encoder.
        cache: the cache folder, where the encoder and the cards' codes lie.
        say: is told what takes time.

    Raises:
        BadInput: an empty query, or no place for a hit.
    """
    if not query.strip():
        raise BadInput('the text to find is empty: say what you need, as "train with batch size one"')
    if limit < 1:
        raise BadInput(f"--limit is {limit}: it must be at least 1")
    methods = list(catalog)
    if not methods:
        return Found((), "no method has landed in this source tree")
    ranks = [by_words(query, methods)]
    how = "by words"
    if not words_only:
        # Both lead to torch, which a search by words does without.
        from laconic.catalog.encoder import open_encoder
        from laconic.tasks.fetch import cache_folder

        encoder = open_encoder(cache, say)
        if encoder is None:
            how = "by words alone; `laconic fetch minilm` makes it search by meaning too"
        else:
            texts, owners = fields(methods)
            codes = cached_codes(texts, encoder, encoder.key, cache_folder(cache) / CACHED)
            ranks.append(by_meaning(encoder([query])[0], codes, owners, limit))
            how = f"by meaning, in codes of {codes.bits.shape[1]} bytes a text, and by words"
    merged = merge(ranks)[:limit]
    return Found(tuple(Hit(methods[i], score) for i, score in merged), how)


def fields(methods: Sequence[Method]) -> tuple[list[str], np.ndarray]:
    """The texts that are embedded, and for each the number of its method."""
    texts, owners = [], []
    for i, method in enumerate(methods):
        card = method.card
        found = [f"{card.title}. {card.summary}", card.use, method.about]
        for text in filter(None, found):
            texts.append(text)
            owners.append(i)
    return texts, np.array(owners)


def by_words(query: str, methods: Sequence[Method]) -> list[int]:
    """Numbers of the methods that share a word with the query, best first."""
    scores = Words([_weighted(method) for method in methods]).scores(query)
    order = np.argsort(-scores, kind="stable")
    return [int(i) for i in order if scores[i] > 0]


def _weighted(method: Method) -> list[tuple[str, int]]:
    """What a method's words are worth: who types its name means it."""
    card = method.card
    names = f"{card.id.replace('_', ' ')} {card.id} {' '.join(card.objects)}"
    return [(names, 4), (card.title, 2), (card.summary, 2), (card.use, 2), (method.about, 1), (card.family, 1)]


def by_meaning(query: np.ndarray, codes: Codes, owners: np.ndarray, limit: int) -> list[int]:
    """Numbers of the methods near a query's embedding (d,), best first; each by its nearest text."""
    indices, _ = codes.search(query, shortlist=SHORTLIST * limit)
    return list(dict.fromkeys(int(owners[i]) for i in indices))


def merge(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: (number, score), best first; of equals the lower number."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, i in enumerate(ranking, start=1):
            scores[i] = scores.get(i, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def cached_codes(texts: Sequence[str], embed: Embed, encoder_key: str, path: Path) -> Codes:
    """The codes of texts: from `path` if it holds those of these texts by this encoder, else made and kept there."""
    key = hashlib.sha256("\0".join([encoder_key, *texts]).encode()).hexdigest()
    # A file that another version or a full disk left is no reason to fail: the codes are made again.
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(path, allow_pickle=False) as kept,
    ):
        if str(kept["key"]) == key:
            return Codes(kept["bits"], kept["mean"])
    codes = encode(embed(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as file:
        np.savez(file, key=np.array(key), bits=codes.bits, mean=codes.mean)
    os.replace(scratch, path)
    return codes
