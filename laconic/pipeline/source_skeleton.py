"""The skeleton of a transformers folder: on meta, checked against the weight files, tied, with real buffers.

This follows `from_pretrained` step by step (build untied on meta, map names, initialise what no file holds,
tie), but reads nothing, and refuses where `from_pretrained` would only warn and go on with random or dropped
weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laconic.errors import BadInput
from laconic.pipeline.source_base import all_tensors, first_line, put, tensor_owners
from laconic.pipeline.source_names import Origin, map_names, meta_reader
from laconic.pipeline.source_weights import FLOATS, Store, few

__all__ = ["Blueprint", "build", "initialise", "on_meta"]

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass
class Blueprint:
    """A skeleton and where each of its tensors comes from.

    Attributes:
        model: the skeleton; never handed out, only copied.
        origins: module name -> how it comes about from the files.
        stored_as: module name -> that name, or the tied one, which the files hold.
        given: tensors that no file holds and transformers initialises by design.
        notes: what was odd and accepted.
    """

    model: Any
    origins: dict[str, Origin] = field(default_factory=dict)
    stored_as: dict[str, str] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(cls: Any, config: Any, dtype: torch.dtype, store: Store, folder: Path) -> Blueprint:
    """The blueprint of `cls(config)` with the weights in `store`.

    Args:
        cls: a transformers model class.
        config: its config.
        dtype: the dtype in which `from_pretrained` would load it.
        store: the weight files.
        folder: named in errors.

    Raises:
        BadInput: if config and weight files don't make a complete float model.
    """
    plan = Blueprint(on_meta(cls, config, dtype, folder))
    model = plan.model
    found, unused = map_names(model, store.names())
    tensors = all_tensors(model)
    specs = _specs(plan, found, store, folder)
    unused += [name for name in specs if name not in tensors]
    _check(specs, tensors, cls, folder)
    _note_unused(plan, unused)
    for group in _tie_groups(model, tensors):
        stored = [name for name in group if name in plan.origins]
        _check_copies(plan, stored, store, folder)
        plan.stored_as.update(dict.fromkeys(group, stored[0]) if stored else {})
    absent = _absent(plan, tensors, folder)
    initialise(model, absent)
    model.tie_weights(recompute_mapping=False)
    _put_back(plan, absent)
    model.eval()
    return plan


def on_meta(cls: Any, config: Any, dtype: torch.dtype, folder: Path) -> Any:
    """The model on meta, untied, each tensor in the dtype in which `from_pretrained` would load it."""
    from transformers.core_model_loading import build_glob_alternation

    try:
        with ExitStack() as stack:
            for context in cls.get_init_context(dtype, False, False, None):
                stack.enter_context(context)
            stack.enter_context(_NothingToDraw())
            model = cls(copy.deepcopy(config))
    except Exception as error:  # a model's constructor may raise anything on a config that doesn't fit
        raise BadInput(
            f"{folder / 'config.json'}: {cls.__name__} cannot be built from it: {first_line(error)}"
        ) from error
    kept = model._get_dtype_plan(dtype)  # parts that stay in float32 in half-precision models
    if kept:
        pattern, of_group, _ = build_glob_alternation(list(kept))
        owners = tensor_owners(model)
        for name, tensor in all_tensors(model).items():
            match = pattern.search(name)
            if match and tensor.is_floating_point() and id(tensor) in owners:
                put(owners, tensor, torch.empty_like(tensor, dtype=kept[of_group[match.lastgroup]]))
    return model


class _NothingToDraw(TorchFunctionMode):
    """A tensor on meta has no values, and going through the motions of drawing them takes as long as the rest."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def _specs(plan: Blueprint, found: Iterable[Origin], store: Store, folder: Path) -> dict[str, Spec]:
    """Record each origin under the names that it makes; their dtypes and shapes, found without reading."""
    specs: dict[str, Spec] = {}
    read = meta_reader(store.spec)
    for origin in found:
        if origin.converter is None:
            plan.origins[origin.first] = origin
            specs[origin.first] = store.spec(origin.sources[0][1])
            continue
        try:
            made = origin.convert(read, plan.model)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise BadInput(
                f"{folder}: {origin.first} cannot be put together from "
                f"{few([name for _, name in origin.sources])} ({first_line(error)}): some are missing, or "
                "have the wrong shape or dtype"
            ) from error
        for name, tensor in made.items():
            plan.origins[name] = origin
            specs[name] = tensor.dtype, tuple(tensor.shape)
    return specs


def _check(specs: dict[str, Spec], tensors: dict[str, Tensor], cls: Any, folder: Path) -> None:
    """Dtypes first, since quantized weights often have other shapes too; then shapes."""
    for name, (dtype, _) in specs.items():
        if name in tensors and tensors[name].is_floating_point() and dtype not in FLOATS:
            raise BadInput(
                f"{folder}: {name} is stored as {str(dtype).removeprefix('torch.')}, where {cls.__name__} "
                "has floats: the weights seem to be quantized by another tool; give the original float model"
            )
    for name, (_, shape) in specs.items():
        if name in tensors and shape != tuple(tensors[name].shape):
            raise BadInput(
                f"{folder}: {name} has shape {shape} in the weight files, but config.json asks for "
                f"{tuple(tensors[name].shape)}: config and weights do not belong together"
            )


def _note_unused(plan: Blueprint, unused: list[str]) -> None:
    """Note tensors on disk that the model has no place for, unless transformers expects them."""
    # Buffers that older versions stored, and that are computed now.
    patterns = [
        *(plan.model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    unused = [name for name in unused if not any(re.search(pattern, name) for pattern in patterns)]
    if unused:
        plan.notes.append(
            f"{len(unused)} tensors in the weight files have no place in {type(plan.model).__name__} as "
            f"config.json describes it and are left out: {few(unused)}"
        )


def _tie_groups(model: Any, tensors: dict[str, Tensor]) -> list[list[str]]:
    """All names, grouped by the tensor that they will share once tied."""
    group_of: dict[str, list[str]] = {}
    shared: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        group_of[name] = shared.setdefault(id(tensor), [])
        group_of[name].append(name)
    for target, source in model.all_tied_weights_keys.items():
        into, other = group_of[source], group_of[target]
        if into is not other:
            into.extend(other)
            group_of.update(dict.fromkeys(other, into))
    return list({id(group): group for group in group_of.values()}.values())


def _check_copies(plan: Blueprint, stored: list[str], store: Store, folder: Path) -> None:
    """Refuse a tied tensor that is stored more than once with different values."""
    disk = [plan.origins[name].sources[0][1] for name in stored]
    for name, other in zip(stored[1:], disk[1:], strict=True):
        if store.spec(disk[0]) != store.spec(other) or store.digest(disk[0]) != store.digest(other):
            raise BadInput(
                f"{folder}: config.json ties {stored[0]} and {name}, but the weight files hold both, with "
                "different values: set tie_word_embeddings to false if both are meant, else remove one"
            )


def _absent(plan: Blueprint, tensors: dict[str, Tensor], folder: Path) -> list[str]:
    """Tensors that the files lack and transformers initialises by design; any other parameter is an error."""
    model = plan.model
    ignored = model._keys_to_ignore_on_load_missing or ()
    lacking = [name for name in model.state_dict() if name in tensors and name not in plan.stored_as]
    missing = [
        name
        for name in lacking
        if isinstance(tensors[name], nn.Parameter) and not any(re.search(each, name) for each in ignored)
    ]
    if missing:
        raise BadInput(
            f"{folder}: {len(missing)} of the {len(tensors)} tensors of {type(model).__name__} are not in "
            f"the weight files ({few(missing)}): config.json and weights do not belong together, or the "
            "checkpoint is incomplete"
        )
    if lacking:
        plan.notes.append(f"not in the weight files, and initialised as transformers does: {few(lacking)}")
    return lacking


def initialise(model: Any, absent: list[str]) -> None:
    """Make real what no file holds (rotary frequencies, position ids), by transformers' own initialisation.

    What will be read is marked as initialised, so that nothing is drawn for it, and stays on meta.
    """
    owners = tensor_owners(model)
    real = {*absent, *(name for name, _ in model.named_non_persistent_buffers())}
    for name, tensor in all_tensors(model).items():
        if name in real:
            put(owners, tensor, torch.empty_like(tensor, device="cpu"))
        else:
            tensor._is_hf_initialized = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()


def _put_back(plan: Blueprint, absent: list[str]) -> None:
    """Keep the values of absent tensors aside and put them on meta, so that they are served like others."""
    owners = tensor_owners(plan.model)
    tensors = all_tensors(plan.model)
    for name in absent:
        plan.given[name] = tensors[name].detach()
    for tensor in {id(tensors[name]): tensors[name] for name in absent}.values():
        put(owners, tensor, torch.empty_like(tensor, device="meta"))
