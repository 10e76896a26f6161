"""A cache with tiny made-up packages in the formats of the real ones, so that reading is tested without a network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from laconic.tasks.fetch import PACKAGES

TOPICS = ("business", "tech", "sports")


def folder(cache: Path, package: str) -> Path:
    """Where a fetched package's content lies."""
    entry = PACKAGES[package]
    path = cache / f"{package}-{entry.version}" / entry.content
    path.mkdir(parents=True, exist_ok=True)
    return path


def idx(values: np.ndarray) -> bytes:
    """An array of bytes as an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def make_cache(cache: Path, pictures: bool = False) -> Path:
    """Write all packages that the small tasks read (pictures are large, and so only on demand); returns `cache`."""
    rng = np.random.default_rng(0)
    mnist = folder(cache, "mnist")
    for part, n in (("train", 1200), ("t10k", 50)):
        (mnist / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (mnist / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))
    _mails(folder(cache, "spam-assassin"))
    for number, topic in enumerate(TOPICS):
        (folder(cache, "bbc") / topic).mkdir(exist_ok=True)
        for i in range(100 * number, 100 * number + 20):  # a number that no other article has
            (folder(cache, "bbc") / topic / f"{i}.txt").write_text(f"{topic} news {i}\n\nthe {topic} of day {i}")
    text = "".join(rng.choice(list("abcdefgh ,.\n"), 120_000))
    (folder(cache, "moby-dick") / "data.txt").write_text(text)
    for group in ("balanced", "imbalanced"):
        (folder(cache, "keel") / group / "raw").mkdir(parents=True, exist_ok=True)
    rows = [f"{i}, {'red' if i % 3 else 'blue'}, 7, {'yes' if i % 2 else 'no'}" for i in range(60)]
    (folder(cache, "keel") / "balanced" / "raw" / "colours.dat").write_text("\n".join(rows) + "\n")
    graph = folder(cache, "pykeen") / "nations"
    graph.mkdir(exist_ok=True)
    triples = [f"e{i}\tr{i % 2}\te{(i + 1 + i % 2) % 8}" for i in range(8)]
    for name, part in (("train", triples[:6]), ("valid", triples[6:7]), ("test", triples[7:])):
        (graph / f"{name}.txt").write_text("\n".join(part) + "\n")
    if pictures:
        _pictures(folder(cache, "cifar10"), rng)
    return cache


def _mails(where: Path) -> None:
    for part in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        (where / part).mkdir(exist_ok=True)
        for i in range(12):
            mail = (
                f"From: a@{part}.org\nSubject: {part[:4]} number {i}\n\nWords of mail {i} in {part[:4]} {part[-1]}.\n"
            )
            (where / part / f"{i:05}.txt").write_text(mail)


def _pictures(where: Path, rng: np.random.Generator) -> None:
    from PIL import Image

    for name, n in (("data_batch_1", 10_000), ("test_batch", 50)):
        Image.fromarray(rng.integers(0, 256, (n, 1024, 3), dtype=np.uint8)).save(
            where / f"{name}.png", compress_level=0
        )
    (where / "train_lables.json").write_text(json.dumps([i % 10 for i in range(50_000)]))
    (where / "test_lables.json").write_text(json.dumps([i % 10 for i in range(50)]))
