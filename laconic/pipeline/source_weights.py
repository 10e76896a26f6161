"""The weight files of a Hugging Face folder: safetensors, or pickles if the user allows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput
from laconic.interop.checkpoints import Checkpoint
from laconic.interop.gguf import GgufModel
from laconic.pipeline.source_base import MemoryStore
from laconic.pipeline.tensorfile import INDEX, SINGLE, TensorReader

__all__ = ["FLOATS", "Store", "few", "model_dtype", "open_weights"]

# Tensors by name: as files hold them, or read from another tool's quantized form.
Store = TensorReader | MemoryStore | GgufModel | Checkpoint
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_weights(folder: Path, allow_pickle: bool) -> Store:
    """The folder's safetensors, or its pickles where there are none and they are allowed.

    Raises:
        BadInput: if there are no weights, only pickles that are not allowed, or broken files.
    """
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return TensorReader(folder)
    pickles = _pickles(folder)
    if not pickles:
        found = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        raise BadInput(
            f"{folder} holds no weights: neither {SINGLE} nor {INDEX} (it holds {few(found)}): "
            "download it again"
        )
    if not allow_pickle:
        raise BadInput(
            f"{folder} holds only pickled weights ({pickles[0].name}), and a pickle can run code when it is "
            "loaded: convert it to safetensors, or pass --allow-pickle (allow_pickle=True) if you trust it"
        )
    tensors: dict[str, Tensor] = {}
    for file in pickles:
        tensors.update(_load_pickle(file))
    return MemoryStore(tensors, sum(file.stat().st_size for file in pickles))


def model_dtype(config: Any, store: Store) -> torch.dtype:
    """The model's dtype as `from_pretrained` settles it: what the config says, else that of the first float
    tensor.

    A disagreement between config and weight files is noted in `store.notes`.
    """
    stated = getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = getattr(torch, stated, None)
    floats: dict[torch.dtype, str] = {}
    for name in sorted(store.names()):
        dtype = store.spec(name)[0]
        if dtype in FLOATS:
            floats.setdefault(dtype, name)
    if not isinstance(stated, torch.dtype):
        return next(iter(floats), torch.float32)
    others = [f"{_short(dtype)} ({name})" for dtype, name in floats.items() if dtype is not stated]
    if others:
        store.notes.append(
            f"config.json says {_short(stated)} and the weight files hold {', '.join(others)}: read as "
            f"{_short(stated)}, as transformers does"
        )
    return stated


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pickles(folder: Path) -> list[Path]:
    """The pickled weight files of a folder, none if it has none."""
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    if not (folder / PICKLE_INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / PICKLE_INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / PICKLE_INDEX} is not a valid index (no usable weight_map)") from error
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not (folder / name).is_file():
            raise BadInput(
                f"{folder / PICKLE_INDEX} names the shard {name!r}, which is missing: download it again"
            )
    return [folder / name for name in names]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """A pickled state dict, loaded with `weights_only`."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on broken and hostile files
        raise BadInput(
            f"{file} cannot be loaded with weights_only=True: it is broken, or holds more than tensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BadInput(f"{file} is not a state dict (names and tensors): save model.state_dict() instead")
    return loaded
