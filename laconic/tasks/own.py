"""Examples that a model makes itself, where there are none: `--data self`.

A language model writes texts; a network with batch norms gets pictures whose statistics are those that they remember
(`laconic.core.synthesis`). Layers then meet inputs of about the right size and shape, which is what calibration needs. A
drop on them says how far the outputs moved, and nothing of how well the model does on real data: the task's note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from laconic.core.synthesis import Pixels, generated_text, matched_inputs
from laconic.errors import BadInput

from .base import SPLITS, Batch, Task
from .fidelity import FidelityTask
from .language import PerplexityTask
from .view import ModelView

__all__ = ["SELF", "own_task"]

SELF = "self"  # the name that data have
TEXTS = {"calibrate": 32, "select": 12, "verify": 16}
PICTURES = {"calibrate": 24, "select": 12, "verify": 24}
LENGTH = 64  # tokens of a text, where the user does not say
STEPS = 100  # of training pictures
NOTE = (
    "the model made its own examples: a drop on them says how far its outputs moved, not how well it does on real data"
)


def own_task(source: Any, seed: int = 0, batch: int | None = None, seq: int | None = None) -> Task:
    """A task of examples that the source's model makes.

    Args:
        source: the model (`laconic.pipeline.source.Source`).
        seed: of all that is drawn.
        batch: examples to a batch.
        seq: tokens of a text.

    Raises:
        BadInput: the model neither writes nor remembers statistics of pictures.
    """
    if source is None:
        raise BadInput(f"data {SELF!r} are made by a model, and none was given: name the model")
    view, model = ModelView.of(source, None), source.load().eval()
    if view.writes:
        task: Task = _written(model, seed, batch, seq or LENGTH)
    elif any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules()):
        task = _remembered(source, model, seed, batch or 32)
    else:
        raise BadInput(
            f"{source.name} ({view.kind}) neither writes text nor has batch norms that remember their inputs, so it cannot "
            "make its own examples: give data"
        )
    task.notes.append(NOTE)
    return task


def _written(model: nn.Module, seed: int, batch: int | None, length: int) -> PerplexityTask:
    """Texts, each split its own."""
    if length < 2:
        raise BadInput(f"seq is {length}: a text has two tokens at least, or there is nothing to predict")
    texts = generated_text(_Plain(model), sum(TEXTS.values()), length, seed=seed)
    windows = {split: part.cpu().numpy() for split, part in _dealt(texts, TEXTS).items()}
    return PerplexityTask(SELF, windows, seed=seed, batch=batch)


class _Plain(nn.Module):
    """A language model as ids -> logits, without a cache of what it saw."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def _remembered(source: Any, model: nn.Module, seed: int, batch: int) -> FidelityTask:
    """Pictures of the shape of the example."""
    args, kwargs = source.example()
    named = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    given = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
    if len(given) != 1 or not given[0].is_floating_point() or given[0].ndim < 3:
        shapes = ", ".join(str(tuple(value.shape)) for value in given) or "nothing"
        raise BadInput(
            f"{source.name} reads {shapes}, and examples are made for networks that read one picture: give data"
        )
    name = next(iter(named), None)
    shape = tuple(given[0].shape[1:])
    forward: nn.Module = model if name is None else _Named(model, name)
    made = matched_inputs(forward, _pixels(shape), steps=STEPS, seed=seed).inputs
    parts = _dealt(made, PICTURES)
    inputs: dict[str, Batch] = {split: (part,) if name is None else {name: part} for split, part in parts.items()}
    return FidelityTask(SELF, inputs, seed=seed, batch=batch)


class _Named(nn.Module):
    """A model that takes its picture by name."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.model(**{self.name: x})


def _pixels(shape: tuple[int, ...]) -> Callable[[], Pixels]:
    return lambda: Pixels((sum(PICTURES.values()), *shape))


def _dealt(rows: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    parts = torch.split(rows, [sizes[split] for split in SPLITS])
    return dict(zip(SPLITS, parts, strict=True))
