"""From what was typed, a file or standard input to texts; from texts to batches of tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.errors import BadInput
from laconic.tasks.base import Batch, quietly
from laconic.tasks.readers import Data, read_data
from laconic.tasks.view import ModelView

__all__ = ["Tokens", "batches", "read_prompt", "read_texts", "tokenize", "tokenizer_for"]

ENDLESS = 1_000_000  # some tokenizers say 10^30 where they know of no limit


def read_prompt(words: Sequence[str], file: str | None) -> str:
    """The one prompt of `generate`: typed, `-` for standard input, or the text of a file.

    Raises:
        BadInput: there is none, an empty one, several, or a file that is no text.
    """
    _one_origin(words, file, "prompt")
    if len(words) > 1:
        raise BadInput(
            f"{len(words)} prompts were given, and one is answered at a time: put it in quotation marks (the verbs that "
            "may stand before it are generate, embed and predict)"
        )
    typed = words[0] if file is None and words[0] != "-" else None
    text = typed if typed is not None else sys.stdin.read() if file is None else _read(file)
    if not text.strip():
        raise BadInput("the prompt is empty: say what the text should go on from")
    return text if typed is not None else text.removesuffix("\n")  # the end of a last line is not meant


def read_texts(words: Sequence[str], file: str | None, columns: Mapping[str, str] | None = None) -> list[str]:
    """The texts of `embed` and `predict`: each as typed, or the lines of standard input or a text file, or a column.

    Args:
        words: as typed; `-` alone is standard input.
        file: of lines, or a table (JSONL, CSV, Parquet).
        columns: which column of a table is the text, as {"text": "body"}.

    Raises:
        BadInput: there are none, one is empty, or the file cannot be read.
    """
    _one_origin(words, file, "text")
    if file is not None and Path(file).suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        texts = read_data(_existing(file), columns or {}).texts
        if texts is None:
            raise BadInput(f"{file} holds no texts")
        return texts
    if columns:
        raise BadInput(f"columns were named, and {file or 'what was typed'} has none to name")
    if file is None and list(words) != ["-"]:
        empty = [number for number, word in enumerate(words, 1) if not word.strip()]
        if empty:
            raise BadInput(f"text {empty[0]} is empty")
        return list(words)
    lines = (sys.stdin.read() if file is None else _read(file)).splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise BadInput(f"{file or 'standard input'} holds no line of text")
    return texts


def _one_origin(words: Sequence[str], file: str | None, what: str) -> None:
    if words and file is not None:
        raise BadInput(f"a {what} was typed and --file {file} was named: give one of them")
    if not words and file is None:
        raise BadInput(f"there is no {what}: type it, pass - to read standard input, or name a --file")


def _existing(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise BadInput(f"{file} is no file")
    return path


def _read(file: str) -> str:
    try:
        return _existing(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}") from error


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Texts as tokens.

    Attributes:
        ids: of each text, in the order given.
        limit: the most that one may have, or None.
        cut: how many texts had more and lost them.
    """

    ids: list[list[int]]
    limit: int | None
    cut: int


def tokenizer_for(view: ModelView, what: str) -> Any:
    """The tokenizer that lies with a model, with a padding token.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    tokenizer = view.get_tokenizer(Data(what))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], view: ModelView, *limits: int | None) -> Tokens:
    """Tokens of texts, cut at the least of the limits, the tokenizer's and the model's own among them.

    Raises:
        BadInput: the tokenizer is not the model's own.
    """
    known = [n for n in (*limits, tokenizer.model_max_length, view.positions()) if n is not None and n < ENDLESS]
    limit = min(known, default=None)
    with quietly():
        ids = [list(row) for row in tokenizer(list(texts))["input_ids"]]
        long = [i for i, row in enumerate(ids) if limit is not None and len(row) > limit]
        for i in long:  # again, so that the marks of beginning and end stay
            ids[i] = list(tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"])
    view.check_ids(torch.tensor([token for row in ids for token in row]), Data("the text"))
    return Tokens(ids, limit, len(long))


def batches(tokenizer: Any, tokens: Tokens, size: int) -> Iterator[tuple[list[int], Batch]]:
    """(indices, padded batch): texts of like length together, the longest first, since its memory must suffice.

    Raises:
        BadInput: texts of different length, and a tokenizer without a padding token.
    """
    order = sorted(range(len(tokens.ids)), key=lambda i: -len(tokens.ids[i]))
    if tokenizer.pad_token_id is None and size > 1:
        size = 1  # nothing to fill up with
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = [tokens.ids[i] for i in chosen]
        if len(rows) == 1:
            ids = torch.tensor(rows)
            yield chosen, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            continue
        with quietly():
            found = tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt", return_attention_mask=True)
        yield chosen, {name: found[name] for name in ("input_ids", "attention_mask")}
