"""The tasks that come with laconic: what each is called, which model it brings, and where it is loaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Task

__all__ = ["TASKS", "Bundled", "own_model"]


@dataclass(frozen=True)
class Bundled:
    """A task that comes with laconic.

    Attributes:
        model: the fetched name of the model that it brings, one of `MODELS`.
        module: where it is; imported when it is loaded.
    """

    model: str
    module: str

    def load(self, **options: Any) -> Task:
        """The task; options are those of its module's `load`: seed, batch, seq, cache."""
        return importlib.import_module(self.module).load(**options)


TASKS = {
    "minilm-bbc": Bundled("minilm", "laconic.tasks.minilm_bbc"),
    "cifar-cnn": Bundled("cifar-cnn", "laconic.tasks.cifar_cnn"),
    "smollm-moby": Bundled("smollm", "laconic.tasks.smollm_moby"),
    "tiny-lm": Bundled("tiny-lm", "laconic.tasks.tiny_lm"),
}


def own_model(name: str) -> str | None:
    """The fetched name of the model that a task brings; None if there is no task of this name."""
    return TASKS[name].model if name in TASKS else None
