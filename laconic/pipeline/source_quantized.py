"""Checkpoints that another tool quantized, as sources: GGUF files, and folders whose config.json says so.

`load_packed` gives the model as it is stored, its matrices packed in our form with the same values, on our kernels; nothing is
rounded again. `read` and `load` give floats, so that `compress` can start from a file where there is nothing better.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.core.record import Record, apply_records
from laconic.errors import BadInput
from laconic.interop.checkpoints import Checkpoint, checkpoint_format
from laconic.interop.gguf import GgufModel
from laconic.interop.gguf_file import GgufFile
from laconic.nn.packed import op_of
from laconic.pipeline.source_base import Source, all_tensors, first_line
from laconic.pipeline.source_config import model_class, read_json_config, transformers_config
from laconic.pipeline.source_folder import FolderSource, copy_extras
from laconic.pipeline.source_weights import few
from laconic.pipeline.tensorfile import TensorReader

__all__ = ["GgufSource", "QuantizedFolder", "QuantizedSource", "is_quantized", "opened", "quantized_source"]


class QuantizedSource(FolderSource):
    """A transformers model whose weights are quantized: floats by `read` and `load`, as they are stored by `load_packed`."""

    _store: GgufModel | Checkpoint

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's dtype, shape and bytes, as floats."""
        return Source.digest(self, name)

    def records(self) -> list[Record]:
        """A record, with tensors, of every matrix that runs packed; what cannot is noted and stays float."""
        model = self._plan.model
        tensors = all_tensors(model)
        names_of: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            names_of.setdefault(id(tensor), []).append(name)
        records, floats = [], []
        for name in self._names:
            stored = self._plan.stored_as.get(name)
            if stored is None:
                continue
            origin = self._plan.origins[stored]
            path, _, attribute = name.rpartition(".")
            op = op_of(model.get_submodule(path), attribute)
            disk = [name for _, name in origin.sources]
            matrix = None if origin.converter else self._store.matrix(disk[0])
            plain = isinstance(model.get_submodule(path), (nn.Linear, nn.Embedding))
            if matrix is not None and plain and (op == "linear" or (op == "embedding" and matrix.order is None)):
                records.append(matrix.record(name, names_of[id(tensors[name])][1:]))
            elif any(map(self._store.quantized, disk)):
                floats.append(name)
        self.notes += [note for note in self._store.notes if note not in self.notes]
        if floats:
            self.notes.append(f"{len(floats)} quantized tensors have no packed form here and are floats: {few(floats)}")
        return records

    def load_packed(self) -> nn.Module:
        """The model with its matrices packed as they are stored, in eval mode."""
        from laconic.pipeline.hf import attach, settle_ties

        model, records = self.skeleton(), self.records()
        apply_records(model, records)
        settle_ties(model)
        packed = {record.path for record in records}
        self.fill(model, [name for name in self.names() if name not in packed])
        attach(model, records)
        return model.eval()


class QuantizedFolder(QuantizedSource):
    """A folder of compressed-tensors, GPTQ, AWQ or bitsandbytes.

    Args:
        folder: with `config.json` and safetensors.
        dtype: to compute in, instead of the model's own.
        trust_remote_code: run the code that comes with the checkpoint if its architecture needs it.

    Raises:
        BadInput: it is quantized in a way that is not read, or config and weights do not make a model.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False):
        raw = read_json_config(folder)
        form = checkpoint_format(raw.pop("quantization_config", None) or raw.pop("compression_config"), folder)
        config = transformers_config(folder, raw, trust_remote_code)
        cls = model_class(folder, raw, config, trust_remote_code)
        store = Checkpoint(TensorReader(folder), form, folder)
        self._build(folder, raw, config, cls, store, dtype)
        self.notes.append(f"quantized by {form.method}, and opened as it is stored")


class GgufSource(QuantizedSource):
    """A GGUF file of a model of Llama's kind; its size before is the file's own.

    Args:
        file: the `.gguf` file.
        dtype: to compute in; float32 by default.

    Raises:
        BadInput: the file is broken, of another family, or a type in it needs a package that is not installed.
    """

    def __init__(self, file: Path, *, dtype: torch.dtype | None = None, parsed: GgufFile | None = None):
        store = GgufModel(parsed if parsed is not None else GgufFile(file))
        raw = {name: value for name, value in store.config.items() if value is not None}
        config = transformers_config(file, raw, False)
        cls = model_class(file, raw, config, False)
        self.file = file
        self._build(file.parent, raw, config, cls, store, dtype or torch.float32)
        self.name = file.stem  # a folder may hold several files
        self.notes.append(
            f"{file.name} was dequantized to float32 where floats were asked for; size_before is the file's own size"
        )

    def _read_generation_config(self) -> None:
        """A GGUF file has none: transformers makes it of the config."""

    def tokenizer_values(self) -> dict[str, Any]:
        """What the file's header says of its tokenizer."""
        assert isinstance(self._store, GgufModel)
        return {key: value for key, value in self._store.file.values.items() if key.startswith("tokenizer.")}

    def save_extras(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, and the tokenizer as transformers reads it from the file.

        Raises:
            BadInput: the file's tokenizer cannot be read, for instance because the package gguf is not installed.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        raw = {**self._raw, "dtype": str(self.config.dtype).removeprefix("torch.")}
        (target / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self._plan.model.can_generate() and self._plan.model.generation_config is not None:
            self._plan.model.generation_config.save_pretrained(target)
        assert isinstance(self._store, GgufModel)
        if self._store.file.values.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab"):
            _save_tokenizer(self.file, target)
        copy_extras(self.file.parent, target, ("LICENSE*", "NOTICE*"))


def _save_tokenizer(file: Path, target: Path) -> None:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # the reader may raise anything on a vocabulary that it does not like
        raise BadInput(
            f"the tokenizer in {file} cannot be read by transformers {transformers.__version__}, which needs the package "
            f"gguf (pip install gguf): {first_line(error)}"
        ) from error
    tokenizer.save_pretrained(target)


def quantized_source(
    model: str | os.PathLike[str], *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> QuantizedSource | None:
    """The source of a checkpoint that another tool quantized; None if `model` is nothing of the kind.

    Raises:
        BadInput: it is, and cannot be opened.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return GgufSource(path, dtype=dtype)
    if not path.is_dir():
        return None
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        return GgufSource(files[0], dtype=dtype) if len(files) == 1 else None
    if not is_quantized(path):
        return None
    return QuantizedFolder(path, dtype=dtype, trust_remote_code=trust_remote_code)


def is_quantized(folder: Path) -> bool:
    """Whether a folder's config.json says that another tool quantized its weights."""
    if (folder / "laconic.json").exists() or not (folder / "config.json").is_file():
        return False
    raw = read_json_config(folder)
    said: Any = raw.get("quantization_config") or raw.get("compression_config")
    return bool(said) and not (isinstance(said, dict) and said.get("quant_method") == "laconic")


def opened(source: Source) -> nn.Module:
    """The model of a source, as one runs it: packed where another tool packed it."""
    return source.load_packed() if isinstance(source, QuantizedSource) else source.load()
