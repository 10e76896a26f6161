"""Solving by training: methods that learn how each layer rounds, on what it gave as a float layer (adaquant, genie).

They go through the layers of a model in memory in the order of the forward pass; each sees the inputs that the rounded
layers before it give. What comes out is packed like everything else, and kept in the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.units import Unit
from laconic.errors import BadInput
from laconic.numerics import Int, Scale, Scheme
from laconic.quant import GenieRates, adaquant, genie_reconstruct, learned_of, learned_record

from .observe import arguments

WIDTHS = (2, 8)  # bits that can be learned
PAPER_STEPS, FASTEST = 20_000, 20.0  # of genie: steps for a layer, and how much faster than there it learns at most


def schemes_for(unit: Unit, bits: Sequence[int]) -> list[Scheme]:
    """What a layer's weight may be learned as, in order of falling size: a scale and a zero for each row."""
    found = [
        Scheme(Int(b), Scale("channel", dtype="float32"), zero="int")
        for b in sorted(bits, reverse=True)
        if WIDTHS[0] <= b <= WIDTHS[1]
    ]
    return [scheme for scheme in found if unit.stored(scheme) < unit.nbytes]


def learnable(unit: Unit) -> bool:
    """Whether a weight's rounding can be learned: that of one linear layer or convolution."""
    return unit.op in ("linear", "conv") and len(unit.names) == 1


def learn(
    method: str, model: nn.Module, teacher: nn.Module, task: Any, batches: Sequence[Any], units: Sequence[Unit],
    decision: dict[str, Scheme | None], steps: int, seed: int,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Train how units round, and say what is stored of them; the model's layers have their trained values afterwards.

    Args:
        method: "adaquant" or "genie".
        model: what comes before the units may be rounded already.
        teacher: the float model.
        task, batches: calibration data.
        units: linear layers and convolutions.
        decision: the scheme of each, one of `schemes_for`.
        steps: of Adam, for each layer.
        seed: of the rows that are drawn.

    Returns:
        unit's name -> tensors: what is packed, `loss`, and `bias` where a bias was trained.

    Raises:
        BadInput: nan or inf, or a layer that does not run; with its path.
    """
    calls = [arguments(model, task, batch) for batch in batches]
    bits = {u.name.rpartition(".")[0]: s.bits for u in units if (s := decision[u.name]) is not None}
    with torch.enable_grad():
        if method == "adaquant":
            adaquant(model, calls, bits, steps=steps, teacher=teacher, seed=seed)
        else:
            # The paper's rate goes with its 20,000 steps: fewer need larger ones to move a weight to its other neighbour.
            rate = GenieRates().rounding * max(1.0, min(FASTEST, PAPER_STEPS / steps))
            genie_reconstruct(
                model, calls, bits, steps=steps, rates=GenieRates(rounding=rate), teacher=teacher, seed=seed
            )  # fmt: skip
    found: dict[str, dict[str, Tensor]] = {}
    for path, one in list(learned_of(model)):
        layer: Any = model.get_submodule(path)
        unit = next(u for u in units if u.name == f"{path}.weight")
        if str(one.scheme) != str(decision[unit.name]):
            raise BadInput(f"{unit.name}: {method} gives {one.scheme}, and the recipe says {decision[unit.name]}")
        original = layer.parametrizations.weight.original.detach()
        record = learned_record(unit, one, original)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        found[unit.name] = {**record.tensors, "loss": torch.tensor(record.data["loss"], dtype=torch.float64)}
        if method == "adaquant" and isinstance(layer.bias, Tensor):
            found[unit.name]["bias"] = layer.bias.detach().clone()
    return found
