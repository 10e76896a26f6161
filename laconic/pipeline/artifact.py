"""The files of an artifact beside its tensors: `config.json`, `recipe.yaml`, `read.py` and `laconic.json`.

`laconic.json` is written last, by a rename: a folder that has one is complete. It holds every record (what
was done to the model, in order), the ledger, and the SHA-256 of each file. `config.json` repeats what is
needed to rebuild the modules (`quantization_config.records`), so that transformers loads a folder of which
only config and weights were copied; `read_manifest` refuses a folder in which the two disagree. All bytes are
a function of the arguments.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic import __version__
from laconic.core.record import ADAPT, CACHE, FOLD, PACK, Record, apply_records
from laconic.errors import BadInput
from laconic.nn import packed_specs
from laconic.numerics import Int, Scheme
from laconic.pipeline.source_base import Source
from laconic.pipeline.source_folder import EXTRAS
from laconic.pipeline.tensorfile import CHUNK, SINGLE

__all__ = [
    "CONFIG", "MANIFEST", "METHOD", "RECORDS", "VERSION", "Manifest", "check_filled", "describe_artifact", "float_path",
    "quantization_config", "read_json", "read_manifest", "records_from_json", "structural", "write_artifact_files",
]  # fmt: skip

VERSION = 1
MANIFEST, CONFIG, RECIPE, READER = "laconic.json", "config.json", "recipe.yaml", "read.py"
METHOD = "laconic"
RECORDS = "_laconic_records"  # attribute of a loaded model that is none of transformers': what was done to it
# What is hashed, as it is a function of model, data and seed; reports and timings stand outside.
HASHED = (SINGLE, CONFIG, RECIPE, READER, *EXTRAS, "*.py")
# What `apply_records` needs of a record; losses, methods and timings stay in laconic.json.
STRUCTURAL = (
    "action", "path", "spec", "aliases", "norm", "norms", "shapes", "untie", "untied", "layers", "becomes", "cache",
    "rank", "alpha", "dropout", "transposed",
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What `laconic.json` says.

    Attributes:
        folder: of the artifact.
        records: what was done to the model, in order.
        model: `kind`, `class`, `architectures` and `dtype` of the model.
        ledger: a row per parameter and buffer.
        hashes: file -> SHA-256.
        versions: of the packages that made it.
    """

    folder: Path
    records: list[Record]
    model: dict[str, Any]
    ledger: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


# --- writing ------------------------------------------------------------------------------------------------


def write_artifact_files(
    folder: str | os.PathLike[str],
    *,
    source: Source,
    records: Iterable[Record],
    ledger: Iterable[Mapping[str, Any]] = (),
    recipe_text: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Complete a folder that holds a finished `model.safetensors`.

    Args:
        folder: where the tensors lie.
        source: the float model; brings the config, tokenizer and processor files.
        records: what was done to it, in order; their tensors are not looked at.
        ledger: rows of JSON values.
        recipe_text: YAML of the recipe.
        versions: package -> version.

    Raises:
        BadInput: the folder holds no tensors, or a record does not fit the model.
    """
    target, records = Path(folder), list(records)
    if not (target / SINGLE).is_file():
        raise BadInput(f"{target} holds no {SINGLE}: write the tensors before the files that describe them")
    source.save_extras(target)
    model = source.skeleton()
    cls, dtype = type(model), _compute_dtype(model)  # before a packed root becomes another class
    adapted = {record.path for record in records if record.action == ADAPT}
    said = []
    for record in records:
        row = record.to_json()
        if record.action == PACK:
            row.setdefault("dtype", _short(source.spec(float_path(record.path, adapted))[0]))
        said.append(row)
    apply_records(model, (Record(r.action, r.path, r.data) for r in records))
    described = {"kind": source.kind, "class": cls, "dtype": dtype}
    if recipe_text is not None:
        (target / RECIPE).write_text(recipe_text, encoding="utf-8")
    describe_artifact(target, model, records, said, described, ledger=ledger, versions=versions)


def float_path(path: str, adapted: Collection[str]) -> str:
    """The path that a packed parameter had before its layer got an adapter."""
    layer, _, name = path.rpartition(".")
    inner = layer.removesuffix(".base")
    return f"{inner}.{name}" if layer != inner and inner in adapted else path


def describe_artifact(
    target: Path,
    model: nn.Module,
    records: Sequence[Record],
    said: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
    *,
    ledger: Iterable[Mapping[str, Any]] = (),
    versions: Mapping[str, str] | None = None,
) -> None:
    """Complete a folder that holds tensors, and a config where the model has one, from the model as it is compressed.

    Args:
        target: the folder.
        model: with the records applied; its values are not looked at.
        records: what was done to it, in order.
        said: the same as rows of JSON, with what is to be said beside.
        described: `kind`, `class` (a type) and `dtype` of the float model.
        ledger, versions: see `write_artifact_files`.
    """
    cls, dtype = described["class"], described["dtype"]
    if (target / CONFIG).is_file():
        config = read_json(target / CONFIG)
        # Without it, transformers would take the type of the first scale that it meets.
        config["dtype"] = config.get("dtype") or dtype
        if any(record.data.get("untie") for record in records):
            config["tie_word_embeddings"] = False  # else transformers would tie them again
        config["quantization_config"] = quantization_config(model, records)
        _write_json(target / CONFIG, config)
    shutil.copyfile(Path(__file__).with_name("read_artifact.py"), target / READER)
    manifest = {
        "version": VERSION,
        "laconic": __version__,
        "model": {
            "kind": described["kind"],
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "architectures": [cls.__name__],
            "dtype": dtype,
        },
        "records": [dict(row) for row in said],
        "ledger": [dict(row) for row in ledger],
        "versions": dict(versions or {}),
        "hashes": {name: _sha256(target / name) for name in _hashed_files(target)},
    }
    _write_json(target / MANIFEST, manifest)


def quantization_config(model: nn.Module, records: Iterable[Record]) -> dict[str, Any]:
    """The `quantization_config` of a packed model's `config.json`.

    `records` are what laconic's quantizer rebuilds from. `format`, `config_groups` and `ignore` say the same
    of the linear layers in compressed-tensors' own form, whose names and bytes they have.
    """
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "records": [structural(record) for record in records],
        **_foreign(model),
    }


def structural(record: Record) -> dict[str, Any]:
    """The JSON of a record that rebuilding needs."""
    data = {key: value for key, value in record.to_json().items() if key in STRUCTURAL}
    if record.action == PACK:
        data.setdefault("aliases", [])
    if record.action == ADAPT and "dtype" in record.data:
        data["dtype"] = record.data["dtype"]
    return data


def _foreign(model: nn.Module) -> dict[str, Any]:
    """compressed-tensors' description of the linear layers that have its form; the others are ignored."""
    groups: dict[tuple[str, int | None], list[str]] = {}
    for path, spec in packed_specs(model).items():
        module_path, _, name = path.rpartition(".")
        scheme, k = spec.scheme, spec.matrix[1]
        fits = isinstance(scheme.element, Int) and scheme.zero != "real" and scheme.fits(k)
        fits = fits and scheme.scale.granularity in ("channel", "group") and not spec.order
        if name == "weight" and isinstance(model.get_submodule(module_path), nn.Linear) and fits:
            # Their reader wants a length that the row has, ours cuts one that is longer.
            length = scheme.scale.group_of(k) if scheme.scale.granularity == "group" else None
            groups.setdefault((str(scheme), length), []).append(module_path)
    described = {path for paths in groups.values() for path in paths}
    ignored = sorted(
        path for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in described
    )  # fmt: skip
    config_groups = {}
    for i, (text, length) in enumerate(sorted(groups, key=str)):
        scheme = Scheme.parse(text)
        config_groups[f"group_{i}"] = {
            "targets": sorted(groups[text, length]),
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": scheme.scale.granularity,
                "group_size": length,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignored,
    }


def _compute_dtype(model: nn.Module) -> str:
    return _short(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(file: Path, value: Any) -> None:
    """Sorted keys and no time stamps, put in place by a rename."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    part = file.with_name(f"{file.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, file)


def _hashed_files(folder: Path) -> list[str]:
    found = {file for pattern in HASHED for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _sha256(file: Path) -> str:
    sha = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


# --- reading ------------------------------------------------------------------------------------------------


def is_artifact(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a compressed model of laconic, complete: an artifact, or what `save_pretrained` made of one."""
    return (Path(folder) / MANIFEST).is_file() or _saved_config(Path(folder)) is not None


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """config.json's words on quantization, in a folder that `save_pretrained` wrote; None in any other."""
    # An artifact that was not finished has the reader already.
    if (folder / MANIFEST).is_file() or (folder / READER).is_file() or not (folder / CONFIG).is_file():
        return None
    said = read_json(folder / CONFIG).get("quantization_config")
    return said if isinstance(said, dict) and said.get("quant_method") == METHOD else None


def read_manifest(folder: str | os.PathLike[str], *, verify: bool = False) -> Manifest:
    """What a folder's `laconic.json` says, checked; or config.json, which has the records where `save_pretrained` wrote it.

    Args:
        folder: an artifact.
        verify: also compare the SHA-256 of every file with the one recorded; reads all bytes.

    Raises:
        BadInput: it is no complete artifact of laconic, a newer one, or one that was changed by hand; or,
            with `verify`, a file is missing or has other bytes.
    """
    folder = Path(folder)
    file = folder / MANIFEST
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: give the folder that laconic compress wrote")
    saved = _saved_config(folder)
    if saved is not None:
        file, raw = folder / CONFIG, {**saved, "model": {"kind": "transformers"}, "hashes": {}}
    elif not file.is_file():
        raise BadInput(
            f"{folder} holds no {MANIFEST}: it is no artifact of laconic, or one that was not finished (run "
            "laconic compress again with --resume)"
        )
    else:
        raw = read_json(file)
    if not isinstance(raw.get("version"), int):
        raise BadInput(f"{file} lacks its version: it was changed or cut short, copy it again")
    if raw["version"] != VERSION:
        raise BadInput(
            f"{file} has version {raw['version']}, this laconic reads version {VERSION}: update laconic"
        )
    model, hashes = raw.get("model"), raw.get("hashes")
    if not isinstance(model, dict) or not isinstance(hashes, dict):
        raise BadInput(f"{file} lacks its model or hashes: it was changed or cut short, copy it again")
    for name in hashes:
        _check_file_name(name, file)
    records = records_from_json(raw.get("records"), file)
    manifest = Manifest(folder, records, model, raw.get("ledger") or [], hashes, raw.get("versions") or {})
    if not (folder / SINGLE).is_file():
        raise BadInput(f"{folder} holds no {SINGLE}: the artifact is incomplete, copy it again")
    if saved is None:
        _check_config(manifest)
    if verify:
        _check_hashes(manifest)
    return manifest


def records_from_json(rows: Any, file: str | os.PathLike[str]) -> list[Record]:
    """Records of a JSON list in `file`, whose paths can only be names inside a model.

    Raises:
        BadInput: a record does not parse, or its path climbs out.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{file} holds no list of records: it was changed or cut short, copy it again")
    records = [Record.from_json(row) for row in rows]
    for record in records:
        named = [record.path] if record.action != CACHE else []  # which is of the whole model
        if record.action == FOLD:
            named.append(record.data.get("norm"))
        aliases = record.data.get("aliases", [])
        if not isinstance(aliases, list):
            raise BadInput(f"{file}: the aliases of {record.path} are not a list: copy it again")
        for path in [*named, *aliases]:
            _check_parameter_path(path, file)
    return records


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadInput: the file cannot be read, or is not one.
    """
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{file} is not valid JSON ({error}): it was changed or cut short, copy it again"
        ) from error
    if not isinstance(raw, dict):
        raise BadInput(f"{file} is not a JSON object: copy it again")
    return raw


def _check_parameter_path(path: Any, file: str | os.PathLike[str]) -> None:
    """Module paths are names joined by single dots; slashes and empty parts belong to file systems."""
    if not isinstance(path, str) or any(c in path for c in "/\\\0") or not all(path.split(".")):
        raise BadInput(
            f"{file} names the path {path!r}, which climbs out of the model: the file is not to be trusted"
        )
    if any(part.startswith("__") for part in path.split(".")):
        raise BadInput(
            f"{file} names the path {path!r}, which no parameter has: the file is not to be trusted"
        )


def _check_file_name(name: str, file: Path) -> None:
    parts = name.split("/")
    if "\\" in name or "\0" in name or ":" in name or not all(part not in ("", ".", "..") for part in parts):
        raise BadInput(
            f"{file} names the file {name!r}, which climbs out of its folder: it is not to be trusted"
        )


def _check_config(manifest: Manifest) -> None:
    """config.json repeats the records; one that says otherwise was edited, or belongs to another artifact."""
    file = manifest.folder / CONFIG
    if manifest.model.get("kind") != "transformers":
        return
    if not file.is_file():
        raise BadInput(f"{manifest.folder} holds no {CONFIG}: the artifact is incomplete, copy it again")
    said = read_json(file).get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        raise BadInput(f"{file} has no quantization_config of laconic: it was changed, copy it again")
    if said.get("records") != [structural(record) for record in manifest.records]:
        raise BadInput(
            f"{file} and {MANIFEST} disagree about what was packed: one was changed, copy both again"
        )


def _check_hashes(manifest: Manifest) -> None:
    for name, recorded in manifest.hashes.items():
        file = manifest.folder / name
        if not file.is_file():
            raise BadInput(f"{file} is missing: the artifact is incomplete, copy it again")
        if _sha256(file) != recorded:
            raise BadInput(f"{file} is not the file that laconic wrote (its SHA-256 differs): copy it again")


def check_filled(model: nn.Module) -> None:
    """Compare the shape stored beside each packed parameter with its record's; lost values show here as well.

    Raises:
        BadInput: naming the first parameter that differs.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for path, spec in packed_specs(model).items():
        owner, _, name = path.rpartition(".")
        module = modules[owner]
        shape = module.packed_tensor(name, "shape")
        if shape is None or shape.is_meta or tuple(shape.tolist()) != spec.shape:
            raise BadInput(
                f"{path} was recorded with shape {spec.shape}, but another shape is stored beside its "
                "weights: they were not loaded, or belong to another model; copy the artifact again"
            )
