"""Texts as vectors: the hidden states of an encoder, pooled as the files of sentence-transformers say.

With hidden states h_t (d,) of the tokens t of a text, mask m_t in {0, 1}:

    mean = sum_t m_t h_t / sum_t m_t          cls = h_first          max_j = max_t h_tj over m_t = 1          last = h_last
    e = v / |v|                               v (d,), or several of these behind one another

`modules.json` names the folder of the pooling (`1_Pooling/config.json`), `sentence_bert_config.json` the longest text. A
folder without them gets the mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.pipeline.artifact import read_json
from laconic.pipeline.source_base import first_line
from laconic.tasks.base import call

from .model import Opened, answering, check_verb
from .texts import batches, tokenize, tokenizer_for

__all__ = ["Embeddings", "Pooling", "embed", "pool", "read_pooling"]

MODULES, TRANSFORMER, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
# Their names of the ways that are known here, in the order in which they put several behind one another.
WAYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become one vector.

    Attributes:
        ways: of "mean", "cls", "max", "last"; the vectors of several stand behind one another.
        tokens: the longest text, or None.
        lower: whether texts are in lower case.
        prompt: what is put before each text.
        stated: whether files of sentence-transformers said so.
    """

    ways: tuple[str, ...] = ("mean",)
    tokens: int | None = None
    lower: bool = False
    prompt: str = ""
    stated: bool = False


@dataclass(frozen=True)
class Embeddings:
    """Vectors of texts.

    Attributes:
        texts: as given.
        values: (n, d) float32, rows of length 1.
        tokens: read in all.
        seconds: that the model took.
        notes: sentences on what was decided.
    """

    texts: list[str]
    values: np.ndarray
    tokens: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As the command line prints it."""
        return {
            "given": self.texts, "embeddings": self.values.tolist(), "texts": len(self.values),
            "dimensions": self.values.shape[1], "tokens": self.tokens, "seconds": self.seconds, "notes": self.notes,
        }  # fmt: skip


def embed(
    opened: Opened,
    texts: list[str],
    *,
    batch: int = 32,
    seq: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Embeddings:
    """A vector of length 1 for each text.

    Args:
        opened: a model that reads text; of one with a head, the base below it is used.
        texts: at least one.
        batch: texts at a time.
        seq: cut texts to this many tokens; by default to what the model can read.
        progress: is called with (stage, done, total).

    Raises:
        BadInput: it reads no text, has no tokenizer, or a pooling that is not known here.
    """
    check_verb(opened, "embed")
    pooling = read_pooling(opened.folder)
    view = opened.view()
    tokenizer = tokenizer_for(view, "the text")
    given = [pooling.prompt + (text.lower() if pooling.lower else text) for text in texts]
    tokens = tokenize(tokenizer, given, view, seq, pooling.tokens)
    notes = [] if pooling.stated else ["no file says how to pool: the mean over the tokens was taken"]
    if tokens.cut:
        notes.append(f"{tokens.cut} of {len(texts)} texts were cut to {tokens.limit} tokens")
    model, found = _encoder(opened.model), {}
    begin, done = time.perf_counter(), 0
    for indices, rows in batches(tokenizer, tokens, batch):
        with answering(opened, "the text"):
            hidden = call(model, rows).last_hidden_state.float()
            vectors = pool(hidden, rows["attention_mask"].to(hidden.device), pooling.ways).cpu()
        found.update(zip(indices, vectors, strict=True))
        done += len(indices)
        if progress is not None:
            progress("embed", done, len(texts))
    values = torch.stack([found[i] for i in range(len(texts))]).numpy()
    return Embeddings(texts, values, sum(map(len, tokens.ids)), time.perf_counter() - begin, notes)


def _encoder(model: Any) -> Any:
    """The part that turns tokens into hidden states."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def pool(hidden: Tensor, mask: Tensor, ways: tuple[str, ...]) -> Tensor:
    """hidden (n, t, d), mask (n, t) of zeros and ones -> (n, d) for each way, of length 1 together."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    places = torch.arange(mask.shape[1], device=mask.device)
    row = torch.arange(len(mask), device=mask.device)
    parts = []
    for way in ways:
        if way == "mean":
            parts.append((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
        elif way == "max":
            parts.append(hidden.masked_fill(weight == 0, -torch.inf).amax(1))
        else:  # texts may be padded on either side
            at = (places * mask).argmax(1) if way == "last" else mask.argmax(1)
            parts.append(hidden[row, at])
    return F.normalize(torch.cat(parts, dim=-1), dim=-1)


# --- the files of sentence-transformers -------------------------------------------------------------------------------


def read_pooling(folder: Path | None) -> Pooling:
    """What the files of sentence-transformers in a folder say; the mean where there are none.

    Raises:
        BadInput: they ask for something else than a transformer, a pooling that is known here, and unit length.
    """
    if folder is None or not (folder / MODULES).is_file():
        return Pooling()
    path = None
    for kind, where in _modules(folder):
        if kind == "Pooling":
            path = folder / where / "config.json"
        elif kind not in ("Transformer", "Normalize"):
            raise BadInput(
                f"{folder / MODULES} has a {kind} layer, which is not run here: use sentence-transformers for this model"
            )
    if path is None:
        raise BadInput(f"{folder / MODULES} names no pooling, and without one there is no vector of a text")
    ways = _ways(path)
    limits = read_json(folder / TRANSFORMER) if (folder / TRANSFORMER).is_file() else {}
    length = limits.get("max_seq_length")
    return Pooling(
        ways, length if isinstance(length, int) and length > 0 else None, limits.get("do_lower_case") is True,
        _prompt(folder), stated=True,
    )  # fmt: skip


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class, folder) of each step, in order."""
    file = folder / MODULES
    try:
        rows = json.loads(file.read_bytes())
        found = [(str(row["type"]).rpartition(".")[2], str(row["path"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} cannot be read: {first_line(error)}") from error
    for _, where in found:
        if where and (Path(where).is_absolute() or ".." in Path(where).parts):
            raise BadInput(f"{file} names the folder {where!r}, which climbs out of its own: it is not to be trusted")
    return found


def _ways(file: Path) -> tuple[str, ...]:
    """The ways of pooling that are switched on in a `1_Pooling/config.json`."""
    said = read_json(file)
    chosen = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    if isinstance(said.get("pooling_mode"), str):  # one name instead of switches
        chosen = [next((name for name, way in WAYS.items() if way == said["pooling_mode"]), said["pooling_mode"])]
    unknown = [name for name in chosen if name not in WAYS]
    if unknown or not chosen:
        raise BadInput(
            f"{file} pools by {unknown[0] if unknown else 'nothing'}, and known here are {', '.join(WAYS)}: use "
            "sentence-transformers for this model"
        )
    if said.get("include_prompt") is False:
        raise BadInput(
            f"{file} leaves the prompt out of the pooling, which is not done here: use sentence-transformers"
        )
    return tuple(way for name, way in WAYS.items() if name in chosen)


def _prompt(folder: Path) -> str:
    """What stands before every text, where a default is named."""
    if not (folder / PROMPTS).is_file():
        return ""
    said = read_json(folder / PROMPTS)
    name, prompts = said.get("default_prompt_name"), said.get("prompts")
    found = prompts.get(name, "") if isinstance(prompts, dict) and isinstance(name, str) else ""
    return found if isinstance(found, str) else ""
