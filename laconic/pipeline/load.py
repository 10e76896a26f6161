"""Loading an artifact: replay the records on a skeleton, then fill every tensor from the file.

model = laconic.load("out")                      # a Hugging Face model, or one of laconic's own
model = laconic.load("out", into=MyModel())      # any other

Where the artifact has adapters, they are the only parameters that take gradients.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

import torch
from torch import nn

from laconic.core.lora import freeze_but_adapters_
from laconic.core.record import ADAPT, PACK, apply_records
from laconic.errors import BadInput
from laconic.nn import packed_specs
from laconic.pipeline.artifact import (
    CONFIG,
    RECORDS,
    Manifest,
    check_filled,
    is_artifact,
    read_json,
    read_manifest,
)
from laconic.pipeline.source_base import all_tensors, first_line, put, stored_names, tensor_owners
from laconic.pipeline.source_weights import few
from laconic.pipeline.tensorfile import SINGLE, TensorReader

__all__ = ["load", "usable_device"]

_OWN = re.compile(r"(laconic(?:\.[a-z_]\w*)+)\.([A-Za-z]\w*)")
GENERATION = "generation_config.json"


def load(
    folder: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = False,
    mmap: bool = True,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The compressed model of an artifact, in eval mode, its weights packed in memory as on disk.

    On the CPU its tensors are views of the memory-mapped file: bytes come when they are first used, processes that
    load the same folder share them, and there is no second copy. The mapping is private: a weight that is written to
    (in training, say) gets memory of its own, and the file stays as it is. It must not be cut short in the meantime;
    a folder that was renamed or deleted does no harm.

    Args:
        folder: what `laconic compress` wrote; or a model that another tool quantized, a GGUF file or a folder of
            compressed-tensors, GPTQ, AWQ or bitsandbytes, which is opened with the values that it has.
        into: a float model of the same structure (on meta, or with any values); it becomes the packed one, in
            place, and is returned. Needed for models that are neither transformers' nor laconic's.
        device: where the tensors go.
        dtype: computes and keeps unpacked floats in this type instead of the model's own; packed weights and
            their scales stay as they are.
        verify: compare the SHA-256 of every file with the one recorded.
        mmap: False reads every tensor into memory of its own, for files that change or lie on a network.
        trust_remote_code: run the code that came with the checkpoint, where its architecture needs it.

    Raises:
        BadInput: it is no complete artifact, does not fit the model, or the device is not there.
    """
    device = usable_device(device)
    if into is None and not is_artifact(folder):
        from laconic.pipeline.source_quantized import quantized_source

        source = quantized_source(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        if source is not None:
            return source.load_packed().to(device)
    manifest = read_manifest(folder, verify=verify)
    with TensorReader(manifest.folder / SINGLE) as reader:
        if mmap:
            reader.prefetch()  # a cold disk is busy while the skeleton is built
        if into is not None:
            model = _into(into, manifest, dtype)
        elif manifest.model.get("kind") == "transformers":
            model = _transformers_model(manifest, dtype, trust_remote_code)
        else:
            model = _into(_own_model(manifest), manifest, dtype)
        _fill(model, reader, manifest, device, cast=dtype is not None, mapped=mmap)
    check_filled(model)
    if any(record.action == ADAPT for record in manifest.records):
        freeze_but_adapters_(model)
    if _is_transformers(model):
        from laconic.pipeline.hf import attach

        attach(model, manifest.records)
    else:
        object.__setattr__(model, RECORDS, manifest.records)
    if any(tensor.device != device for tensor in all_tensors(model).values()):
        model.to(device)  # buffers that no file holds
    return model.eval()


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name, tried out.

    Raises:
        BadInput: there is none, or it holds no values.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"{device!r} is not a device: name one as cpu, cuda or cuda:1") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"the device {device} is not usable here: {first_line(error)}") from error
    if found.type == "meta":
        raise BadInput("the device meta holds no values: name a real one, such as cpu")
    return found


# --- skeletons ----------------------------------------------------------------------------------------------


def _into(model: nn.Module, manifest: Manifest, dtype: torch.dtype | None) -> nn.Module:
    """Replay the records on a model that is there."""
    if packed_specs(model):
        raise BadInput("into= is packed already: give a float model of the same structure")
    if dtype is not None:
        model.to(dtype)
    _check_compute_dtypes(model, manifest, dtype)
    model.eval()
    apply_records(model, manifest.records)
    if _is_transformers(model):
        from laconic.pipeline.hf import settle_ties

        settle_ties(model)
    return model


def _check_compute_dtypes(model: nn.Module, manifest: Manifest, dtype: torch.dtype | None) -> None:
    """The type of a float parameter is not in the file once it is packed: it must be that of the skeleton."""
    tensors = all_tensors(model)
    for record in manifest.records:
        said = record.data.get("dtype")
        if record.action != PACK or record.path not in tensors or dtype is not None or said is None:
            continue
        has = str(tensors[record.path].dtype).removeprefix("torch.")
        if has != said:
            raise BadInput(
                f"{record.path} was {said} in the model that was compressed and is {has} in the one given: "
                f"convert it first, or pass dtype=torch.{has} if {has} is meant"
            )


def _own_model(manifest: Manifest) -> nn.Module:
    """A model of laconic's own tasks. Nothing outside of laconic is imported on an artifact's word."""
    name = str(manifest.model.get("class"))
    match = _OWN.fullmatch(name)
    found: Any = None
    if match:
        try:
            found = getattr(importlib.import_module(match[1]), match[2], None)
        except ImportError:
            found = None
    if not (
        isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("laconic.")
    ):
        raise BadInput(
            f"{manifest.folder} holds a {name}, which laconic cannot build by itself: build the float model "
            "as ever and pass it as laconic.load(folder, into=model), or name it to laconic run by --into"
        )
    try:
        return found()
    except TypeError as error:
        raise BadInput(
            f"{name} cannot be built without arguments ({first_line(error)}): build it and pass it as into="
        ) from error


def _transformers_model(manifest: Manifest, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """The skeleton that `from_pretrained` would build, packed: on meta but for buffers that no file holds."""
    from laconic.pipeline import source_config, source_skeleton
    from laconic.pipeline.hf import mark_filled, settle_ties

    folder = manifest.folder
    raw = read_json(folder / CONFIG)
    raw.pop("quantization_config", None)
    config = source_config.transformers_config(folder, raw, trust_remote_code)
    cls = source_config.model_class(folder, raw, config, trust_remote_code)
    stated = getattr(config, "dtype", None)
    dtype = dtype or (stated if isinstance(stated, torch.dtype) else torch.float32)
    source_config.set_dtype(config, dtype)
    model = source_skeleton.on_meta(cls, config, dtype, folder)
    model.eval()
    apply_records(model, manifest.records)
    settle_ties(model)
    mark_filled(model)
    source_skeleton.initialise(model, [])
    model.tie_weights(recompute_mapping=False)
    if model.can_generate() and (folder / GENERATION).is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{folder / GENERATION} cannot be read: {first_line(error)}") from error
    model.config.name_or_path = str(folder)
    return model


# --- values -------------------------------------------------------------------------------------------------


def _fill(
    model: nn.Module, reader: TensorReader, manifest: Manifest, device: torch.device, *, cast: bool, mapped: bool
) -> None:
    """Give every parameter and persistent buffer its value from the file; all of both must be used.

    Raises:
        BadInput: naming what the file lacks, what the model lacks, or what differs.
    """
    tensors, owners = all_tensors(model), tensor_owners(model)
    names = [name for name in reader.names() if name in tensors]
    filled = {id(tensors[name]) for name in names}
    lacking = [name for name in stored_names(model) if id(tensors[name]) not in filled]
    unknown = [name for name in reader.names() if name not in tensors]
    if lacking or unknown:
        parts = []
        if lacking:
            parts.append(f"{len(lacking)} tensors of the model are not in it ({few(lacking)})")
        if unknown:
            parts.append(f"{len(unknown)} in it have no place in the model ({few(unknown)})")
        raise BadInput(f"{manifest.folder / SINGLE} does not fit {type(model).__name__}: {'; '.join(parts)}")
    fixed = _packed_names(model)
    for name in names:
        old = tensors[name]
        dtype, shape = reader.spec(name)
        if shape != tuple(old.shape):
            raise BadInput(
                f"{name} has shape {shape} in {manifest.folder / SINGLE} and {tuple(old.shape)} in the "
                "model: they do not belong together"
            )
        castable = name not in fixed and dtype.is_floating_point and old.is_floating_point()
        if dtype != old.dtype and not (castable and (cast or _is_transformers(model))):
            raise BadInput(
                f"{name} is {dtype} in {manifest.folder / SINGLE} and {old.dtype} in the model: convert the "
                "model first (model.to(...)), or pass dtype="
            )
        value = reader.view(name) if mapped else reader.read(name)
        put(owners, old, value.to(device=device, dtype=old.dtype))
    meta = [name for name, tensor in all_tensors(model).items() if tensor.is_meta]
    if meta:
        raise BadInput(
            f"{few(meta)} of {type(model).__name__} are on meta and no file holds them: build the model "
            "that you pass as into= on the CPU"
        )


def _packed_names(model: nn.Module) -> set[str]:
    return {f"{path}_{suffix}" for path, spec in packed_specs(model).items() for suffix in spec.tensors()}


def _is_transformers(model: nn.Module) -> bool:
    """A `PreTrainedModel`: its skeleton knows which parts stay in float32, so values are cast to it."""
    return hasattr(model, "_get_dtype_plan")
