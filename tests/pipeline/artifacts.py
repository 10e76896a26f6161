"""A small compressor for tests: plain rounding of every matrix, and the artifact of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from laconic.core.record import PACK, Record
from laconic.nn import PackedParameterSpec, matrix_view, pack_tensors, storage_names
from laconic.nn.packed import op_of
from laconic.numerics import Int, Scale, Scheme, affine_params, quantize
from laconic.pipeline.artifact import write_artifact_files
from laconic.pipeline.source import resolve
from laconic.pipeline.source_base import Source
from laconic.pipeline.tensorfile import TensorWriter

INT8 = Scheme(Int(8), Scale("group", group=32, dtype="float16"), zero="int")


def round_records(source: Source, schemes: Scheme | Iterator[Scheme] = INT8) -> list[Record]:
    """A record with tensors for every parameter of two or more dimensions, tied ones once, under one scheme or the next."""
    model = source.skeleton()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    records = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        op = op_of(module, attribute)
        transposed = op == "linear" and not isinstance(module, nn.Linear)  # GPT-2's Conv1D
        view = "transposed" if transposed else "last" if op in ("parameter", "experts") else "rows"
        scheme = schemes if isinstance(schemes, Scheme) else next(schemes)
        spec = PackedParameterSpec(scheme, tuple(parameter.shape), view)
        matrix = matrix_view(source.read(name), view).float().contiguous()
        scale, zero = affine_params(matrix, scheme, name)
        tensors = pack_tensors(spec, quantize(matrix, scale, zero, scheme), scale, zero)
        data = {"spec": spec.to_json(), "aliases": names[id(parameter)][1:], "op": op}
        records.append(Record(PACK, name, data, tensors))
    return records


def write_artifact(folder: Path, source: Source, records: list[Record]) -> Path:
    """The artifact of these records; what they do not name is stored as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {record.path: record for record in records}
    tensors: dict[str, torch.Tensor] = {}
    for name in source.names():
        if name not in packed:
            tensors[name] = source.read(name)
            continue
        record = packed[name]
        for suffix, stored in storage_names(name, record.spec).items():
            tensors[stored] = record.tensors[suffix]
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    write_artifact_files(
        folder, source=source, records=records, recipe_text="version: 1\n", versions={"laconic": "0"}
    )
    return folder


def rounded(model: nn.Module, folder: Path, scheme: Scheme = INT8) -> Path:
    """The artifact of a model in memory."""
    source = resolve(model)
    return write_artifact(folder, source, round_records(source, scheme))
