"""Tiny inputs for any transformers model, by its modality: enough to run its forward once for tracing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laconic.errors import BadInput

__all__ = ["example_inputs"]

LENGTH = 8  # tokens
FRAMES = 16  # audio frames behind the convolutions
PIXELS = 64  # image side where the config does not fix one
_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")


def example_inputs(cls: Any, config: Any) -> tuple[tuple, dict[str, Any]]:
    """`(args, kwargs)` of a forward call: all by keyword, deterministic, caches off.

    Args:
        cls: the model class; its `main_input_name` and the signature of its `forward` decide.
        config: its config, which gives sizes, vocabulary and dtype.

    Raises:
        BadInput: if the main input is of a kind that we can't make up.
    """
    accepted = inspect.signature(cls.forward).parameters
    main = cls.main_input_name
    if main not in accepted:
        main = next((name for name in _MAKERS if name in accepted), main)
    if main not in _MAKERS:
        raise BadInput(
            f"no example input can be made up for {cls.__name__} (its main input is {main!r}): give data, or "
            "let module:function return (model, example)"
        )
    # Without a padding token a classifier of texts takes no batch.
    lone = (
        cls.__name__.endswith("ForSequenceClassification") and getattr(config, "pad_token_id", None) is None
    )
    batch = 1 if lone else 2
    inputs: dict[str, Any] = {main: _MAKERS[main](config, batch)}
    if "decoder_input_ids" in accepted and (_is_seq2seq(config) or "labels" in accepted):
        inputs["decoder_input_ids"] = _ids(config, batch, decoder=True)
    if "pixel_values" in accepted and "input_ids" in inputs and _reads_both(config):
        inputs["pixel_values"] = _image(config, batch)
    if "use_cache" in accepted:
        inputs["use_cache"] = (
            False  # a cache in the output says nothing about the structure and hinders export
        )
    return (), inputs


def _is_seq2seq(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _reads_both(config: Any) -> bool:
    """Whether text and image are two inputs side by side (CLIP), not an image inside of a text (LLaVA)."""
    placeholders = any(getattr(config, name, None) is not None for name in _PLACEHOLDERS)
    return hasattr(config, "text_config") and hasattr(config, "vision_config") and not placeholders


def _look(config: Any, name: str, default: Any = None) -> Any:
    """The value of `name` in a config, or else in one of its parts."""
    parts = [getattr(config, key, None) for key in (*config.sub_configs, "encoder", "backbone_config")]
    for part in (config, *parts):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    return default


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _noise(config: Any, *shape: int) -> Tensor:
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.randn(*shape, generator=_generator()).to(dtype)


def _ids(config: Any, batch: int, decoder: bool = False) -> Tensor:
    """Token ids; each row ends with the end token, where the model pools, and has it nowhere else."""
    text = config.get_text_config(decoder=True) if decoder else config.get_text_config()
    vocabulary, end = _look(text, "vocab_size", 2), _look(text, "eos_token_id")
    end = end[0] if isinstance(end, list) else end
    positions = (
        _look(text, name) for name in ("max_position_embeddings", "max_target_positions", "n_positions")
    )
    length = min([LENGTH, *(count for count in positions if isinstance(count, int) and count > 0)])
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (batch, length), generator=_generator())
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = end - 1 if end else min(1, vocabulary - 1)
        ids[:, -1] = end
    return ids


def _image(config: Any, batch: int) -> Tensor:
    """Images of the size that the config fixes."""
    size = _look(config, "image_size", PIXELS)
    if isinstance(size, dict):
        size = size["height"], size["width"]
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    return _noise(config, batch, _look(config, "num_channels", 3), height, width)


def _waveform(config: Any, batch: int) -> Tensor:
    """Sound just long enough for some frames; a spectrogram for models that take that under the same name."""
    if getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
        return _noise(config, batch, config.max_length, config.num_mel_bins)
    samples = FRAMES
    kernels, strides = _look(config, "conv_kernel", ()), _look(config, "conv_stride", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return _noise(config, batch, samples)


def _spectrogram(config: Any, batch: int) -> Tensor:
    """Features (batch, bins, frames) for Whisper, which takes one length only, else (batch, frames, bins)."""
    bins = _look(config, "num_mel_bins")
    if bins and _look(config, "max_source_positions"):
        return _noise(config, batch, bins, 2 * _look(config, "max_source_positions"))
    bins = _look(config, "input_feat_per_channel", 0) * _look(config, "input_channels", 1) or bins
    return _noise(config, batch, 4 * FRAMES, _look(config, "feature_projection_input_dim") or bins or 80)


_MAKERS: dict[str, Callable[[Any, int], Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _image,
    "input_values": _waveform,
    "input_features": _spectrogram,
}
