"""The sentence encoder of `laconic find`: MiniLM, compressed four times by laconic itself, on first use.

Nothing is downloaded here: where `minilm` has not been fetched there is no encoder, and the search goes by words.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from laconic.tasks.fetch import cache_folder, is_fetched

__all__ = ["Encoder", "open_encoder"]

NAME = "find-encoder"
BUDGET = "size=4x"
TOKENS = 256
BATCH = 16

Say = Callable[[str], None]


class Encoder:
    """Unit-length sentence embeddings by a compressed encoder in `folder`, which is loaded when first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._loaded: tuple | None = None

    @property
    def key(self) -> str:
        """Changes when the encoder does."""
        return hashlib.sha256((self.folder / "laconic.json").read_bytes()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, d) float32."""
        import torch

        from laconic.tasks.minilm_bbc import mean_pool

        model, tokenizer = self._open()
        found = []
        with torch.inference_mode():
            for begin in range(0, len(texts), BATCH):
                batch = tokenizer(
                    list(texts[begin : begin + BATCH]),
                    padding=True, truncation=True, max_length=TOKENS, return_tensors="pt",
                )  # fmt: skip
                hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
                found.append(mean_pool(hidden, batch["attention_mask"]).float())
        return torch.cat(found).numpy()

    def _open(self) -> tuple:
        if self._loaded is None:
            from transformers import AutoTokenizer

            from laconic.pipeline.load import load

            self._loaded = load(self.folder), AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        return self._loaded


def open_encoder(cache: Path | None = None, say: Say = lambda _: None) -> Encoder | None:
    """The compressed encoder of the cache folder, made now if `minilm` is fetched; None where it is not.

    Args:
        cache: the cache folder; `$LACONIC_CACHE` or `~/.cache/laconic` by default.
        say: is told what takes time.
    """
    folder = cache_folder(cache) / NAME
    if not (folder / "laconic.json").is_file():
        if not is_fetched("minilm", cache=cache):
            return None
        _make(folder, say)
    return Encoder(folder)


def _make(folder: Path, say: Say) -> None:
    from laconic.pipeline.compress import compress

    say(f"compressing MiniLM for `laconic find` ({BUDGET}, once) ...")
    began = time.perf_counter()
    # `compress` works in a folder beside and renames it at the end: one that was interrupted is simply made again.
    compress("minilm", budget=BUDGET, out=folder, overwrite=True)
    say(f"done in {time.perf_counter() - began:.0f} seconds: {folder}")
