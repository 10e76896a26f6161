"""Data as probes and calibrators read them: inputs with classes, inputs alone, tokens, calls with targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.core import depth
from laconic.core.modes import evaluating
from laconic.errors import BadInput
from laconic.tasks import Task
from laconic.tasks.base import Batch, call, call_arguments, main_output
from laconic.tasks.labels import AccuracyTask
from laconic.tasks.language import PerplexityTask

__all__ = ["Answering", "calls_of", "inputs_of", "labelled", "tokens_of"]


class Answering(nn.Module):
    """A model that takes one tensor and gives its logits, whatever it takes and gives by itself.

    Args:
        model: kept as it is.
        names: of its inputs, which come stacked along the second dimension if they are several; None for one by position.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None):
        super().__init__()
        self.model, self.names = model, names
        if hasattr(model, "input_range"):
            self.input_range = model.input_range

    def forward(self, x: Tensor) -> Tensor:
        if self.names is None:
            return main_output(call(self.model, (x,)))
        columns = (x,) if len(self.names) == 1 else x.unbind(1)
        return main_output(call(self.model, dict(zip(self.names, columns, strict=True))))


def labelled(model: nn.Module, task: Task, split: str, limit: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """The model as a function of one tensor, and inputs and classes (n,) of a split.

    Raises:
        BadInput: the task has no classes, or several inputs of different shapes.
    """
    labels = getattr(task, "labels", None)
    if not isinstance(labels, Mapping) or split not in labels:
        raise BadInput(f"{task.id} has no labelled examples, and classes are needed: name a column with label=...")
    classes = torch.as_tensor(np.asarray(labels[split]))[:limit]
    if classes.ndim != 1 or classes.is_floating_point():
        raise BadInput(f"the labels of {task.id} are {tuple(classes.shape)} {classes.dtype}: classes (n,) are needed")
    names, x = inputs_of(task, split, limit)
    plain = names is None and isinstance(_first(model, x), Tensor)
    return (model if plain else Answering(model, names)), x, classes


def inputs_of(task: Task, split: str, limit: int | None = None) -> tuple[tuple[str, ...] | None, Tensor]:
    """Names of the model's inputs (None: one, by position), and a split's inputs as one tensor.

    Raises:
        BadInput: there are several inputs, of different shapes or types.
    """
    batches = task.batches(split, limit=limit)
    rows: list[Batch] = list(batches)
    if not isinstance(rows[0], Mapping):
        if len(rows[0]) != 1:
            raise BadInput(f"{task.id} gives its model {len(rows[0])} inputs by position, and one is read here")
        return None, torch.cat([row[0] for row in rows])  # type: ignore[index]
    names = tuple(rows[0])
    columns = [torch.cat([row[name] for row in rows]) for name in names]  # type: ignore[index]
    if len(names) == 1:
        return names, columns[0]
    if len({(column.shape, column.dtype) for column in columns}) != 1:
        raise BadInput(f"{task.id} gives its model {', '.join(names)} of different shapes, and one shape is read here")
    return names, torch.stack(columns, 1)


def tokens_of(task: Task, split: str, limit: int | None = None) -> Tensor:
    """Tokens (n, t) of a split.

    Raises:
        BadInput: the task's data are no tokens.
    """
    first = task.batches(split, limit=limit)
    if not isinstance(first[0], Mapping) or "input_ids" not in first[0]:
        raise BadInput(f"{task.id} gives no tokens, and a language model's are read here: give a text")
    return torch.cat([batch["input_ids"] for batch in first])  # type: ignore[call-overload]


def calls_of(model: nn.Module, task: Task, split: str, limit: int | None = None) -> list[depth.Batch]:
    """The model's calls on a split, with classes or next tokens as targets where the task asks for these."""
    found, start = [], 0
    for batch in task.batches(split, limit=limit):
        args, kwargs = call_arguments(model, batch)
        target: Tensor | None = None
        if isinstance(task, PerplexityTask) and isinstance(batch, Mapping):
            target = _next_tokens(batch["input_ids"], batch.get("attention_mask"))
        elif isinstance(task, AccuracyTask):
            count = depth.Batch(args, kwargs).examples
            target = torch.as_tensor(np.asarray(task.labels[split][start : start + count])).long()
            start += count
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        found.append(depth.Batch(args, kwargs, None if target is None else target.to(device)))
    return found


def _next_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """(n, t): the token behind each position; none at the end, and where it or the position is padding."""
    target = ids.new_full(ids.shape, depth.IGNORED)
    target[:, :-1] = ids[:, 1:]
    if mask is not None:
        target[:, :-1][(mask[:, 1:] * mask[:, :-1]) == 0] = depth.IGNORED
    return target


@torch.no_grad()
def _first(model: nn.Module, x: Tensor) -> Any:
    """What the model gives for one example, in evaluation mode."""
    with evaluating(model):
        return call(model, (x[:1],))
