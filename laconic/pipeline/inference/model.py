"""Opening a model that is to answer: an artifact, or a float model to compare it with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.errors import BadInput, LaconicError
from laconic.pipeline.artifact import CONFIG, is_artifact
from laconic.pipeline.load import load, usable_device
from laconic.pipeline.observe import innermost_module
from laconic.pipeline.source import Source, resolve
from laconic.pipeline.source_base import Example, first_line
from laconic.pipeline.source_quantized import opened
from laconic.tasks.base import quietly
from laconic.tasks.view import KINDS, ModelView

__all__ = ["VERBS", "Opened", "answering", "check_verb", "open_model", "verb_for"]

VERBS = ("generate", "embed", "predict")


@dataclass
class Opened:
    """A model in eval mode, and what lies with it.

    Attributes:
        name: for messages.
        model: on its device.
        config: of transformers, or None for a plain module.
        folder: where tokenizer, processor and pooling are looked for; None for a module in memory.
        device: where it runs.
        seconds: that opening took, imports aside.
        import_seconds: that importing its class from transformers took.
        source: of a float model, or of the one that an artifact was loaded into.
    """

    name: str
    model: nn.Module
    config: Any
    folder: Path | None
    device: torch.device
    seconds: float
    import_seconds: float = 0.0
    source: Source | None = None

    def skeleton(self) -> nn.Module:
        """The model itself: `ModelView` asks a source for its structure by this name."""
        return self.model

    def example(self) -> Example:
        """Inputs of the right shape, of a plain module whose float model is known.

        Raises:
            BadInput: it is not.
        """
        if self.source is None:
            raise BadInput(
                f"{self.name} does not say what shape its inputs have: give an NPZ file with what it reads, or name "
                "the float model by --into"
            )
        return self.source.example()

    def view(self) -> ModelView:
        """What it reads and says."""
        return ModelView.of(self, None)


def open_model(
    model: Any,
    *,
    into: Any = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Opened:
    """Load an artifact, or anything that `compress` takes.

    Args:
        model: the folder of an artifact, or else a Hugging Face folder, a fetched name, `module:function` or a module.
        into: the float model that an artifact was made of, named likewise; for artifacts that `laconic.load` cannot
            build by itself.
        device: where it will run.
        trust_remote_code, allow_pickle: as in `compress`.

    Raises:
        BadInput: there is no such model or device, or `into` is given with a float model.
    """
    place = usable_device(device)
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    folder = Path(model).expanduser() if isinstance(model, (str, os.PathLike)) else None
    start = time.perf_counter()
    if folder is not None:
        _import_class(folder)
    begin = time.perf_counter()
    if folder is not None and is_artifact(folder):
        source = None if into is None else resolve(into, **options)
        skeleton = None if source is None else source.skeleton()
        found = load(folder, into=skeleton, device=place, trust_remote_code=trust_remote_code)
        name = folder.resolve().name
    else:
        if into is not None:
            raise BadInput(f"{model} is no artifact of laconic, and only those are loaded into another model")
        source = resolve(model, quantized=True, **options)
        with quietly():
            found = opened(source).to(place).eval()
        name, folder = source.name, _folder_of(source)
    config = getattr(found, "config", None) if hasattr(found, "can_generate") else None
    return Opened(name, found, config, folder, place, time.perf_counter() - begin, begin - start, source)


def _import_class(folder: Path) -> None:
    """Import what a folder's config names, which takes longer than loading does; what is wrong with it comes up there."""
    if not (folder / CONFIG).is_file():
        return
    import transformers

    from laconic.pipeline import hf  # noqa: F401

    try:
        names = json.loads((folder / CONFIG).read_bytes())["architectures"]
        getattr(transformers, names[0], None)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return


def _folder_of(source: Any) -> Path | None:
    """Where the files of a source lie: its folder, or that of its GGUF file, which brings its own tokenizer."""
    folder, file = getattr(source, "folder", None), getattr(source, "file", None)
    return Path(folder) if folder is not None else Path(file).parent if file is not None else None


# --- what a model is made for -----------------------------------------------------------------------------------------


def verb_for(opened: Opened) -> str:
    """What a model is made for: a classifier predicts, a language model generates, another reader of text embeds.

    Everything else predicts, which for a model of unknown kind means: tensors in, tensors out.
    """
    view = opened.view()
    if view.classes is not None or view.main != "input_ids" or view.mixed:
        return "predict"
    return "generate" if _writes(opened) else "embed"


def check_verb(opened: Opened, verb: str) -> None:
    """Refuse what a model cannot do.

    Raises:
        BadInput: saying what it is, and what it is made for.
    """
    view, own = opened.view(), verb_for(opened)
    advice = f"run it with {own}"
    if verb == "predict":
        return  # which depends on the inputs
    if view.main is None:
        raise BadInput(f"{opened.name} is a {view.kind}, a module that knows of no text, and cannot {verb}: {advice}")
    if view.main != "input_ids" or view.mixed:
        reads = "text and images together" if view.mixed else KINDS.get(view.main, view.main)
        raise BadInput(f"{opened.name} is a {view.kind}, which reads {reads}, and cannot {verb} from text: {advice}")
    if verb == "generate" and not _writes(opened):
        raise BadInput(f"{opened.name} is a {view.kind}, which does not write text, and cannot generate: {advice}")


def _writes(opened: Opened) -> bool:
    can: Callable[[], bool] | None = getattr(opened.model, "can_generate", None)
    return can is not None and can()


@contextmanager
def answering(opened: Opened, what: str) -> Iterator[None]:
    """Run a model without gradients; what its forward raises becomes one sentence with the place.

    Raises:
        BadInput: the model fails on `what`.
    """
    try:
        with torch.inference_mode():
            yield
    except (LaconicError, MemoryError, OSError):  # the last is no model's: whoever reads our text hung up
        raise
    except Exception as error:  # the forward of a model may raise anything
        where = innermost_module(opened.model, error)
        raise BadInput(f"{opened.name} fails on {what}{where}: {type(error).__name__}: {first_line(error)}") from error
