"""Checkpoints: any nest of state as a safetensors file (the tensors) and a JSON file (all else). No pickle.

`FOLDER/checkpoint.json` names the tensor file that belongs to it. A new tensor file is written first, under a name of
its own, then the JSON file is replaced in one motion, then the old tensor file goes: whatever moment the process is
killed at, there is one whole checkpoint.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from laconic.errors import BadInput

__all__ = ["decode", "encode", "load_checkpoint", "save_checkpoint", "save_weights", "write_whole"]

INDEX = "checkpoint.json"
FORMAT = 1
TAG = "$"  # the key that marks an object of JSON which stands for something that JSON has not


def encode(state: Any, where: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A nest of state as JSON and tensors by name; tensors that are the same memory are kept once.

    Knows None, bool, int, float, str, bytes, list, tuple, set, deque, dict (any keys; also Counter, OrderedDict and
    defaultdict, which comes back as a dict), tensors, NumPy arrays and scalars, torch dtypes and devices.

    Args:
        state: what to keep.
        where: what error messages and tensor names call it.

    Raises:
        BadInput: something in it cannot be kept; the message says where it is.
    """
    encoder = _Encoder()
    return encoder.encode(state, where), encoder.tensors


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given; tensors are on the CPU."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(TAG)
    if kind is None:
        return {key: decode(item, tensors) for key, item in value.items()}
    if kind in _FROM_ITEMS:
        return _FROM_ITEMS[kind](decode(item, tensors) for item in value["items"])
    match kind:
        case "tensor":
            return tensors[value["name"]]
        case "complex":
            return torch.view_as_complex(tensors[value["name"]])
        case "array":
            return tensors[value["name"]].numpy()
        case "scalar":
            return np.dtype(value["dtype"]).type(value["value"])
        case "dtype":
            return getattr(torch, value["name"])
        case "device":
            return torch.device(value["name"])
        case "bytes":
            return base64.b64decode(value["base64"])
        case "deque":
            return deque((decode(item, tensors) for item in value["items"]), maxlen=value["maxlen"])
    raise ValueError(f"{kind!r} is not known to this laconic")


_FROM_ITEMS: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "dict": dict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "OrderedDict": OrderedDict,
}


class _Encoder:
    """Collects the tensors of a nest while it is turned into JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple, str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, np.generic):  # before int and float: numpy.float64 is a float
            return {TAG: "scalar", "dtype": value.dtype.str, "value": value.item()}
        if type(value) in (int, float):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return {TAG: "array", "name": self._keep(torch.from_numpy(np.array(value)), where)}
        if isinstance(value, dict):
            return self._mapping(value, where)
        if isinstance(value, list):
            return [self.encode(item, f"{where}.{i}") for i, item in enumerate(value)]
        if type(value) is tuple or isinstance(value, (set, deque)):
            items = [self.encode(item, f"{where}.{i}") for i, item in enumerate(value)]
            if isinstance(value, deque):
                return {TAG: "deque", "items": items, "maxlen": value.maxlen}
            return {TAG: "tuple" if isinstance(value, tuple) else "set", "items": items}
        if isinstance(value, torch.dtype):
            return {TAG: "dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {TAG: "device", "name": str(value)}
        if isinstance(value, bytes):
            return {TAG: "bytes", "base64": base64.b64encode(value).decode()}
        raise BadInput(
            f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold: "
            "keep tensors, numbers, strings and containers of these"
        )

    def _mapping(self, value: dict, where: str) -> Any:
        kind = type(value).__name__ if isinstance(value, (Counter, OrderedDict)) else "dict"
        plain = kind == "dict" and all(isinstance(key, str) for key in value) and TAG not in value
        if plain or (isinstance(value, defaultdict) and all(isinstance(key, str) for key in value)):
            return {key: self.encode(item, f"{where}.{key}") for key, item in value.items()}
        pairs = [(key, item) for key, item in value.items()]
        return {TAG: kind, "items": [self.encode(pair, f"{where}.{pair[0]}") for pair in pairs]}

    def _tensor(self, value: Tensor, where: str) -> Any:
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise BadInput(f"{where} is a tensor without plain storage ({value.layout}, {value.device}): make it dense")
        value = value.detach()
        if value.is_complex():
            return {TAG: "complex", "name": self._keep(torch.view_as_real(value.resolve_conj()), where)}
        return {TAG: "tensor", "name": self._keep(value, where)}

    def _keep(self, value: Tensor, where: str) -> str:
        same = (value.data_ptr(), str(value.device), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and same in self._names:
            return self._names[same]
        name = where
        while name in self.tensors:  # the keys of a mapping may read alike: 1 and "1"
            name += "'"
        self._names[same] = name
        kept = value.cpu().contiguous()
        # safetensors wants every tensor to be the whole of a storage of its own.
        storage = kept.untyped_storage()
        if storage.nbytes() != kept.nbytes or storage.data_ptr() in self._storages:
            kept = kept.clone()
        self._storages.add(kept.untyped_storage().data_ptr())
        self.tensors[name] = kept
        return name


def save_checkpoint(folder: str | os.PathLike[str], step: int, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint in a folder, whole or not at all.

    Raises:
        BadInput: the state cannot be kept, or the folder cannot be written.
    """
    folder = Path(folder)
    value, tensors = encode(dict(state), "state")
    name = f"checkpoint-{step:09d}.safetensors"
    if (folder / name).exists():  # a checkpoint of this very step: its file must stay until the index names another
        name = f"checkpoint-{step:09d}b.safetensors"
        if (folder / name).exists() and _index(folder).get("tensors") == name:
            name = f"checkpoint-{step:09d}.safetensors"
    write_whole(folder / name, save(tensors))
    text = json.dumps({"format": FORMAT, "step": step, "tensors": name, "state": value}, indent=1) + "\n"
    write_whole(folder / INDEX, text.encode())
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The state in a folder, or None where no checkpoint is.

    Raises:
        BadInput: there is one that cannot be read.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        return None
    index = _index(folder)
    try:
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']}, this laconic reads {FORMAT}")
        return decode(index["state"], load((folder / index["tensors"]).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BadInput(f"{folder / INDEX} cannot be read: {error}; start anew in another folder") from error


def _index(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / INDEX} cannot be read: {error}; start anew in another folder") from error
    if not isinstance(found, dict):
        raise BadInput(f"{folder / INDEX} is not a checkpoint of laconic; start anew in another folder")
    return found


def save_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a model's tensors so that `safetensors.torch.load_model` reads them; tied tensors are written once."""
    encoder = _Encoder()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            encoder.encode(value, name)
    write_whole(Path(path), save(encoder.tensors, metadata={"format": "pt"}))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}; make room and run again with --resume") from error
