"""One call from what the command line says to an answer: open the model, choose the verb, read the inputs, run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laconic.errors import BadInput
from laconic.pipeline.measure import peak_rss

from .embed import Embeddings, embed
from .generate import Generation, generate
from .model import VERBS, Opened, check_verb, open_model, verb_for
from .predict import Predictions, predict
from .texts import read_prompt, read_texts

__all__ = ["Answer", "answer"]

# Which options mean something to which verb; the others are refused, not ignored.
OPTIONS = {
    "generate": ("max_new_tokens", "temperature", "top_k", "top_p", "chat"),
    "embed": ("columns", "batch", "seq", "out"),
    "predict": ("columns", "batch", "seq", "out", "top_k"),
}
LABELS = 5  # shown of an input, where the user does not say


@dataclass(frozen=True)
class Answer:
    """What came of running a model.

    Attributes:
        verb: that was run.
        found: what it gave.
        opened: the model.
        labels: shown of each input of `predict`.
        notes: sentences on what was decided.
        out: the file that was written, or None.
    """

    verb: str
    found: Generation | Embeddings | Predictions
    opened: Opened
    labels: int
    notes: list[str]
    out: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """As the command line prints it. Arrays that a file holds are not repeated."""
        found = self.found
        record = found.to_json(self.labels) if isinstance(found, Predictions) else found.to_json()
        if self.out is not None:
            record = {key: value for key, value in record.items() if key not in ("given", "embeddings", "answers")}
        device = self.opened.device
        return {
            "verb": self.verb, "model": self.opened.name, "class": type(self.opened.model).__name__, **record,
            "notes": self.notes, "load_seconds": self.opened.seconds, "import_seconds": self.opened.import_seconds,
            "peak_rss_bytes": peak_rss(), "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "device": str(device), "threads": torch.get_num_threads(), "out": None if self.out is None else str(self.out),
        }  # fmt: skip


def answer(
    model: Any,
    inputs: Sequence[str] = (),
    *,
    verb: str | None = None,
    file: str | None = None,
    out: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    into: Any = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Answer:
    """Run a model on some inputs.

    Args:
        model, into, device, trust_remote_code, allow_pickle: as in `open_model`.
        inputs: a prompt, texts, images or an NPZ file, as typed; `-` is standard input.
        verb: "generate", "embed" or "predict"; what the model is made for by default.
        file: of a prompt, of lines, of a table.
        out: an NPZ file to write: `embeddings`, or `outputs` and `probabilities` with the names of the `labels`.
        columns: which column or array is what.
        seed: of draws.
        say: is told which verb was chosen, where none was named.
        on_text: is given the text of `generate` as it comes.
        progress: is called with (stage, done, total).
        options: of the verb, as its function has them; None counts as not given.

    Raises:
        BadInput: model, inputs and options do not go together.
    """
    if verb is not None and verb not in VERBS:
        raise BadInput(f"{verb} is no verb: those that there are: {', '.join(VERBS)}")
    if out is not None and Path(out).suffix != ".npz":
        raise BadInput(f"{os.fspath(out)} must end with .npz, which is what is written")
    given = {name: value for name, value in {**options, "out": out, "columns": columns}.items() if value is not None}
    texts = None if verb is None else _read(verb, given, inputs, file, columns)  # before the model, which takes longer
    opened = open_model(model, into=into, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if verb is None:
        verb = verb_for(opened)
        if say is not None:
            say(f"{opened.name} is a {opened.view().kind}, so it is run with {verb}, as no verb was named")
        texts = _read(verb, given, inputs, file, columns)
    assert texts is not None
    check_verb(opened, verb)
    labels = options.get("top_k") or LABELS
    given = {name: value for name, value in given.items() if name not in ("out", "columns")}
    found: Generation | Embeddings | Predictions
    if verb == "generate":
        found = generate(opened, texts[0], seed=seed, on_text=on_text, **given)
    elif verb == "embed":
        found = embed(opened, texts, progress=progress, **given)
    else:
        given.pop("top_k", None)
        found = predict(opened, inputs, file=file, columns=columns, progress=progress, **given)
    target = None if out is None else _write(Path(out).expanduser(), found)
    return Answer(verb, found, opened, labels, found.notes, target)


def _read(
    verb: str, given: Mapping[str, Any], inputs: Sequence[str], file: str | None, columns: Mapping[str, str] | None
) -> list[str]:
    """The texts for a verb, none for `predict`: what its inputs are depends on the model. Foreign options are refused."""
    for name in given:
        if name not in OPTIONS[verb]:
            owners = [other for other in VERBS if name in OPTIONS[other]]
            option = f"--{name.replace('_', '-')}"
            raise BadInput(f"{option} is an option of {' and '.join(owners)}, and {verb} is run: leave it out")
    if verb == "generate":
        return [read_prompt(inputs, file)]
    return read_texts(inputs, file, columns) if verb == "embed" else []


def _write(file: Path, found: Any) -> Path:
    """An NPZ file, put in place when it is complete."""
    if isinstance(found, Embeddings):
        arrays = {"embeddings": found.values}
    else:
        arrays = {"outputs": found.outputs}
        if found.probabilities is not None:
            arrays |= {"probabilities": found.probabilities, "labels": np.array(found.labels)}
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(part, file)
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from error
    return file
