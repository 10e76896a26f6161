"""A task that is the user's own function: `module:function`, called with a model, gives its score."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from laconic.errors import BadInput

from .base import Batch, Progress, Task
from .metrics import Evaluation, Metric

__all__ = ["FunctionTask", "find_function", "is_function_name"]

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_function_name(text: str) -> bool:
    """Whether a text has the form `module:function`."""
    return _NAME.fullmatch(text) is not None


def find_function(target: str) -> Callable:
    """Import `module:function`, also from the current folder.

    Raises:
        BadInput: there is no such module or function, or importing it fails.
    """
    path, _, name = target.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(path)
    except Exception as error:  # the user's own module may raise anything
        raise BadInput(
            f"{target}: the module {path} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadInput(f"{target}: the module {path} has no function {name}")
        found = getattr(found, part)
    if not callable(found):
        raise BadInput(f"{target} is not a function but a {type(found).__name__}")
    return found


class FunctionTask(Task):
    """Scores a model by the user's function.

    `score(model)`, or `score(model, split)` to measure other examples for selection than for verification. It
    returns one number, or an array with one score per example (an interval needs that), or a pair of either
    and a dict of further figures. What it is told about itself stands in attributes of the function, all
    optional:

        score.higher_is_better = False      # True by default
        score.bounded = False               # True by default: a share from 0 to 1, whose drop is in points
        score.batches = lambda split: [...] # inputs to calibrate with: dicts of arguments, or tuples; else
        there are none

    Args:
        id: `module:function`.
        score: the function.
    """

    def __init__(self, id: str, score: Callable, *, seed: int = 0, batch: int = 32):
        metric = Metric(
            getattr(score, "__name__", id),
            bool(getattr(score, "higher_is_better", True)),
            bool(getattr(score, "bounded", True)),
        )
        super().__init__(id, metric, seed=seed, batch=batch)
        self.score = score
        wanted = [
            p
            for p in inspect.signature(score).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self.takes_split = len(wanted) > 1
        inputs = callable(getattr(score, "batches", None))
        self.splits = (
            *(("calibrate",) if inputs else ()),
            *(("select",) if self.takes_split else ()),
            "verify",
        )
        if not inputs:
            self.notes.append(
                f"{id} offers no batches to calibrate with: only methods that need no data can be used"
            )
        if not self.takes_split:
            self.notes.append(
                f"{id} takes no split: it is called once, to verify, and nothing can be selected by it"
            )

    def rows(self, split: str, seq: int | None = None) -> Batch:
        raise BadInput(f"the inputs of {self.id} cannot be told apart; it gives whole batches")

    def batches(
        self, split: str, batch: int | None = None, seq: int | None = None, limit: int | None = None
    ) -> list[Batch]:
        """The first `limit` of `score.batches(split)`; batch and seq are the function's own affair."""
        if split not in self.splits or not callable(getattr(self.score, "batches", None)):
            raise BadInput(
                f"{self.id} has no inputs for {split!r}: give the function an attribute batches, a function "
                "of the split"
            )
        found = list(self.score.batches(split))[:limit]
        return [b if isinstance(b, (dict, tuple)) else (b,) for b in found]

    def measure(self, model: nn.Module, split: str, progress: Progress | None) -> Evaluation:
        if split not in self.splits:
            raise BadInput(
                f"{self.id} has no {split!r} split; let it take a second argument, the split's name"
            )
        with torch.no_grad():
            found = self.score(model, split) if self.takes_split else self.score(model)
        found, also = (
            found
            if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)
            else (found, {})
        )
        if isinstance(found, torch.Tensor):
            found = found.detach().cpu()
        try:
            if found is None:  # which numpy takes for NaN
                raise TypeError
            scores = np.atleast_1d(np.asarray(found, np.float64))
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"{self.id} must return a number or an array of numbers, it returned {type(found).__name__}"
            ) from error
        if scores.ndim != 1 or not len(scores):
            raise BadInput(
                f"{self.id} must return one number per example, it returned an array of shape {scores.shape}"
            )
        self.sizes[split] = len(scores)
        also = {str(name): float(value) for name, value in also.items()}
        return Evaluation(self.metric.value(scores), scores, also)
