"""The user's files, read into one plain form: texts, pictures or arrays, and labels; models aside."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laconic.errors import BadInput

from .zoo import need

__all__ = ["FORMATS", "Data", "read_data"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = (
    "text (.txt, .md), JSONL (.jsonl), CSV (.csv, .tsv), Parquet (.parquet), NPZ (.npz), a folder of images"
)
LABEL_ARRAYS = ("y", "label", "labels")


@dataclass
class Data:
    """What a file holds; exactly one of `texts`, `images` and `arrays` is given.

    Attributes:
        name: the file, for messages.
        texts: one for each row; a plain text file is one.
        images: picture files.
        arrays: by name, without labels; the first dimension counts examples.
        labels: class names or numbers, one for each row, or None.
        running: `texts` is one running text and not a row of a table.
    """

    name: str
    texts: list[str] | None = None
    images: list[Path] | None = None
    arrays: dict[str, np.ndarray] | None = None
    labels: list | np.ndarray | None = None
    running: bool = False

    def __len__(self) -> int:
        held = self.texts if self.texts is not None else self.images
        return len(held) if held is not None else len(next(iter((self.arrays or {}).values())))


def read_data(path: Path, columns: Mapping[str, str]) -> Data:
    """Read a file or an image folder by its name's ending.

    Args:
        path: it must exist.
        columns: which column or array plays which role, e.g. {"text": "body", "label": "topic"}; roles are
            text, image and label, in NPZ files also the names of the model's inputs.

    Raises:
        BadInput: unknown format, unreadable or empty content, a column that is not there.
    """
    ending = path.suffix.lower()
    if path.is_dir():
        return _image_folder(path, columns)
    if ending == ".npz":
        return _arrays(path, columns)
    readers: dict[str, Callable[[Path], dict[str, list]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    if ending in readers:
        return _table(path, readers[ending](path), columns)
    if ending in (".txt", ".text", ".md"):
        _known_roles(path, columns, ())
        text = _text(path)
        if not text.strip():
            raise BadInput(f"{path} is empty")
        return Data(path.name, texts=[text], running=True)
    raise BadInput(f"{path} has a format that is not read here; those that are: {FORMATS}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it"
        ) from error


def _known_roles(path: Path, columns: Mapping[str, str], known: tuple[str, ...]) -> None:
    for role in columns:
        if role not in known:
            allowed = f"the roles here are {', '.join(known)}" if known else "this format has no columns"
            raise BadInput(f"columns: {role}={columns[role]} makes no sense for {path.name}; {allowed}")


# Tables


def _jsonl(path: Path) -> dict[str, list]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadInput(
                f"{path}, line {number}: each line must be a JSON object, found {type(row).__name__}"
            )
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _csv(path: Path) -> dict[str, list]:
    limit = csv.field_size_limit(sys.maxsize)  # documents are longer than the module's 128 KiB
    try:
        lines = _text(path).splitlines(keepends=True)
        reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header = next(reader, [])
        table: dict[str, list] = {name: [] for name in header}
        if len(table) != len(header):
            raise BadInput(f"{path} has two columns of the same name: {', '.join(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise BadInput(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}"
                )
            for name, value in zip(header, row, strict=True):
                table[name].append(value)
    except csv.Error as error:
        raise BadInput(f"{path} is no sound CSV file: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return table


def _parquet(path: Path) -> dict[str, list]:
    need("pyarrow", f"{path.name} is a Parquet file")
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _table(path: Path, table: dict[str, list], columns: Mapping[str, str]) -> Data:
    _known_roles(path, columns, ("text", "image", "label"))
    if not table or not len(next(iter(table.values()))):
        raise BadInput(f"{path} is empty: it has no row of data")
    for role, name in columns.items():
        if name not in table:
            raise BadInput(f"{path} has no column {name!r} (named for {role}); it has: {', '.join(table)}")
    label = columns.get("label") or ("label" if "label" in table else None)
    labels = table[label] if label else None
    if labels is not None and None in labels:
        raise BadInput(f"{path}, row {labels.index(None) + 1}: no value in the column {label!r}")
    if "image" in columns:
        images = [path.parent / str(value) for value in _strings(path, columns["image"], table)]
        return Data(path.name, images=images, labels=labels)
    name = columns.get("text") or _text_column(path, table, label)
    return Data(path.name, texts=_strings(path, name, table), labels=labels)


def _text_column(path: Path, table: Mapping[str, list], label: str | None) -> str:
    """The column called text, or the only one of strings."""
    if "text" in table:
        return "text"
    strings = [
        name for name, values in table.items() if name != label and all(isinstance(v, str) for v in values)
    ]
    if len(strings) != 1:
        raise BadInput(
            f"{path}: say which column is the text, e.g. text={next(iter(table))}; it has: {', '.join(table)}"
        )
    return strings[0]


def _strings(path: Path, name: str, table: Mapping[str, list]) -> list[str]:
    for row, value in enumerate(table[name], 1):
        if not isinstance(value, str) or not value.strip():
            what = (
                "is empty"
                if value is None or isinstance(value, str)
                else f"holds {type(value).__name__}, not text"
            )
            raise BadInput(f"{path}, row {row}: the column {name!r} {what}")
    return table[name]


# Arrays and pictures


def _arrays(path: Path, columns: Mapping[str, str]) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = "it holds Python objects, which are never loaded" if "allow_pickle" in str(error) else error
        raise BadInput(f"{path} cannot be read as NPZ: {reason}") from error
    for role, name in columns.items():
        if name not in arrays:
            raise BadInput(
                f"{path} has no array {name!r} (named for {role}); it has: {', '.join(arrays) or 'none'}"
            )
    renamed = {name: role for role, name in columns.items()}
    arrays = {renamed.get(name, name): value for name, value in arrays.items()}
    labels = next((arrays.pop(name) for name in LABEL_ARRAYS if name in arrays), None)
    lengths = {name: len(value) if value.ndim else -1 for name, value in arrays.items()}
    if labels is not None:
        lengths["labels"] = len(labels) if labels.ndim else -1
    if not arrays or 0 in lengths.values():
        raise BadInput(f"{path} is empty: it has no array with a row of data")
    if len(set(lengths.values())) > 1:
        raise BadInput(f"{path}: all arrays must have the same number of rows, found {lengths}")
    return Data(path.name, arrays=arrays, labels=labels)


def _image_folder(path: Path, columns: Mapping[str, str]) -> Data:
    """Pictures in a folder; where they lie in subfolders, those are the classes."""
    _known_roles(path, columns, ())
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not found:
        raise BadInput(
            f"{path} holds no image ({', '.join(PICTURES)}); a data folder is a folder of images, by class "
            "or not"
        )
    classes = [file.relative_to(path).parts[0] if file.parent != path else None for file in found]
    if None in classes and any(classes):
        stray = found[classes.index(None)]
        raise BadInput(
            f"{path} has images both in class folders and beside them ({stray.name}); put all into class "
            "folders"
        )
    return Data(path.name, images=found, labels=None if None in classes else classes)


def open_images(files: list[Path], mode: str) -> list[Any]:
    """The pictures of these files as PIL images in a mode ("RGB", "L").

    Raises:
        BadInput: naming the first that cannot be read.
    """
    need("PIL", "the data is a set of images")
    from PIL import Image

    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(picture.convert(mode))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # PNG errors are SyntaxErrors
            reason = str(error).replace(str(file), file.name) or type(error).__name__
            raise BadInput(f"the image {file} cannot be read: {reason}") from error
    return pictures
