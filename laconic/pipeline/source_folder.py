"""A Hugging Face folder as a source: built on meta as `from_pretrained` builds it, read tensor by tensor."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.pipeline.source_base import Example, Source, all_tensors, first_line, stored_names
from laconic.pipeline.source_config import model_class, read_config, set_dtype, transformers_config
from laconic.pipeline.source_example import example_inputs
from laconic.pipeline.source_skeleton import build
from laconic.pipeline.source_weights import Store, model_dtype, open_weights
from laconic.pipeline.tensorfile import row_range

__all__ = ["FolderSource", "copy_extras"]

GENERATION = "generation_config.json"
# What a model needs besides config and weights. Weights, pickles and code never match.
EXTRAS = (
    GENERATION,
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.spm",
    "sp*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "modules.json",  # these three are sentence-transformers'
    "*sentence_*.json",
    "[0-9]_*/config.json",
    "LICENSE*",
    "NOTICE*",
)


class FolderSource(Source):
    """A folder with `config.json` and safetensors (or, if allowed, pickled) weights.

    Args:
        folder: the folder.
        trust_remote_code: run the code that comes with the checkpoint if its architecture needs it.
        allow_pickle: read `pytorch_model.bin` (with `weights_only`) where there are no safetensors.

    Raises:
        BadInput: if config and weights don't make a complete float model.
    """

    kind = "transformers"

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False):
        raw = read_config(folder)
        config = transformers_config(folder, raw, trust_remote_code)
        cls = model_class(folder, raw, config, trust_remote_code)
        self._build(folder, raw, config, cls, open_weights(folder, allow_pickle))

    def _build(
        self, folder: Path, raw: dict[str, Any], config: Any, cls: type, store: Store, dtype: torch.dtype | None = None
    ) -> None:
        """Put config and weights together; `dtype` is what the config and the files say, unless it is given."""
        self.folder, self._raw, self.config, self._class, self._store = folder, raw, config, cls, store
        self.name = folder.resolve().name
        self.size_before = store.size
        dtype = dtype or model_dtype(config, store)
        set_dtype(config, dtype)
        self._plan = build(cls, config, dtype, store, folder)
        self._read_generation_config()
        self.notes = [*store.notes, *self._plan.notes]
        tensors = all_tensors(self._plan.model)
        self._specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._names = stored_names(self._plan.model)

    def _read_generation_config(self) -> None:
        from transformers import GenerationConfig

        if not self._plan.model.can_generate() or not (self.folder / GENERATION).is_file():
            return
        try:
            config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{self.folder / GENERATION} cannot be read: {first_line(error)}") from error
        self._plan.model.generation_config = config

    def skeleton(self) -> nn.Module:
        """A new copy of the model on meta; buffers that no file holds are real."""
        return copy.deepcopy(self._plan.model)

    def names(self) -> list[str]:
        """Every parameter and persistent buffer once, in the module's order."""
        return list(self._names)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, as the module holds it."""
        return self._specs[name]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows of a tensor. Only its own sources are read, and of stacked experts only those asked for."""
        dtype, shape = self._specs[name]
        whole = start is None and stop is None
        first, last = (0, None) if whole else row_range(name, shape, start, stop)
        stored = self._plan.stored_as.get(name)
        if stored is None:
            given = self._plan.given[name]
            return (given if whole else given[first:last]).clone()
        origin = self._plan.origins[stored]
        if origin.converter is None:
            return self._store.read(origin.sources[0][1], start, stop).to(dtype)

        def source(disk: str) -> Tensor:
            return self._store.read(disk).to(dtype)

        if not whole and last > first and origin.takes_rows():
            return origin.convert(source, self._plan.model, slice(first, last))[stored].contiguous()
        made = origin.convert(source, self._plan.model)[stored]
        return made.contiguous() if whole else made[first:last].clone()

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's dtype, shape and bytes; streamed where a file holds it as it is."""
        stored = self._plan.stored_as.get(name)
        if stored is not None and self._plan.origins[stored].converter is None:
            disk = self._plan.origins[stored].sources[0][1]
            if self._store.spec(disk) == self._specs[name]:
                return self._store.digest(disk)
        return super().digest(name)

    def example(self) -> Example:
        """Tiny inputs by the model's modality."""
        return example_inputs(self._class, self.config)

    def save_extras(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json (with dtype and architecture, not quantized), tokenizer and processor files."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        raw = {
            key: value
            for key, value in self._raw.items()
            if key not in ("torch_dtype", "auto_map", "_name_or_path")
        }
        raw["architectures"] = [self._class.__name__]
        raw["dtype"] = str(self.config.dtype).removeprefix("torch.")
        remote = not self._class.__module__.startswith("transformers.")
        if remote:
            raw["auto_map"] = self._raw["auto_map"]
        (target / "config.json").write_text(
            json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        copy_extras(self.folder, target, (*EXTRAS, "*.py") if remote else EXTRAS)


def copy_extras(folder: Path, target: Path, patterns: tuple[str, ...] = EXTRAS) -> None:
    """Copy the files of `folder` that match one of the patterns."""
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        copied = target / file.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)
