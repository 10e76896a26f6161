"""A module in memory as a source: given directly, made by `module:function`, or read from a GGUF file."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from laconic.errors import BadInput
from laconic.pipeline.source_base import (
    Example,
    MemoryStore,
    Source,
    all_tensors,
    first_line,
    normal_example,
    stored_names,
)
from laconic.pipeline.source_config import refuse_quantized
from laconic.pipeline.source_example import example_inputs
from laconic.pipeline.source_folder import copy_extras
from laconic.pipeline.tensorfile import file_layout

__all__ = ["ModuleSource", "OtherGgufSource", "call_factory", "refuse_unusable", "transformers_config"]

QUANTIZED_PACKAGES = ("bitsandbytes", "torchao", "gptqmodel", "awq", "hqq", "torch.ao.nn.quantized")


class ModuleSource(Source):
    """An `nn.Module` in memory. It is never changed: skeletons and reads are copies.

    Args:
        model: the module.
        name: what to call it; its class by default.
        example: inputs for tracing: a tensor, a tuple of arguments, a dict of keywords, or `(args, kwargs)`.

    Raises:
        BadInput: if it is quantized already, has tensors without values, or cannot be copied.
    """

    def __init__(self, model: nn.Module, *, name: str | None = None, example: Any = None):
        self.name = name or type(model).__name__
        self.config = transformers_config(model)
        self.kind = "module" if self.config is None else "transformers"
        self.notes: list[str] = []
        refuse_quantized(getattr(getattr(model, "config", None), "quantization_config", None), self.name)
        refuse_unusable(model, self.name)
        self._model = model
        self._example = None if example is None else normal_example(example)
        self._names = stored_names(self.skeleton())
        self._store = MemoryStore(all_tensors(model), 0)
        try:
            self.size_before = file_layout([(name, *self.spec(name)) for name in self._names]).total_bytes
        except ValueError as error:
            raise BadInput(f"{self.name} has a tensor that cannot be stored: {error}") from error

    def skeleton(self) -> nn.Module:
        """A copy on meta; buffers that are not persistent are copied with their values."""
        try:
            return copy.deepcopy(self._model, _meta_memo(self._model)).eval()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise BadInput(f"{self.name} cannot be copied by copy.deepcopy: {first_line(error)}") from error

    def names(self) -> list[str]:
        """Every parameter and persistent buffer once, in the module's order."""
        return list(self._names)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        return self._store.spec(name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """A copy of rows of a tensor on the CPU."""
        return self._store.read(name, start, stop)

    @property
    def lacks_example(self) -> bool:
        """Whether it is not known how to call the model: a plain module without an example."""
        return self._example is None and self.config is None

    def take_example(self, example: Example) -> None:
        """Trace with these arguments from now on."""
        self._example = example

    def example(self) -> Example:
        """The example that was given, else tiny inputs by modality for a transformers model."""
        if self._example is not None:
            return self._example
        if self.config is None:
            raise BadInput(
                f"{self.name} is a plain nn.Module and how to call it is not known: let module:function "
                "return (model, example), or compress it with an NPZ file of its inputs as the data"
            )
        return example_inputs(type(self._model), self.config)

    def save_extras(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and generation_config.json of a transformers model; nothing for any other."""
        if self.config is None:
            return
        config = copy.deepcopy(self.config)
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(folder)
        if self._model.can_generate() and self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(folder)


class OtherGgufSource(ModuleSource):
    """A GGUF file of a family that laconic does not read by itself, dequantized into memory by transformers.

    Args:
        file: the `.gguf` file.

    Raises:
        BadInput: if transformers cannot load it.
    """

    def __init__(self, file: Path):
        import transformers

        try:
            with _no_progress_bars():
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
                )
        except Exception as error:  # the reader and the model classes may raise anything
            raise BadInput(
                f"{file} cannot be loaded by transformers {transformers.__version__}: {first_line(error)}"
            ) from error
        _forget_quantization(model)
        super().__init__(model, name=file.stem)  # a folder may hold several files
        self.file = file
        self.size_before = file.stat().st_size
        self.notes.append(f"{file.name} was dequantized to float32; size_before is the file's own size")

    def save_extras(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, and the tokenizer as transformers reads it from the file."""
        import transformers

        super().save_extras(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            self.file.parent, gguf_file=self.file.name, local_files_only=True
        )
        tokenizer.save_pretrained(folder)
        copy_extras(self.file.parent, Path(folder), ("LICENSE*", "NOTICE*"))


def call_factory(target: str) -> Any:
    """Import `module:function`, also from the current directory, and call it.

    Raises:
        BadInput: if the module or function is missing, or either raises.
    """
    path, _, attribute = target.partition(":")
    with _current_directory_importable():
        try:
            found: Any = importlib.import_module(path)
        except ModuleNotFoundError as error:
            wanted = error.name is not None and (path == error.name or path.startswith(f"{error.name}."))
            what = "it does not exist, here or among the installed packages" if wanted else str(error)
            raise BadInput(f"{target}: the module {path} cannot be imported: {what}") from error
        except Exception as error:  # the user's own code may raise anything
            raise BadInput(
                f"{target}: importing {path} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise BadInput(f"{target}: the module {path} has no {attribute}")
            found = getattr(found, part)
        if isinstance(found, nn.Module) or not callable(found):
            raise BadInput(
                f"{target} is not a function but {_kind(found)}: name a function that returns the model"
            )
        try:
            return found()
        except Exception as error:  # likewise
            raise BadInput(f"{target}() raised {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars off the terminal, where ours are."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def transformers_config(model: nn.Module) -> Any:
    """The config of a transformers model, None for any other; does not import transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return model.config if modeling is not None and isinstance(model, modeling.PreTrainedModel) else None


def refuse_unusable(model: nn.Module, name: str) -> None:
    """Raise for modules whose tensors are not plain floats in memory."""
    if isinstance(model, torch.jit.ScriptModule):
        raise BadInput(f"{name} is TorchScript, which cannot be rewritten: give the original nn.Module")
    for path, module in model.named_modules():
        package = type(module).__module__
        if package.startswith(QUANTIZED_PACKAGES):
            raise BadInput(
                f"{name} is already quantized by another tool ({package}, at {path or 'its root'}): give the "
                "original float model"
            )
    for path, tensor in all_tensors(model).items():
        if nn.parameter.is_lazy(tensor):
            raise BadInput(f"{name}: {path} has no shape yet (a lazy module): call the model once before")
        if tensor.is_meta:
            raise BadInput(f"{name}: {path} is on meta and has no values: load the weights before")
        if tensor.is_quantized or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            raise BadInput(
                f"{name}: {path} is not a plain dense tensor but {_kind(tensor)} ({tensor.dtype}, "
                f"{tensor.layout}), perhaps quantized by another tool: give the original float model"
            )


def _meta_memo(model: nn.Module) -> dict[int, Tensor]:
    """A memo for `copy.deepcopy` under which every stored tensor becomes a meta tensor: no weight is copied.

    Tensors that share their memory become one, even where they are different objects.
    """
    tensors = all_tensors(model)
    of_memory: dict[tuple, Tensor] = {}
    memo: dict[int, Tensor] = {}
    for name in stored_names(model):
        tensor = tensors[name]
        memory = tensor.data_ptr() if tensor.numel() else id(tensor)
        key = (memory, tensor.device, tensor.dtype, tensor.shape, tensor.stride(), type(tensor))
        if key not in of_memory:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            wrap = isinstance(tensor, nn.Parameter)
            of_memory[key] = nn.Parameter(empty, tensor.requires_grad) if wrap else empty
        memo[id(tensor)] = of_memory[key]
    return memo


def _forget_quantization(model: Any) -> None:
    """Remove what transformers leaves on a model that it dequantized, so that all take it for a float one."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
