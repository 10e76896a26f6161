"""Saving: a model in memory, its weights packed and its adapters as they are now, becomes an artifact.

`compress` writes its artifacts by itself. This is for what happens in memory: a pass that was run by hand, adapters that
were trained over packed weights (`laconic.quant.qlora_`, `lq_lora_`), a loaded artifact that was trained further.

    >>> import tempfile, torch, laconic
    >>> from torch import nn
    >>> from laconic.quant import qlora_
    >>> model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> folder = laconic.save(qlora_(model, rank=4) and model, tempfile.mkdtemp() + "/out")
    >>> again = laconic.load(folder, into=nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)))
    >>> x = torch.randn(3, 128)
    >>> torch.equal(again(x), model.eval()(x))
    True
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.core.record import ADAPT, FUSE, PACK, Record, owner_of, records_of
from laconic.errors import BadInput
from laconic.nn import is_packed, storage_names
from laconic.nn.packed import op_of
from laconic.pipeline.artifact import MANIFEST, RECORDS, describe_artifact, records_from_json
from laconic.pipeline.measure import versions
from laconic.pipeline.plan import METADATA
from laconic.pipeline.source_base import all_tensors, stored_names
from laconic.pipeline.source_folder import copy_extras
from laconic.pipeline.source_module import refuse_unusable, transformers_config
from laconic.pipeline.tensorfile import SINGLE, TensorWriter

__all__ = ["save"]

ADAPTED, LEFT, BUFFER = "an adapter, trained beside packed weights", "it is not packed", "a buffer, not a weight"


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, records: Iterable[Record] = (), overwrite: bool = False
) -> Path:
    """Write a model that is in memory as an artifact, which `laconic.load` opens.

    Args:
        model: with packed parameters, adapters, or both.
        folder: to write; it appears when all of it is there.
        records: what else was done to the model's structure, in order, by passes that were run by hand (batch norms that
            were folded, say). What `laconic.load` did, and what is packed or adapted, is known from the model.
        overwrite: replace an artifact that is there.

    Returns:
        The folder.

    Raises:
        BadInput: nothing is packed or adapted, the folder is taken, or a tensor has no values.
    """
    target = Path(folder)
    if target.exists() and (not overwrite or not (target / MANIFEST).is_file()):
        what = "and is no artifact of laconic" if overwrite else "name another, or pass overwrite=True"
        raise BadInput(f"{target} is there already: {what}")
    own = records_of(model)
    if not own:
        raise BadInput(
            f"{type(model).__name__} has neither packed weights nor adapters: compress it, or save its state_dict"
        )
    name = type(model).__name__.removeprefix("Packed")
    refuse_unusable(model, name)
    before = [*_known(model, name), *records]
    done = [r for r in before if r.action != FUSE] + own + [r for r in before if r.action == FUSE]
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = transformers_config(model)
    if config is not None:
        _write_config(model, config, partial)
    tensors = all_tensors(model)
    names = stored_names(model)
    specs = [(one, tensors[one].dtype, tuple(tensors[one].shape)) for one in names]
    with TensorWriter(partial / SINGLE, specs, METADATA) as writer:
        for one in names:
            writer.write(one, tensors[one].detach().cpu())
    said = [_row(model, record) for record in done]
    described = {
        "kind": "module" if config is None else "transformers",
        "class": getattr(type(model), "_laconic_original", type(model)),
        "dtype": _compute_dtype(model),
    }
    describe_artifact(partial, model, done, said, described, ledger=_ledger(model, own), versions=versions())
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    return target


def _known(model: nn.Module, name: str) -> list[Record]:
    """What was done to a loaded model beside packing and adapters."""
    loaded = getattr(model, RECORDS, None)
    if loaded is None:
        said = getattr(getattr(model, "config", None), "quantization_config", None)
        loaded = records_from_json(said.records, name) if hasattr(said, "records") else []
    return [record for record in loaded if record.action not in (PACK, ADAPT)]


def _write_config(model: Any, config: Any, folder: Path) -> None:
    """config.json, generation_config.json, and the tokenizer of the folder that the model came from, where it is known."""
    plain = copy.deepcopy(config)
    plain.architectures = [getattr(type(model), "_laconic_original", type(model)).__name__]
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    if Path(plain.name_or_path).is_dir():
        copy_extras(Path(plain.name_or_path), folder)
    plain.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _row(model: nn.Module, record: Record) -> dict[str, Any]:
    """A record as laconic.json has it, with the type that a packed parameter computes in."""
    row = record.to_json()
    if record.action == PACK:
        owner: Any = owner_of(model, record.path)[0]
        row["dtype"] = str(owner._packed_dtype).removeprefix("torch.")
    return row


def _compute_dtype(model: nn.Module) -> str:
    """Of the first parameter that is a float, or computes as one."""
    for module in model.modules():
        if is_packed(module):
            held: Any = module
            return str(held._packed_dtype).removeprefix("torch.")
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return str(parameter.dtype).removeprefix("torch.")
    return "float32"


def _ledger(model: nn.Module, own: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each parameter and buffer in the file."""
    tensors, rows, parts = all_tensors(model), [], set()
    for record in own:
        if record.action != PACK:
            continue
        owner, name = owner_of(model, record.path)
        stored = list(storage_names(record.path, record.spec).values())
        parts |= set(stored)
        op = op_of(owner, name)
        rows.append(
            {
                "name": record.path, "names": [record.path, *record.data["aliases"]], "dtype": _row(model, record)["dtype"],
                "shape": list(record.spec.shape), "bytes": sum(tensors[one].nbytes for one in stored),
                "scheme": str(record.spec.scheme), "method": None, "reason": None,
                "speed": "packed op" if op != "parameter" else "no speed: dequantized on access",
            }
        )  # fmt: skip
    adapters = {f"{r.path}.{side}" for r in own if r.action == ADAPT for side in ("lora_A", "lora_B")}
    parameters = dict(model.named_parameters())
    for name in stored_names(model):
        if name in parts:
            continue
        tensor: torch.Tensor = tensors[name]
        reason = ADAPTED if name in adapters else LEFT if name in parameters else BUFFER
        rows.append(
            {
                "name": name, "names": [name], "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape), "bytes": tensor.nbytes, "scheme": None, "method": None, "reason": reason,
                "speed": None,
            }
        )  # fmt: skip
    return rows
