"""Adapters of PEFT over packed layers: what its merging has to be told. Importing this module tells it.

    model = peft.get_peft_model(laconic.load("out"), peft.LoraConfig(target_modules="all-linear"))    # and train
    float_model = model.merge_and_unload()

A packed layer is an `nn.Linear` to peft, so its adapters go around one as they are, and the packed bytes never change.
Merging is another matter: peft writes W + B A into `layer.weight`, and the weight of a packed layer is a value made for
whoever asks, so that the sum would be lost without a word. Before peft merges, packed layers that have an adapter therefore
become float ones of the same values. Layers that are tied to them go along, and `config.json` no longer calls them packed.

`laconic._hooks` imports this module as soon as peft is there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from laconic.core.record import FOLD, FOLD_AFFINE, PACK, RENORM
from laconic.errors import BadInput
from laconic.nn import is_packed, make_float
from laconic.nn.packed import Packed
from laconic.nn.rotated import RestoreOutput, rotated_inputs

__all__ = ["prepare_merge"]

_WRAPPED = ".base_layer"  # what peft puts into the path of a layer that it has wrapped


def prepare_merge(model: nn.Module) -> list[str]:
    """Make packed layers that have an adapter of peft float, in place, and those that are tied to them.

    Args:
        model: in which peft has put its layers.

    Returns:
        Paths of the modules that were packed, as they were before peft came.

    Raises:
        BadInput: one rotates its inputs or outputs, so its weight is not what the adapter was trained beside.
    """
    bases = [
        layer for module in model.modules() if isinstance(module, BaseTunerLayer)
        for layer in module.get_base_layer().modules() if is_packed(layer)
    ]  # fmt: skip
    if not bases:
        return []
    group = _tied(model, bases)
    paths = {module: path.replace(_WRAPPED, "") for path, module in model.named_modules() if module in group}
    for module, path in paths.items():
        if rotated_inputs(module) or any(isinstance(h, RestoreOutput) for h in module._forward_hooks.values()):
            raise BadInput(
                f"{path} rotates its inputs or outputs, so an adapter cannot be merged into its weight: keep the adapter in "
                "a folder of its own (save_pretrained)"
            )
    make_float(group)
    _forget_packing(model, set(paths.values()))
    return list(paths.values())


def _tied(model: nn.Module, bases: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules, and every packed one that shares a parameter with one of them; tied embeddings, too."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    owners = {module: {id(module), *(id(owner) for owner, _ in module._packed_owner.values())} for module in packed}
    wanted = {id(base) for base in bases}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        # peft compares the addresses of both weights afterwards; values made on access are never in one place.
        wanted |= {id(module) for module in packed if module._packed_owner}
    while more := set().union(*(ids for ids in owners.values() if ids & wanted)) - wanted:
        wanted |= more
    return [module for module in packed if id(module) in wanted]


def _forget_packing(model: Any, paths: set[str]) -> None:
    """Take the modules out of what transformers would write into config.json; without any left, the model is a float one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is None or not hasattr(config, "records"):
        return
    kept = [r for r in config.records if r["action"] != PACK or r["path"].rpartition(".")[0] not in paths]
    if not any(record["action"] in (PACK, FOLD, FOLD_AFFINE, RENORM) for record in kept):
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method
        return
    config.records = kept
    groups = getattr(config, "config_groups", None) or {}
    for name, group in list(groups.items()):
        group["targets"] = [path for path in group["targets"] if path not in paths]
        if not group["targets"]:
            del groups[name]
    config.ignore = sorted({*getattr(config, "ignore", ()), *paths})


_allowed = BaseTuner._check_merge_allowed


@functools.wraps(_allowed)
def _check_merge_allowed(self: BaseTuner) -> None:
    _allowed(self)
    prepare_merge(self.model)


# peft asks this of every kind of adapter before it merges, and has no other place to register at.
BaseTuner._check_merge_allowed = _check_merge_allowed
