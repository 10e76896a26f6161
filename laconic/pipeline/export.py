"""`laconic export`: a model, compressed or not, in the form that another program reads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from laconic.core.record import CACHE, FUSE, PACK, REWRITE
from laconic.errors import BadInput
from laconic.interop.checkpoints import WRITTEN, checkpoint_of
from laconic.interop.gguf import Written, export_gguf
from laconic.interop.graphs import export_onnx, export_torch
from laconic.pipeline.artifact import CONFIG, is_artifact, read_json, read_manifest
from laconic.pipeline.inference.model import Opened, open_model
from laconic.pipeline.source_config import model_class, transformers_config
from laconic.pipeline.source_example import example_inputs
from laconic.pipeline.source_folder import copy_extras
from laconic.pipeline.source_quantized import GgufSource
from laconic.pipeline.tensorfile import SINGLE

__all__ = ["FORMATS", "export"]


@dataclass(frozen=True)
class Format:
    """What `--to` names: whether it is a folder, and how it is written."""

    folder: bool
    write: Callable[[_Job], Written]


@dataclass
class _Job:
    """An export under way."""

    opened: Opened
    to: str
    out: Path
    extras: Path
    exact: bool
    floats: str | None


def _gguf(job: _Job) -> Written:
    source = job.opened.source
    # A tokenizer of GGUF goes over as it is: through transformers it would lose how text is split.
    tokenizer = source.tokenizer_values() if isinstance(source, GgufSource) else job.extras
    return export_gguf(job.opened.model, job.out, tokenizer=tokenizer, exact=job.exact, floats=job.floats)


def _checkpoint(job: _Job) -> Written:
    tensors, quantization, written = checkpoint_of(job.opened.model, job.to)
    if not (job.extras / CONFIG).is_file():
        raise BadInput(
            f"{job.opened.name} is no model of transformers, and {job.to} is a folder of its kind: export to onnx or torch"
        )
    partial = job.out.with_name(f"{job.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(job.extras, partial)
    config = read_json(partial / CONFIG)
    config["quantization_config"] = quantization
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, str(partial / SINGLE), {"format": "pt"})
    if job.out.exists():
        shutil.rmtree(job.out)
    os.replace(partial, job.out)
    return written


def _onnx(job: _Job) -> Written:
    return export_onnx(job.opened.model, _example(job.opened, job.extras), job.out)


def _torch(job: _Job) -> Written:
    return export_torch(job.opened.model, _example(job.opened, job.extras), job.out)


FORMATS: dict[str, Format] = {
    "gguf": Format(False, _gguf),
    **{name: Format(True, _checkpoint) for name in WRITTEN},
    "onnx": Format(False, _onnx),
    "torch": Format(False, _torch),
}


def export(
    model: Any,
    to: str,
    out: str | os.PathLike[str],
    *,
    into: Any = None,
    exact: bool = False,
    floats: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Write a model in another program's form. Packed weights keep their codes wherever the form has a place for them.

    Args:
        model: an artifact, a model that another tool quantized, or anything else that `compress` takes.
        to: gguf, compressed-tensors, int-quantized, gptq, gptq-v2, bnb-nf4, bnb-fp4, onnx or torch.
        out: the file (gguf, onnx, torch) or folder to write.
        into: the float model of an artifact that cannot be built by itself.
        exact: gguf: no value may change, at the price of larger types.
        floats: gguf: type of the matrices that are not packed, as F16 or Q8_0; by default the model's own.
        overwrite: replace `out` if it exists.
        trust_remote_code, allow_pickle: as in `compress`.

    Returns:
        `model`, `to`, `out`, `bytes`, `types` (how many matrices became what), `exact` (whether all values are kept),
        `notes`.

    Raises:
        BadInput: there is no such form, `out` is there already, or the form cannot hold the model; says what can.
    """
    form, target = FORMATS.get(to), Path(out)
    if form is None:
        raise BadInput(f"there is no form {to!r}: one of {', '.join(FORMATS)}")
    if (exact or floats is not None) and to != "gguf":
        raise BadInput(f"--exact and --floats belong to gguf, and {to} keeps values as they are: leave them out")
    _check_target(target, form.folder, overwrite)
    if not target.absolute().parent.is_dir():
        raise BadInput(f"{target.absolute().parent} is not there: make the folder first")
    opened = open_model(model, into=into, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if to not in ("onnx", "torch"):
        _refuse_rewritten(opened, to)
    with tempfile.TemporaryDirectory(prefix="laconic-export-") as temporary:
        extras = Path(temporary)
        _gather_extras(opened, extras)
        written = form.write(_Job(opened, to, target, extras, exact, floats))
    return {
        "model": opened.name, "to": to, "out": str(target), "bytes": _size(target),
        "types": dict(sorted(Counter(row["type"] for row in written.rows).items())),
        "exact": all(row["exact"] for row in written.rows), "notes": written.notes,
    }  # fmt: skip


def _check_target(target: Path, folder: bool, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise BadInput(f"{target} exists; name another place or pass --overwrite")
    if target.is_dir() != folder:
        raise BadInput(
            f"{target} is a {'folder' if target.is_dir() else 'file'}, and a {'folder' if folder else 'file'} is written"
        )
    if folder and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise BadInput(f"{target} holds no {CONFIG}, so it is no model and is not overwritten; name another folder")


def _refuse_rewritten(opened: Opened, to: str) -> None:
    """Folded and exchanged norms have no place in a model class of another program."""
    if opened.folder is None or not is_artifact(opened.folder):
        return
    for record in read_manifest(opened.folder).records:
        if record.action not in (PACK, FUSE, REWRITE, CACHE):
            raise BadInput(
                f"{opened.name}: {record.path} was rewritten ({record.action}), and a model for {to} has the layers that "
                "its config.json names: export to onnx or torch, or compress without that pass"
            )


def _gather_extras(opened: Opened, folder: Path) -> None:
    """Config and tokenizer of the float model, in a folder of their own."""
    if opened.folder is not None and is_artifact(opened.folder):
        copy_extras(opened.folder, folder)
        if (opened.folder / CONFIG).is_file():
            config = read_json(opened.folder / CONFIG)
            config.pop("quantization_config", None)
            (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    elif opened.source is not None:
        opened.source.save_extras(folder)


def _example(opened: Opened, extras: Path) -> tuple[tuple, dict]:
    """Inputs that say how the model is called."""
    if opened.source is not None:
        return opened.source.example()
    if opened.config is None:
        return opened.example()
    raw = read_json(extras / CONFIG)
    config = transformers_config(extras, raw, False)
    return example_inputs(model_class(extras, raw, config, False), config)


def _size(target: Path) -> int:
    if target.is_file():
        beside = target.with_name(f"{target.name}.data")
        return target.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
