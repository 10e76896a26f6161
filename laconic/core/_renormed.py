"""Doing what a record of `laconic.core.renorm` or `.rotation` says: other norms, weights, rotated inputs, no ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.nn.rotated import restore_outputs, rotate_inputs
from laconic.nn.stream_norm import ChannelAffine, StreamNorm

__all__ = ["KINDS", "renorm"]

KINDS = ("rms", "crms", "none")
# How a module calls the size of an axis of its weight: class name -> attributes by axis.
SIZES: Mapping[str, tuple[str, ...]] = {
    "Linear": ("out_features", "in_features"),
    "Conv1D": ("nx", "nf"),
    "Embedding": ("num_embeddings", "embedding_dim"),
    **{f"Conv{n}d": ("out_channels",) for n in (1, 2, 3)},
}


def renorm(model: nn.Module, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Do to a model, also one on meta, what a record's data and tensors say.

    Raises:
        KeyError, ValueError: the record does not fit.
    """
    for name in data.get("untie", ()):
        _untie_one(model, name, data["untied"])
    for path, said in data.get("norms", {}).items():
        _replace_norm(model, path, said)
    for name, shape in data.get("shapes", {}).items():
        _give(model, name, tuple(shape), tensors.get(name))
    for path, said in data.get("rotated_inputs", {}).items():
        rotate_inputs(model.get_submodule(path), int(said["size"]), int(said["stride"]))
    for path, said in data.get("restored_outputs", {}).items():
        restore_outputs(model.get_submodule(path), int(said["size"]), [int(i) for i in said["order"]])


def _replace_norm(model: nn.Module, path: str, said: Mapping[str, Any]) -> None:
    old: Any = model.get_submodule(path)
    like = old.weight if getattr(old, "weight", None) is not None else next(model.parameters())
    kind, width = said["kind"], int(said["width"])
    if kind not in KINDS:
        raise ValueError(f"{path}: the norm is to become {kind!r}, which is none of {', '.join(KINDS)}")
    affine, bias = bool(said.get("affine")), bool(said.get("bias"))
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    made: nn.Module
    if kind == "none":
        made = ChannelAffine(width, bias=bias, **options) if affine else nn.Identity()
    else:
        short = kind == "crms"
        made = StreamNorm(
            width, float(said["eps"]), affine=affine, bias=bias, short=short, restore=short and affine, **options
        )
    made.train(old.training)
    model.set_submodule(path, made)


def _give(model: nn.Module, name: str, shape: tuple[int, ...], value: Tensor | None) -> None:
    """Let a parameter have a shape, and a value where there is one."""
    module_path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(module_path)
    old = getattr(module, attribute)
    like = old if old is not None else module.weight
    if old is None or tuple(old.shape) != shape:
        fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
        setattr(module, attribute, nn.Parameter(fresh, requires_grad=like.requires_grad))
        if attribute == "weight":
            for size, said in zip(shape, SIZES.get(type(module).__name__, ()), strict=False):
                setattr(module, said, size)
    if value is not None:
        with torch.no_grad():
            getattr(module, attribute).copy_(value)


def _untie_one(model: Any, name: str, canonical: str) -> None:
    module_path, _, attribute = name.rpartition(".")
    value = model.get_parameter(canonical)
    fresh = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    setattr(model.get_submodule(module_path), attribute, fresh)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):  # else transformers would tie them again when it saves or loads
        config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        model.all_tied_weights_keys = {a: b for a, b in tied.items() if name not in (a, b)}
