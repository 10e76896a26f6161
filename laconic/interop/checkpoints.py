"""Quantized checkpoints of Hugging Face's kind: which ones are known, and their tensors read as floats or packed.

A form (`Form`) knows the tensors of a layer. `Checkpoint` shows a folder's weights as a store in which a quantized layer has
a float `weight` again, so that names and shapes are checked as ever; `matrix` gives what is behind one. `checkpoint_of` goes
the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.nn import packed_specs
from laconic.nn.packed import Packed

from .awq import Awq
from .bitsandbytes import BitsAndBytes, bitsandbytes_config, bitsandbytes_tensors
from .checkpoint_form import Form
from .compressed_tensors import CompressedTensors, compressed_tensors_config, compressed_tensors_tensors
from .gguf import Written
from .gptq import Gptq, gptq_config, gptq_tensors
from .matrix import QuantizedMatrix

__all__ = ["METHODS", "WRITTEN", "Checkpoint", "checkpoint_format", "checkpoint_of"]

_FORMS: tuple[type[Form], ...] = (CompressedTensors, Gptq, Awq, BitsAndBytes)
METHODS = tuple(form.method for form in _FORMS)


class Tensors(Protocol):
    """Tensors by name, as `laconic.pipeline.tensorfile.TensorReader` has them."""

    size: int
    notes: list[str]

    def names(self) -> list[str]: ...

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]: ...

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor: ...

    def digest(self, name: str) -> str: ...


def checkpoint_format(config: Any, where: object) -> Form:
    """The form of a `quantization_config`.

    Raises:
        BadInput: its method, or what it asks of it, is not read.
    """
    config = config if isinstance(config, Mapping) else {}
    method = config.get("quant_method") or ("bitsandbytes" if config.get("load_in_4bit") else "an unnamed method")
    for form in _FORMS:
        if form.method == method:
            return form(config, where)
    raise BadInput(
        f"{where} is quantized by {method}, and laconic opens {', '.join(METHODS)} and GGUF: give the original float model"
    )


class Checkpoint:
    """The weights of a quantized folder by the names and shapes of the float model.

    Args:
        files: the tensors.
        form: how layers are stored.
        where: the folder, for messages.
    """

    def __init__(self, files: Tensors, form: Form, where: object):
        self.files, self.form, self.size = files, form, files.size
        self._known = set(files.names())
        self._layers = form.layers(self._known, files.spec)
        if not self._layers:
            raise BadInput(
                f"{where}: config.json says {form.method}, and no tensor is quantized by it: download it again"
            )
        for path in self._layers.values():
            form.learn(path, self._read)
        taken = {f"{path}{part}" for path in self._layers.values() for part in form.parts}
        self._names = [name for name in files.names() if name not in taken and name not in self._layers] + [
            *self._layers
        ]
        self.notes = [*files.notes, *form.notes]

    def _read(self, name: str) -> Tensor:
        """A tensor of the files.

        Raises:
            KeyError: there is none.
        """
        self._spec(name)
        return self.files.read(name)

    def _spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self._known:
            raise KeyError(name)
        return self.files.spec(name)

    def names(self) -> list[str]:
        """Names of all tensors of the float model."""
        return list(self._names)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor; of quantized ones the type of their scales."""
        path = self._layers.get(name)
        if path is None:
            return self.files.spec(name)
        try:
            shape = self.form.shape(path, self._spec)
        except KeyError as error:
            raise self._lacking(path, error) from error
        for part in (".scales", ".weight_scale"):
            if f"{path}{part}" in self._known:
                dtype = self.files.spec(f"{path}{part}")[0]
                return (dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32), shape
        return torch.float32, shape

    def _lacking(self, path: str, error: KeyError) -> BadInput:
        return self.form.refused(f"whose layer {path} lacks the tensor {error.args[0]}", "download it again")

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows of a tensor (all by default), quantized ones as floats."""
        path = self._layers.get(name)
        if path is None:
            return self.files.read(name, start, stop)
        try:
            values = self.form.values(path, self._read, self._spec)
        except KeyError as error:
            raise self._lacking(path, error) from error
        return values if start is None and stop is None else values[start:stop].clone()

    def quantized(self, name: str) -> bool:
        """Whether a tensor is a weight that is quantized."""
        return name in self._layers

    def matrix(self, name: str) -> QuantizedMatrix | None:
        """A quantized tensor in our numbers; None for floats, and where our numbers have no form for it."""
        path = self._layers.get(name)
        if path is None:
            return None
        try:
            found = self.form.matrix(path, self._read, self._spec)
        except KeyError as error:
            raise self._lacking(path, error) from error
        self.notes += [note for note in self.form.notes if note not in self.notes]
        return found

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor that is stored as it is."""
        return self.files.digest(name)


# --- writing ---------------------------------------------------------------------------------------------------------

_INPUTS = "inputs that are rounded to 8 bits here stay float in this form"
_ROUND_INPUTS = ("compressed-tensors", "int-quantized")  # forms that hold it, by tokens or by one static scale
_Write = Callable[[QuantizedMatrix, torch.dtype], dict[str, Tensor] | str]
_Config = Callable[[Mapping[str, QuantizedMatrix], list[str]], dict[str, Any]]


def _written(tensors: Callable[..., Any], config: Callable[..., Any], version: str) -> tuple[_Write, _Config]:
    return (lambda matrix, dtype: tensors(matrix, version)), (lambda layers, floats: config(layers, floats, version))


# What `--to` calls it -> how a layer is written, and the config.
WRITTEN: dict[str, tuple[_Write, _Config]] = {
    "compressed-tensors": _written(compressed_tensors_tensors, compressed_tensors_config, "pack-quantized"),
    "int-quantized": _written(compressed_tensors_tensors, compressed_tensors_config, "int-quantized"),
    "gptq": _written(gptq_tensors, gptq_config, "gptq"),
    "gptq-v2": _written(gptq_tensors, gptq_config, "gptq_v2"),
    "bnb-nf4": (
        lambda matrix, dtype: bitsandbytes_tensors(matrix, "nf4", dtype),
        lambda layers, floats: bitsandbytes_config(layers, floats, "nf4"),
    ),
    "bnb-fp4": (
        lambda matrix, dtype: bitsandbytes_tensors(matrix, "fp4", dtype),
        lambda layers, floats: bitsandbytes_config(layers, floats, "fp4"),
    ),
}


def checkpoint_of(model: nn.Module, to: str) -> tuple[dict[str, Tensor], dict[str, Any], Written]:
    """The tensors and `quantization_config` of a packed model in another tool's form.

    Args:
        model: with packed linear layers.
        to: a key of `WRITTEN`.

    Returns:
        Tensors by name, the config, and what was written how: a layer that the form cannot hold is float, with a note.

    Raises:
        BadInput: the form holds none of its layers.
    """
    write, describe = WRITTEN[to]
    written = Written()
    tensors: dict[str, Tensor] = {}
    layers: dict[str, QuantizedMatrix] = {}
    packed = packed_specs(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    aliases = {
        f"{path}.{name}" for path, m in model.named_modules() if isinstance(m, Packed) for name in m._packed_owner
    }
    for name in packed:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        matrix = QuantizedMatrix.of(module, attribute)
        linear = isinstance(module, nn.Linear) and attribute == "weight" and packed[name].view == "rows"
        why = "it is not the weight of a linear layer" if not linear else None
        found = None if why else write(matrix, dtype)
        if isinstance(found, dict):
            tensors |= {f"{path}.{ending}": value for ending, value in found.items()}
            layers[path] = matrix
            written.rows.append({"name": name, "type": to, "exact": True})
            if matrix.inputs and to not in _ROUND_INPUTS and _INPUTS not in written.notes:
                written.notes.append(_INPUTS)
            continue
        written.notes.append(f"{name} is written as floats: {why or found}")
        tensors[name] = getattr(module, attribute).detach().to(module._packed_dtype).contiguous()  # type: ignore[union-attr]
        written.rows.append(
            {
                "name": name,
                "type": str(tensors[name].dtype).removeprefix("torch."),
                "exact": tensors[name].dtype is torch.float32,
            }
        )
    if not layers:
        first = written.notes[0] if written.notes else "it has no packed layer"
        raise BadInput(f"the form {to} holds none of the model's layers ({first}): compress it with a recipe that fits")
    stored = {f"{name}_{suffix}" for name, spec in packed.items() for suffix in spec.tensors()}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in stored and name not in aliases and id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach().contiguous()
    floats = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in layers]
    return tensors, describe(layers, floats), written
