"""From the user's data to a model's inputs: tokens, pixel values, tensors, for each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import BadInput

from .base import Batch, cut
from .readers import Data, open_images
from .view import ModelView

__all__ = ["array_inputs", "image_inputs", "text_inputs"]

TOKENS = 128  # of a text, where the user does not say
IMAGES_AT_ONCE = 16  # photographs are large before they are resized

Splits = dict[str, np.ndarray]
Inputs = dict[str, Batch]


def text_inputs(data: Data, splits: Splits, view: ModelView, seq: int | None) -> Inputs:
    """Tokens padded to the longest text of all splits, or cut at `seq`."""
    tokenizer = view.get_tokenizer(data)
    length = min(seq or TOKENS, view.positions() or TOKENS)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise BadInput(
            f"the tokenizer of {view.name} has no padding token, which batches of texts need; set pad_token"
        )
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    inputs: Inputs = {}
    for split, indices in splits.items():
        found = tokenizer([data.texts[i] for i in indices], **options)
        rows = {name: found[name] for name in ("input_ids", "attention_mask")}
        view.check_ids(rows["input_ids"], data)
        if getattr(view.source.config, "is_encoder_decoder", False) and view.classes is None:
            rows["decoder_input_ids"] = _one_late(rows["input_ids"], view.source.config, tokenizer)
        inputs[split] = rows
    if getattr(tokenizer, "padding_side", "right") == "left":
        return inputs
    longest = max(int(rows["attention_mask"].sum(1).max()) for rows in inputs.values())
    return {split: cut(rows, longest) for split, rows in inputs.items()}


def _one_late(ids: Tensor, config: Any, tokenizer: Any) -> Tensor:
    """What a decoder reads: the text itself, one token late."""
    start = config.decoder_start_token_id
    shifted = ids.roll(1, dims=1)
    shifted[:, 0] = tokenizer.pad_token_id if start is None else start
    return shifted


def image_inputs(data: Data, splits: Splits, view: ModelView) -> tuple[Inputs, list[str]]:
    """Pixel values by the image processor; for a plain module resized to its example, scaled to its range."""
    if view.main is not None:
        processor = _image_processor(view)
        mode = "L" if getattr(view.source.config, "num_channels", 3) == 1 else "RGB"
        notes = []

        def pixels(files: list[Path]) -> Tensor:
            return processor(images=open_images(files, mode), return_tensors="pt")["pixel_values"]

    else:
        channels, height, width = _example_image(data, view)
        low, high = getattr(view.source.skeleton(), "input_range", (0.0, 1.0))
        mode = "RGB" if channels == 3 else "L"
        notes = [f"pixels were resized to {height} x {width} and scaled to {low:g}..{high:g}"]

        def pixels(files: list[Path]) -> Tensor:
            pictures = [picture.resize((width, height)) for picture in open_images(files, mode)]
            values = np.stack([np.asarray(picture, np.float32) for picture in pictures])
            values = values.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
            return torch.from_numpy(np.ascontiguousarray(low + values * ((high - low) / 255.0), np.float32))

    inputs: Inputs = {}
    for split, indices in splits.items():
        files = [data.images[i] for i in indices]
        parts = [pixels(files[i : i + IMAGES_AT_ONCE]) for i in range(0, len(files), IMAGES_AT_ONCE)]
        inputs[split] = (torch.cat(parts),) if view.main is None else {view.main: torch.cat(parts)}
    return inputs, notes


def _example_image(data: Data, view: ModelView) -> tuple[int, int, int]:
    """Channels, height and width of the images in a plain module's example."""
    args, kwargs = view.source.example()
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] in (1, 3):
            return tuple(value.shape[1:])
    raise BadInput(
        f"{data.name} holds images, but the example input of {view.name} is no batch of images (n, 1 or 3, "
        "height, width); give an NPZ file with what it reads"
    )


def _image_processor(view: ModelView) -> Any:
    from transformers import AutoImageProcessor

    folder = getattr(view.source, "folder", None)
    if folder is None or not (Path(folder) / "preprocessor_config.json").is_file():
        raise BadInput(
            f"{view.name} has no preprocessor_config.json, which says how images become its inputs: copy "
            "it to the "
            "model's folder, or give an NPZ file with pixel_values"
        )
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise BadInput(
            f"the image processor in {folder} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def array_inputs(data: Data, splits: Splits, view: ModelView, seq: int | None) -> Inputs:
    """The arrays of an NPZ file as tensors; one called x is the main input, others keep their names."""
    arrays = dict(data.arrays)
    if view.main is not None and "x" in arrays and view.main not in arrays:
        arrays[view.main] = arrays.pop("x")
    if view.main is not None and view.main not in arrays:
        raise BadInput(
            f"{data.name} has the arrays {', '.join(arrays)}, but {view.name} ({view.kind}) reads "
            f"{view.main}: "
            f"name an array so, or say {view.main}=NAME"
        )
    positional = view.main is None and set(arrays) == {"x"}
    inputs: Inputs = {}
    for split, indices in splits.items():
        rows = {name: _tensor(name, value[indices], data, view) for name, value in arrays.items()}
        rows = cut(rows, seq)
        inputs[split] = (rows["x"],) if positional else rows
    return inputs


def _tensor(name: str, values: np.ndarray, data: Data, view: ModelView) -> Tensor:
    """A float32 or int64 tensor; bytes are pixels unless they are token ids."""
    if values.dtype.kind not in "fiub":
        raise BadInput(f"{data.name}: the array {name!r} holds {values.dtype}, not numbers")
    if name == "input_ids":
        if values.dtype.kind == "f":
            raise BadInput(
                f"{data.name}: the array {name!r} holds {values.dtype}, but {view.name} ({view.kind}) "
                "reads token ids "
                "(whole numbers) there"
            )
        ids = torch.from_numpy(values.astype(np.int64))
        view.check_ids(ids, data)
        return ids
    if (
        values.dtype.kind == "f"
        or values.dtype == np.uint8
        or name in ("pixel_values", "input_values", "input_features")
    ):
        floats = torch.from_numpy(values.astype(np.float32))
        if not bool(torch.isfinite(floats).all()):
            raise BadInput(f"{data.name}: the array {name!r} holds values that are not finite")
        return floats
    return torch.from_numpy(values if values.dtype.kind == "b" else values.astype(np.int64))
