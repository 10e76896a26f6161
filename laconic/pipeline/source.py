"""Where a model comes from: a folder, a fetched name, `module:function`, or an `nn.Module`.

source = resolve("path/to/model")
model = source.skeleton()                        # on meta
source.fill(model, ["encoder.layer.0.attention.self.query.weight"])   # reads this one
whole = source.load()                            # bit-equal to from_pretrained
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from laconic.errors import BadInput
from laconic.interop.gguf import GgufModel
from laconic.interop.gguf_file import GgufFile
from laconic.pipeline.source_base import Example, Source, check_finite
from laconic.pipeline.source_folder import FolderSource
from laconic.pipeline.source_module import ModuleSource, OtherGgufSource, call_factory
from laconic.pipeline.source_quantized import GgufSource, QuantizedFolder, is_quantized

__all__ = ["FETCHED", "Example", "Source", "check_finite", "resolve"]

FETCHED = ("minilm", "cifar-cnn", "smollm", "tiny-lm")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def resolve(
    model: Any, *, example: Any = None, trust_remote_code: bool = False, allow_pickle: bool = False, quantized: bool = False
) -> Source:
    """The source of a model. A folder that exists wins over a fetched name.

    Args:
        model: a Hugging Face folder (or one with a single GGUF file, or that file), a fetched name,
            `module:function` that returns a module or `(module, example)`, an `nn.Module`, or `(nn.Module,
            example)`.
        example: inputs for tracing, of a module given directly.
        trust_remote_code: run code that comes with a checkpoint where its architecture needs it.
        allow_pickle: read pickled weights (with `weights_only`) where a folder holds no others.
        quantized: take a folder that another tool quantized as it is; else it is refused.

    Raises:
        BadInput: if there is no model, or not one that we can compress; the message says what to do.
    """
    if isinstance(model, nn.Module):
        return ModuleSource(model, example=example)
    if isinstance(model, tuple):
        return _from_pair(model, "the model", None)
    if not isinstance(model, (str, os.PathLike)):
        raise BadInput(
            f"a model is a folder, a name, module:function or an nn.Module, not a {type(model).__name__}"
        )
    text, path = os.fspath(model), Path(model).expanduser()
    if quantized and path.is_dir() and is_quantized(path):
        return QuantizedFolder(path, trust_remote_code=trust_remote_code)
    if path.exists():
        return _from_path(path, trust_remote_code, allow_pickle)
    if text in FETCHED:
        return _fetched(text, trust_remote_code, allow_pickle)
    if _FACTORY.fullmatch(text):
        return _from_pair(call_factory(text), text, text)
    raise BadInput(
        f"{text} is neither a folder, nor one of the names {', '.join(FETCHED)}, nor module:function: check "
        "the path"
    )


def _from_path(path: Path, trust_remote_code: bool, allow_pickle: bool) -> Source:
    """A folder, or a GGUF file."""
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(path)
        raise BadInput(f"{path} is a file: give the folder that holds it and its config.json")
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not (path / "config.json").exists():
        if len(ggufs) > 1:
            raise BadInput(
                f"{path} holds {len(ggufs)} GGUF files: name the one that is meant, e.g. {ggufs[0]}"
            )
        return _gguf(ggufs[0])
    return FolderSource(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


def _gguf(file: Path) -> Source:
    """A GGUF file: of a family that is read here tensor by tensor, or else as transformers dequantizes it."""
    parsed = GgufFile(file)
    try:
        GgufModel.family_of(parsed)
    except BadInput:
        return OtherGgufSource(file)
    return GgufSource(file, parsed=parsed)


def _fetched(name: str, trust_remote_code: bool, allow_pickle: bool) -> Source:
    """What `laconic.tasks` has fetched or trained under this name."""
    from laconic.tasks import zoo_source

    found = zoo_source(name)
    if isinstance(found, (str, os.PathLike)):
        source = _from_path(Path(found), trust_remote_code, allow_pickle)
        source.name = name
        return source
    return _from_pair(found, name, name)


def _from_pair(value: Any, where: str, name: str | None) -> Source:
    """A module, or a module and an example."""
    if isinstance(value, nn.Module):
        return ModuleSource(value, name=name)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module):
        return ModuleSource(value[0], name=name, example=value[1])
    raise BadInput(f"{where} gives a {type(value).__name__}, not an nn.Module or a pair (nn.Module, example)")
