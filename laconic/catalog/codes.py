"""Binary codes for search: an embedding as its signs, compared by counting bits.

For embeddings e (n, d) of unit length with mean m (d,), a text is kept as d bits, and a query q (d,) takes two steps:

    b_i = [e_i - m > 0]         distance(q, i) = popcount([q - m > 0] xor b_i)           all texts: which are near
    score(q, i) = (q - m) . (2 b_i - 1) / sqrt(d)                                        the nearest: in which order

The second step keeps the query's own magnitudes, which costs nothing to store and takes back a part of what signs lose.
Source: "Binary Embedding-based Retrieval at Tencent", Gan et al., 2023, arXiv 2302.08714, has the same asymmetry; here
the codes are plain signs, without training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Codes", "encode"]


@dataclass(frozen=True)
class Codes:
    """Texts as bits.

    Attributes:
        bits: (n, ceil(d / 8)) uint8, the first bit of a byte is its highest.
        mean: (d,) float32, taken off before signs are.
    """

    bits: np.ndarray
    mean: np.ndarray

    def distances(self, query: np.ndarray) -> np.ndarray:
        """(n,) number of bits in which each text differs from the query (d,)."""
        return np.bitwise_count(self.bits ^ np.packbits(query > self.mean)).sum(1, dtype=np.int64)

    def search(self, query: np.ndarray, shortlist: int) -> tuple[np.ndarray, np.ndarray]:
        """The `shortlist` texts nearest by bits, ordered by the rescored score: (indices, scores).

        Ties are broken by index, so that the order is the same everywhere.
        """
        near = np.argsort(self.distances(query), kind="stable")[:shortlist]
        signs = np.unpackbits(self.bits[near], axis=1, count=len(self.mean)).astype(np.float32) * 2 - 1
        scores = signs @ (query - self.mean).astype(np.float32) / np.sqrt(len(self.mean))
        order = np.lexsort((near, -scores))
        return near[order], scores[order]


def encode(embeddings: np.ndarray) -> Codes:
    """The codes of embeddings (n, d)."""
    mean = embeddings.mean(0) if len(embeddings) else np.zeros(embeddings.shape[1])
    return Codes(np.packbits(embeddings > mean, axis=1), mean.astype(np.float32))
