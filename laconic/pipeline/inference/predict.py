"""Labels with probabilities: of texts, of images, or of the tensors of an NPZ file.

A row of logits z (c,) becomes probabilities p = softmax(z); where the config says that several labels may hold at once,
p_j = 1 / (1 + exp(-z_j)). A model with one output says a number, and a module whose output is no row of numbers gives that
output as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import BadInput
from laconic.tasks.base import Batch, call, main_output
from laconic.tasks.inputs import array_inputs, image_inputs
from laconic.tasks.readers import PICTURES, Data, read_data
from laconic.tasks.view import ModelView

from .model import Opened, answering
from .texts import batches, read_texts, tokenize, tokenizer_for

__all__ = ["Predictions", "predict"]


@dataclass(frozen=True)
class Predictions:
    """What a model says about some inputs.

    Attributes:
        names: of the inputs.
        outputs: (n, ...) float32, the logits of a classifier.
        probabilities: (n, c) float32, or None where the outputs are none of labels.
        labels: names of the c classes; numbers where nothing names them.
        seconds: that reading the inputs and the model took.
        notes: sentences on what was decided.
    """

    names: list[str]
    outputs: np.ndarray
    probabilities: np.ndarray | None
    labels: list[str]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def best(self, row: int, k: int) -> list[tuple[str, float]]:
        """The k most probable labels of an input; none if the outputs are none of labels."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities[row], kind="stable")[:k]
        return [(self.labels[i], float(self.probabilities[row, i])) for i in order]

    def to_json(self, k: int) -> dict[str, Any]:
        """As the command line prints it, with the k most probable labels of each input."""
        answers: list[dict[str, Any]] = []
        for row, name in enumerate(self.names):
            found = [{"label": label, "probability": p} for label, p in self.best(row, k)]
            answers.append({"input": name} | ({"labels": found} if found else {"output": self.outputs[row].tolist()}))
        return {"answers": answers, "inputs": len(self.names), "seconds": self.seconds, "notes": self.notes}


def predict(
    opened: Opened,
    inputs: Sequence[str] = (),
    *,
    file: str | None = None,
    columns: Mapping[str, str] | None = None,
    batch: int = 32,
    seq: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Predictions:
    """Run a model over inputs.

    Args:
        opened: a classifier of texts or images; of any other model the inputs are an NPZ file.
        inputs: texts; or image files and folders; or one NPZ file with arrays named after the model's inputs.
        file: of texts, a line each, or a table.
        columns: which column of a table or array of an NPZ file is what.
        batch: inputs at a time.
        seq: cut texts to this many tokens.
        progress: is called with (stage, done, total).

    Raises:
        BadInput: no inputs, or none that this model reads.
    """
    view, begin = opened.view(), time.perf_counter()
    names, parts, notes = _inputs(opened, view, inputs, file, columns, batch, seq)
    found: dict[int, Tensor] = {}
    for indices, rows in parts:
        with answering(opened, "the inputs"):
            output = main_output(call(opened.model, rows))
        if output.dim() == 0 or len(output) != len(indices):
            raise BadInput(
                f"{opened.name} gives an output of shape {tuple(output.shape)} for {len(indices)} inputs: there is no "
                "row for each"
            )
        found.update(zip(indices, output.float().cpu(), strict=True))
        if progress is not None:
            progress("predict", len(found), len(names))
    if len({row.shape for row in found.values()}) > 1:
        raise BadInput(f"the outputs of {opened.name} have a length for each input: give them one by one")
    outputs = torch.stack([found[i] for i in range(len(names))])
    probabilities = _probabilities(outputs, opened.config, view)
    labels = _labels(opened.config, outputs.shape[-1]) if probabilities is not None else []
    said = None if probabilities is None else probabilities.numpy()
    if said is not None and view.classes is None:
        notes.append("the outputs were taken for logits: probabilities are their softmax")
    return Predictions(names, outputs.numpy(), said, labels, time.perf_counter() - begin, notes)


# --- inputs -----------------------------------------------------------------------------------------------------------

Parts = Iterator[tuple[list[int], Batch]]


def _inputs(
    opened: Opened,
    view: ModelView,
    inputs: Sequence[str],
    file: str | None,
    columns: Mapping[str, str] | None,
    batch: int,
    seq: int | None,
) -> tuple[list[str], Parts, list[str]]:
    """Names of the inputs, their batches with indices, and notes."""
    given = [*inputs, *([file] if file is not None else [])]
    arrays = [name for name in given if name.lower().endswith(".npz")]
    if arrays:
        if len(given) > 1:
            raise BadInput(f"one NPZ file is read at a time, and {len(given)} inputs were given")
        return _from_arrays(view, arrays[0], columns, batch, seq)
    if view.main == "input_ids" and view.classes is not None:
        return _from_texts(view, read_texts(inputs, file, columns), batch, seq)
    is_plain = view.main is None
    if is_plain or (view.main == "pixel_values" and view.classes is not None):
        if not given:
            raise BadInput("there is no input: name images, a folder of them, or an NPZ file")
        if not is_plain or _pictures(given[0]):
            return _from_images(view, given, batch)
    raise BadInput(
        f"{opened.name} is a {view.kind}, which is no classifier of texts or images: give an NPZ file with arrays named "
        f"after its inputs{'' if is_plain else f' ({view.main})'}"
    )


def _from_texts(view: ModelView, texts: list[str], batch: int, seq: int | None) -> tuple[list[str], Parts, list[str]]:
    tokenizer = tokenizer_for(view, "the text")
    tokens = tokenize(tokenizer, texts, view, seq)
    notes = [f"{tokens.cut} of {len(texts)} texts were cut to {tokens.limit} tokens"] if tokens.cut else []
    # Decoders with a classifier on top look for the last token before the padding.
    size = batch if getattr(view.source.config, "pad_token_id", None) is not None else 1
    return texts, batches(tokenizer, tokens, size), notes


def _from_images(view: ModelView, given: Sequence[str], batch: int) -> tuple[list[str], Parts, list[str]]:
    files: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        if not path.exists():
            raise BadInput(f"{name} is neither an image nor a folder of images: there is no such file")
        files += read_data(path, {}).images or [] if path.is_dir() else [path]
    data = Data(given[0], images=files)
    first, notes = image_inputs(data, {"first": np.arange(min(batch, len(files)))}, view)

    def parts() -> Parts:
        yield list(range(min(batch, len(files)))), first["first"]
        for start in range(batch, len(files), batch):
            chosen = np.arange(start, min(start + batch, len(files)))
            yield chosen.tolist(), image_inputs(data, {"next": chosen}, view)[0]["next"]

    return [str(file) for file in files], parts(), notes


def _pictures(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_dir() or path.suffix.lower() in PICTURES


def _from_arrays(
    view: ModelView, name: str, columns: Mapping[str, str] | None, batch: int, seq: int | None
) -> tuple[list[str], Parts, list[str]]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadInput(f"{name} is no file")
    data = read_data(path, columns or {})

    def parts() -> Parts:
        for start in range(0, len(data), batch):
            chosen = np.arange(start, min(start + batch, len(data)))
            yield chosen.tolist(), array_inputs(data, {"rows": chosen}, view, seq)["rows"]

    return [f"row {i}" for i in range(len(data))], parts(), []


# --- answers ----------------------------------------------------------------------------------------------------------


def _probabilities(outputs: Tensor, config: Any, view: ModelView) -> Tensor | None:
    """Probabilities of logits (n, c); None where the outputs are none of labels."""
    outputs = outputs.flatten(1) if view.classes is not None else outputs
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return None
    if getattr(config, "problem_type", None) == "regression" or (config is not None and view.classes is None):
        return None
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return outputs.sigmoid()
    return outputs.softmax(-1)


def _labels(config: Any, n: int) -> list[str]:
    known = getattr(config, "id2label", None) or {}
    return [str(known.get(i, i)) for i in range(n)]
