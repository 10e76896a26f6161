"""What the methods share that learn how weights round: layers, their parametrizations, and how these become packed.

A `LearnedWeight` is a parametrization of a weight: float weights in, rounded weights out, with gradients for what it
learns. When it is done, `solved` gives codes, scales and zero points, and `pack_learned` stores these: the layer then
computes from the packed form, and nothing of the parametrization is left.

An input quantizer is a module of a layer, called `input_quantizer`, which its inputs pass first. It is for models whose
activations are rounded too; a packed layer keeps it, and rounds its inputs in floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.qat import attach_input_quantizer
from laconic.core.reconstruct import Reconstructed
from laconic.core.record import Record, apply_records
from laconic.core.structure import Structure
from laconic.core.units import Unit, find_units
from laconic.errors import BadInput
from laconic.nn import matrix_view, pack_tensors
from laconic.nn.packed import View, _is_conv1d, op_of
from laconic.numerics import Scheme, check_finite

from ._rtn import Solved

__all__ = [
    "LearnedWeight", "Trainings", "attach_input_quantizer", "chosen_layers", "followed_by_relu", "layers_of", "learned_of",
    "learned_record", "pack_learned", "refusal_of", "row_dim",
]  # fmt: skip


class Trainings(dict[str, Reconstructed]):
    """Path of a layer or block -> its training.

    Attributes:
        skipped: path of a layer that was to be rounded -> why it was left alone.
    """

    def __init__(self, skipped: Mapping[str, str]):
        super().__init__()
        self.skipped = dict(skipped)


class LearnedWeight(nn.Module):
    """A parametrization that learns how its weight is rounded.

    Attributes:
        scheme: how the rounded weight is stored.
    """

    scheme: Scheme

    def solved(self, weight: Tensor, view: View) -> Solved:
        """Codes, scales and zero points of a weight that this rounds; `loss` is ||W - W^||^2.

        Args:
            weight: before rounding.
            view: how it becomes a matrix with a row for each output.
        """
        raise NotImplementedError


def row_dim(module: nn.Module) -> int:
    """The axis of a layer's outputs in its weight: 1 for the Conv1D of transformers, else 0."""
    return int(_is_conv1d(module))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every linear layer and convolution whose weight can be learned to round."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and op_of(module, "weight") in ("linear", "conv")
        and not hasattr(module, "_packed")
    }


def chosen_layers(
    model: nn.Module, bits: int | Mapping[str, int], method: str
) -> tuple[dict[str, int], dict[str, str]]:
    """Path of a layer -> its bits, and path -> why it is left alone, for one width for all or a width for each.

    Raises:
        BadInput: a path that is no layer with float weights, a tied weight that is named, or no layer is left.
    """
    layers = layers_of(model)
    chosen = dict.fromkeys(layers, bits) if isinstance(bits, int) else dict(bits)
    strange = [path for path in chosen if path not in layers]
    if strange:
        raise BadInput(f"{method}: {strange[0]!r} is no linear layer or convolution with float weights")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    skipped = {}
    for path in chosen:
        names = owners.get(id(layers[path].weight), [])
        if not names:
            skipped[path] = "a parametrization computes its weight"
        elif len(names) > 1:
            skipped[path] = f"its weight is tied: {' = '.join(names)}"
    if skipped and not isinstance(bits, int):
        path, why = next(iter(skipped.items()))
        raise BadInput(f"{path}: {why}, so {method} cannot round it by itself")
    if len(skipped) == len(chosen):
        raise BadInput(f"{method}: {type(model).__name__} has no layer that can be rounded by itself: {skipped}")
    return {path: width for path, width in chosen.items() if path not in skipped}, skipped


def refusal_of(unit: Unit | None, structure: Structure) -> str:
    """Why the weight of a layer cannot be reconstructed; "" if it can."""
    if unit is None:
        return "a parametrization computes its weight, or it is packed already"
    if unit.protected:
        return unit.reason
    if len(unit.names) > 1:
        return f"its weight is tied: {' = '.join(unit.names)}"
    if unit.op not in ("linear", "conv"):
        return "another module reads its weight by itself"
    if unit.calls != 1:
        return f"it runs {unit.calls} times in a forward pass"
    return ""


def learned_of(model: nn.Module) -> Iterator[tuple[str, LearnedWeight]]:
    """(path of the layer, parametrization) of all weights that learn how to round."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for one in module.parametrizations.weight:  # type: ignore[union-attr]
                if isinstance(one, LearnedWeight):
                    yield path, one


def followed_by_relu(model: nn.Module, run: Any, paths: Sequence[str]) -> set[str]:
    """The layers whose output a ReLU module alone turns into what comes next, as one forward shows it.

    A ReLU that is called as a function is not seen.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: set[str] = set()
    wanted = set(paths)

    def before(module: nn.Module, args: tuple) -> None:
        if isinstance(module, (nn.ReLU, nn.ReLU6)) and args and id(args[0]) in made:
            found.add(made[id(args[0])][0])

    def after(path: str, output: Any) -> None:
        if path in wanted and isinstance(output, Tensor):
            made[id(output)] = (path, output)  # held, so that its id stays its own

    handles = [m.register_forward_pre_hook(before) for m in model.modules()]
    handles += [
        m.register_forward_hook(lambda m, a, out, path=path: after(path, out)) for path, m in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def pack_learned(model: nn.Module, structure: Structure) -> list[Record]:
    """Pack every weight that learned how to round, in place; its layer computes from the packed form afterwards.

    Args:
        model: with parametrizations of `LearnedWeight`.
        structure: of the model before these were registered.

    Returns:
        The records, one for each weight.

    Raises:
        BadInput: there is nothing to pack.
    """
    found = list(learned_of(model))
    if not found:
        raise BadInput(f"{type(model).__name__} has no weights that learned how to round")
    solved: dict[str, tuple[LearnedWeight, Tensor]] = {}
    for path, one in found:
        layer: Any = model.get_submodule(path)
        original = layer.parametrizations.weight.original.detach()
        solved[f"{path}.weight" if path else "weight"] = (one, original)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    units = {unit.name: unit for unit in find_units(model, structure)}
    records = []
    for name, (one, original) in solved.items():
        records.append(learned_record(units[structure.name_of(name)], one, original))
        apply_records(model, records[-1:])
    return records


@torch.no_grad()
def learned_record(unit: Unit, one: LearnedWeight, original: Tensor, **said: Any) -> Record:
    """What packing a weight is that learned how to round: `loss` is the share of its energy that is error."""
    check_finite(original, unit.name)
    done = one.solved(original, unit.view)
    power = float(matrix_view(original, unit.view).float().square().sum(dtype=torch.float64)) or 1.0
    tensors = pack_tensors(unit.spec(one.scheme), done.codes, done.scale, done.zero)
    return unit.record(one.scheme, tensors, loss=done.loss / power, **said)


CARD = None  # methods share this; it is none itself
