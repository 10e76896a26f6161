"""From a name, a file or a function to a task: which inputs, which metric, which examples for what.

The metric follows from model and data: a causal language model on text has a perplexity, a classifier on
labelled data an accuracy, and everything else is judged by how near its outputs stay to the float model's
(`fidelity.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laconic.errors import BadInput

from .base import Batch, Task, call, disjoint, main_output, short
from .bundled import TASKS
from .fidelity import FidelityTask
from .function import FunctionTask, find_function, is_function_name
from .inputs import array_inputs, image_inputs, text_inputs
from .labels import AccuracyTask
from .language import PerplexityTask, check_length
from .own import SELF, own_task
from .readers import FORMATS, Data, read_data
from .view import ModelView

__all__ = ["TASKS", "check_counts", "load_task"]

AT_LEAST = 10  # examples, or windows of text
SHARES = {"calibrate": 0.2, "select": 0.2, "verify": 0.6}
# More examples than these are left out: a drop is known well enough from so many, and the user is waiting.
MOST_ROWS = {"calibrate": 512, "select": 512, "verify": 5000}
MOST_IMAGES = {"calibrate": 128, "select": 256, "verify": 1000}
MOST_WINDOWS = {"calibrate": 128, "select": 64, "verify": 256}
WINDOW, SHORTEST_WINDOW = 512, 16  # tokens, where the user does not say


def load_task(
    data: str | os.PathLike[str] | Callable | Task,
    source: Any = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    *,
    batch: int | None = None,
    seq: int | None = None,
    tokenizer: Any = None,
    cache: str | os.PathLike[str] | None = None,
) -> Task:
    """The task for some data.

    Args:
        data: the name of a task, a file or an image folder, `module:function` or a function that scores a
            model, or a task; "self": the model makes its own examples (see `laconic.tasks.own`).
        source: the model (`laconic.pipeline.source.Source`); the user's files need one to become inputs.
        columns: role -> column of a table (text, label, image), or input name -> array of an NPZ file.
        seed: of the splits.
        batch: examples to a batch.
        seq: tokens of a text or of a window of text.
        tokenizer: instead of the one in the model's folder.
        cache: where fetched packages lie, as in `fetch`.

    Raises:
        BadInput: with one sentence on what is wrong with the data, or with the two together.
    """
    check_counts(batch=batch, seq=seq)
    if isinstance(data, Task):
        return data
    if callable(data):
        return FunctionTask(getattr(data, "__name__", "the function"), data, seed=seed, batch=batch or 32)
    if not isinstance(data, (str, os.PathLike)):
        raise BadInput(
            f"data is a file, a folder of images, a task or a function that scores a model, not a {type(data).__name__}: "
            "save arrays with numpy.savez and name the file"
        )
    text, path = os.fspath(data), Path(data).expanduser()
    if text == SELF:
        _no_columns(columns, text)
        return own_task(source, seed, batch, seq)
    if text in TASKS:
        _no_columns(columns, text)
        return TASKS[text].load(seed=seed, batch=batch, seq=seq, cache=cache)
    if path.exists():
        if source is None:
            raise BadInput(f"{text} is data for a model, and none was given: name the model")
        return _from_file(read_data(path, columns or {}), ModelView.of(source, tokenizer), seed, batch, seq)
    if is_function_name(text):
        _no_columns(columns, text)
        return FunctionTask(text, find_function(text), seed=seed, batch=batch or 32)
    raise BadInput(
        f"{text} is no data: there is no such file, and it is not one of the tasks {', '.join(TASKS)}; "
        f"data is {FORMATS}, a task's name, module:function, or self: examples that the model makes"
    )


def check_counts(**counts: int | None) -> None:
    """Refuse a count that is given and below one.

    Raises:
        BadInput: naming it.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise BadInput(f"{name} must be at least 1, not {value}")


def _no_columns(columns: Mapping[str, str] | None, name: str) -> None:
    if columns:
        raise BadInput(
            f"columns were named ({', '.join(f'{k}={v}' for k, v in columns.items())}), but {name} has none "
            "to name"
        )


def _from_file(data: Data, view: ModelView, seed: int, batch: int | None, seq: int | None) -> Task:
    if data.texts is not None:
        view.expect("input_ids", data)
        if view.writes:
            return _perplexity_of_text(data, view, seed, batch, seq)
        data = _by_line(data)
    splits, notes = _splits(data, seed), []
    if data.texts is not None:
        inputs = text_inputs(data, splits, view, seq)
    elif data.images is not None:
        view.expect("pixel_values", data)
        inputs, notes = image_inputs(data, splits, view)
    else:
        inputs = array_inputs(data, splits, view, seq)
    if data.arrays is not None and view.writes and "input_ids" in inputs["verify"]:
        task: Task = _perplexity_of_ids(data, inputs, view, seed, batch)
    else:
        examples = {split: _examples(data, indices) for split, indices in splits.items()}
        task = _scored(data, splits, inputs, examples, view, seed, batch or 32)
    task.notes += notes
    _note_unused(task, data.name, len(data), "examples")
    return task


def _note_unused(task: Task, name: str, n: int, what: str) -> None:
    used = sum(task.sizes.values())
    if used < n:
        task.notes.append(f"{used} of the {n} {what} of {name} are used")


def _by_line(data: Data) -> Data:
    """A running text as one text for each of its lines that is not blank."""
    if not data.running:
        return data
    return Data(data.name, texts=[line for line in data.texts[0].splitlines() if line.strip()])


def _splits(data: Data, seed: int) -> dict[str, np.ndarray]:
    n = len(data)
    if n < AT_LEAST:
        raise BadInput(
            f"{data.name} has {n} example{'s' * (n != 1)}, too few to split into calibrate, select and "
            "verify: "
            f"at least {AT_LEAST} are needed"
        )
    return disjoint(n, _sizes(n, MOST_ROWS if data.images is None else MOST_IMAGES), seed)


def _sizes(n: int, most: Mapping[str, int]) -> dict[str, int]:
    """How many of n examples each split gets."""
    sizes = {split: min(most[split], int(share * n)) for split, share in SHARES.items()}
    sizes["verify"] = min(most["verify"], n - sizes["calibrate"] - sizes["select"])
    return sizes


def _examples(data: Data, indices: np.ndarray) -> list[str]:
    if data.texts is not None:
        return [short(data.texts[i]) for i in indices]
    if data.images is not None:
        return ["/".join(data.images[i].parts[-2:]) for i in indices]
    return [f"row {i}" for i in indices]


def _perplexity_of_text(
    data: Data, view: ModelView, seed: int, batch: int | None, seq: int | None
) -> PerplexityTask:
    """Cut the text, or the texts one after another, into windows, and deal the windows to the splits."""
    tokenizer = view.get_tokenizer(data)
    order = np.random.default_rng(seed).permutation(len(data.texts))
    end = [] if data.running or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer([data.texts[i] for i in order], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for row in ids for token in [*row, *end]], dtype=torch.long)
    view.check_ids(tokens, data)
    fitting = min(WINDOW, max(SHORTEST_WINDOW, len(tokens) // AT_LEAST))
    length = _window(data, view, seq) or min(fitting, view.positions() or WINDOW)
    if len(tokens) < AT_LEAST * length:
        raise BadInput(
            f"{data.name} holds {len(tokens)} tokens, too few to split into calibrate, select and verify: "
            f"at least {AT_LEAST * length} are needed ({AT_LEAST} windows of {length})"
        )
    begin = _beginning(tokenizer)
    step = length - len(begin)
    windows = tokens[: len(tokens) // step * step].reshape(-1, step).numpy()
    windows = np.concatenate([np.tile(np.array(begin, np.int64), (len(windows), 1)), windows], axis=1)
    sizes = _sizes(len(windows), MOST_WINDOWS)
    dealt = {split: windows[indices] for split, indices in disjoint(len(windows), sizes, seed).items()}
    vocabulary = getattr(view.source.config, "vocab_size", None)
    task = PerplexityTask(
        data.name, dealt, tokenizer=tokenizer, vocabulary=vocabulary, seed=seed, batch=batch
    )
    _note_unused(task, data.name, len(windows), "windows")
    if data.labels is not None:
        task.notes.append(f"the labels of {data.name} are not used: {view.name} is a language model")
    return task


def _window(data: Data, view: ModelView, seq: int | None) -> int | None:
    """The length of a window that the user asks for, if it is one that this model can be measured on."""
    if seq is None:
        return None
    most = view.positions()
    if most is not None and seq > most:
        raise BadInput(f"seq is {seq}, and {view.name} reads at most {most} tokens: take a seq of {most} at most")
    check_length(data.name, seq)
    return seq


def _beginning(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does; such models go astray without it."""
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _perplexity_of_ids(
    data: Data, inputs: dict[str, Batch], view: ModelView, seed: int, batch: int | None
) -> PerplexityTask:
    """Rows of token ids as they are; an attention mask says where the text ends."""
    windows = {split: rows["input_ids"].numpy() for split, rows in inputs.items()}
    masks = None
    if "attention_mask" in inputs["verify"]:
        masks = {split: rows["attention_mask"].long().numpy() for split, rows in inputs.items()}
    vocabulary = getattr(view.source.config, "vocab_size", None)
    return PerplexityTask(data.name, windows, masks=masks, vocabulary=vocabulary, seed=seed, batch=batch)


def _scored(
    data: Data,
    splits: dict[str, np.ndarray],
    inputs: dict[str, Batch],
    examples: dict[str, list[str]],
    view: ModelView,
    seed: int,
    batch: int,
) -> Task:
    """Accuracy where there are labels and a classifier, else fidelity."""
    why = None if data.labels is None else _no_classes(data, view)
    classes = view.classes
    if data.labels is not None and why is None:
        if classes is None and view.main is None:
            shape = _output_shape(view, inputs["verify"])
            classes = shape[-1] if shape is not None else None
            if shape is not None and len(shape) != 2:
                why = f"the output of {view.name} has the shape {shape}, not one number for each class"
        if why is None:
            labels, names = _class_numbers(data, view, classes)
            dealt = {split: labels[indices] for split, indices in splits.items()}
            return AccuracyTask(
                data.name, inputs, dealt, classes=names, examples=examples, seed=seed, batch=batch
            )
    task = FidelityTask(
        data.name, inputs, classifier=classes is not None, examples=examples, seed=seed, batch=batch
    )
    if why is not None:
        task.notes.append(f"the labels of {data.name} are not used: {why}")
    return task


def _no_classes(data: Data, view: ModelView) -> str | None:
    """Why labels cannot be classes of this model, if so."""
    if view.main is not None and (view.classes or 0) < 2:
        return f"{view.name} ({view.kind}) is no classifier"
    if isinstance(data.labels, np.ndarray) and (
        data.labels.ndim != 1 or data.labels.dtype.kind not in "iubU"
    ):
        return f"they are {data.labels.dtype} of shape {data.labels.shape}, not one class for each row"
    return None


def _output_shape(view: ModelView, rows: Batch) -> tuple[int, ...] | None:
    """The shape of a plain module's output for two examples, without arithmetic; None where that fails."""
    two = {k: v[:2] for k, v in rows.items()} if isinstance(rows, dict) else tuple(v[:2] for v in rows)
    try:
        with torch.no_grad():
            return tuple(main_output(call(view.source.skeleton().to("meta"), two)).shape)
    except (RuntimeError, TypeError, ValueError, BadInput):
        return None  # not every forward runs on meta; one that fails on the data will fail again in full view


def _class_numbers(data: Data, view: ModelView, classes: int | None) -> tuple[np.ndarray, list[str] | None]:
    """Labels as class numbers, and the classes' names.

    Whole numbers are class numbers. Names are looked up in the config; if the config has only its default
    names (LABEL_0), or the model is a plain module, they count in alphabetical order.
    """
    given = list(data.labels)
    names = None
    try:
        numbers = np.array([int(label) for label in given], np.int64)
    except (TypeError, ValueError):
        found = sorted({str(label) for label in given})
        own = {name: i for name, i in view.label2id.items() if not name.startswith("LABEL_")}
        if own:
            strange = [name for name in found if name not in own]
            if strange:
                raise BadInput(
                    f"{data.name}: the label {strange[0]!r} is not a class of {view.name}; its classes are "
                    f"{short(', '.join(own))}"
                ) from None
            names = [name for name, _ in sorted(own.items(), key=lambda item: item[1])]
            numbers = np.array([own[str(label)] for label in given], np.int64)
        else:
            names = found
            numbers = np.array([found.index(str(label)) for label in given], np.int64)
    if numbers.min() < 0:
        raise BadInput(f"{data.name}: the label {numbers.min()} is negative; classes count from 0")
    if classes is not None and numbers.max() >= classes:
        worst = names[int(numbers.max())] if names else int(numbers.max())
        raise BadInput(
            f"{data.name}: the label {worst} is beyond the {classes} classes of {view.name} (0 to "
            f"{classes - 1})"
        )
    if names is not None and classes is not None:
        names = [*names, *(f"class {i}" for i in range(len(names), classes))]
    return numbers, names
