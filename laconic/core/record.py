"""`Record`: what a pass did to one unit, as JSON and tensors, and `apply_records`: doing it to a model again.

An artifact's `laconic.json` holds the records in order. Applying them to a fresh skeleton on meta gives a model whose
state dict has the names and shapes of the artifact's `model.safetensors`; filling it is loading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.affine import split_affine
from laconic.core.lora import adapt_layer_, lora_layers
from laconic.errors import BadInput
from laconic.nn import PackedParameterSpec, declare, declare_alias, fill, is_packed, packed_specs
from laconic.nn.blocks import fuse_block
from laconic.nn.default_cache import CacheOptions, use_cache
from laconic.nn.packed import _is_conv1d

from ._renormed import renorm

PACK = "pack"
FOLD = "fold_batchnorm"
FOLD_AFFINE = "fold_affine"
FUSE = "fuse"
REWRITE = "rewrite"  # values changed and structure did not: nothing to do again when an artifact is loaded
RENORM = "renorm"
CACHE = "cache"
ADAPT = "adapt"
ACTIONS = (PACK, FOLD, FOLD_AFFINE, FUSE, REWRITE, RENORM, CACHE, ADAPT)


@dataclass
class Record:
    """One change of a model.

    Attributes:
        action: "pack" (a parameter became packed), "fold_batchnorm" (a norm went into the layer before it),
            "fold_affine" (a norm went into the layers around it), "fuse" (a transformer block runs as compiled code),
            "rewrite" (a pass named in `data["pass"]` changed values only), "renorm" (norms were taken apart into the
            layers around them, `laconic.core.renorm`), "cache" (`generate` packs its keys and values) or "adapt" (a linear
            layer got a low-rank adapter).
        path: of the parameter, of the layer that took the norm in, of the norm, of the block, of what was rewritten, or of
            the layer with an adapter, whose own parameters are those of PATH.base from then on; "" for the model.
        data: JSON: `spec` and `aliases` of a packed parameter, `norm` of a fold, `layers` and `becomes` of a norm that
            is folded; `rank`, `alpha`, `dropout` and `dtype` of an adapter; `method`, `loss` and whatever the pass wants to say.
        tensors: by suffix, what a packed parameter stores, or `lora_A` and `lora_B`; empty when only the structure
            matters.
    """

    action: str
    path: str
    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `laconic.json` holds it; the tensors stand in `model.safetensors`."""
        return {"action": self.action, "path": self.path, **self.data}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        """A record of `laconic.json`.

        Raises:
            BadInput: it does not parse, or its action is not known.
        """
        rest = {k: v for k, v in data.items() if k not in ("action", "path")}
        try:
            record = Record(str(data["action"]), str(data["path"]), rest)
            if record.action not in ACTIONS:
                raise ValueError(f"action {record.action!r} is not known to this laconic")
            if record.action == PACK:
                PackedParameterSpec.from_json(rest["spec"])
            elif record.action == CACHE:
                CacheOptions.from_json(rest["cache"])
            elif record.action == ADAPT and (type(rest["rank"]) is not int or rest["rank"] < 1):
                raise ValueError(f"an adapter of rank {rest['rank']!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"laconic.json holds a record that does not parse: {error}") from error
        return record

    @property
    def spec(self) -> PackedParameterSpec:
        """How a packed parameter is stored."""
        return PackedParameterSpec.from_json(self.data["spec"])


def apply_records(model: nn.Module, records: Iterable[Record]) -> list[str]:
    """Do to a model, also one on meta, what the records say; returns the paths changed, in order.

    Raises:
        BadInput: a record names a module or parameter that the model does not have.
    """
    changed = []
    for record in records:
        try:
            if record.action == FOLD:
                apply_fold(model, record)
            elif record.action == FOLD_AFFINE:
                apply_fold_affine(model, record)
            elif record.action == PACK:
                _apply_pack(model, record)
            elif record.action == FUSE:
                fuse_block(model.get_submodule(record.path))
            elif record.action == RENORM:
                renorm(model, record.data, record.tensors)
            elif record.action == CACHE:
                use_cache(model, CacheOptions.from_json(record.data["cache"]))
            elif record.action == ADAPT:
                _apply_adapt(model, record)
        except (AttributeError, KeyError, ValueError) as error:
            raise BadInput(f"the record of {record.path} does not fit this model: {error}") from error
        changed.append(record.path)
    return changed


def records_of(model: nn.Module) -> list[Record]:
    """Records of the adapters and packed parameters that a model has now, without tensors: adapters come first."""
    records = []
    for path, layer in lora_layers(model).items():
        data: dict[str, Any] = {"rank": layer.rank, "alpha": layer.alpha, "dropout": layer.dropout.p}
        data |= {"dtype": str(layer.lora_A.dtype).removeprefix("torch."), "transposed": _is_conv1d(layer.base)}
        records.append(Record(ADAPT, path, data))
    aliases: dict[tuple[int, str], list[str]] = {}
    for path, module in model.named_modules():
        if is_packed(module):
            held: Any = module
            for name, (owner, own_name) in held._packed_owner.items():
                aliases.setdefault((id(owner), own_name), []).append(f"{path}.{name}" if path else name)
    for path, spec in packed_specs(model).items():
        owner_path, _, name = path.rpartition(".")
        tied = aliases.get((id(model.get_submodule(owner_path)), name), [])
        records.append(Record(PACK, path, {"spec": spec.to_json(), "aliases": tied}))
    return records


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the attribute's name."""
    module_path, _, name = path.rpartition(".")
    return model.get_submodule(module_path), name


def apply_fold(model: nn.Module, record: Record) -> None:
    """What folding leaves: the layer has a bias, the norm is gone. Values come from the record, or later from the file."""
    layer: Any = model.get_submodule(record.path)
    weight, norm = layer.weight, record.data["norm"]
    if layer.bias is None:
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(torch.empty(outputs, dtype=weight.dtype, device=weight.device))
    with torch.no_grad():
        for name, value in record.tensors.items():
            getattr(layer, name).copy_(value)
    model.set_submodule(norm, nn.Identity().train(model.get_submodule(norm).training))


def apply_fold_affine(model: nn.Module, record: Record) -> None:
    """What folding a norm leaves: the layers have biases, one whose weight was tied its own, the norm is gone or bare.

    `data["layers"]` are {"path", "outputs", "own"}; tensors are named "<number>.weight" and "<number>.bias".
    """
    for number, said in enumerate(record.data["layers"]):
        layer: Any = model.get_submodule(said["path"])
        if said["own"]:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
        if layer.bias is None:
            like = layer.weight
            layer.bias = nn.Parameter(
                torch.empty(said["outputs"], dtype=like.dtype, device=like.device), requires_grad=like.requires_grad
            )
        with torch.no_grad():
            for name in ("weight", "bias"):
                if f"{number}.{name}" in record.tensors:
                    getattr(layer, name).copy_(record.tensors[f"{number}.{name}"])
    norm = model.get_submodule(record.path)
    rest: nn.Module = nn.Identity().train(norm.training)
    if record.data["becomes"] == "bare":
        split = split_affine(norm)
        if split is None:
            raise ValueError(f"a {type(norm).__name__} has no gain to fold")
        rest = split[0]
    model.set_submodule(record.path, rest)


def _apply_pack(model: nn.Module, record: Record) -> None:
    owner, name = owner_of(model, record.path)
    declare(owner, name, record.spec)
    if record.tensors:
        fill(owner, name, record.tensors)
    for alias in record.data.get("aliases", ()):
        module, alias_name = owner_of(model, alias)
        if module is not owner or alias_name != name:
            declare_alias(module, alias_name, owner, name)


def _apply_adapt(model: nn.Module, record: Record) -> None:
    data, dtype = record.data, record.data.get("dtype")
    kind = getattr(torch, dtype) if dtype is not None else None
    layer = adapt_layer_(model, record.path, data["rank"], data.get("alpha"), data.get("dropout", 0.0), kind)
    with torch.no_grad():
        for name, value in record.tensors.items():
            getattr(layer, name).copy_(value)
