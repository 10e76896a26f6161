"""Which unit gets how many bits: sensitivity on calibration data, then an integer program.

The cost of storing unit W as W^ is the second-order change of the output, with independent rounding errors:

    cost = sum_w F_w (w - w^)^2,        F_w = E_v [ (d (v . f) / d w)^2 ]

where f is the output on calibration data and v random with the covariance that matters: signs on a plain output (the
expected squared change of f), and, for logits, the gradient of the cross-entropy of a label sampled from the model itself
(the expected KL divergence to the float model: the Fisher information). One backward pass a batch gives F of every
weight; an option then costs one rounding and no forward. Where the model does not fit in memory, F of a linear layer is the
mean square of the weight's input column over the mean square of the layer's outputs: relative output error, layer by layer.
Without data F_w = 1 / mean(w^2): relative weight error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.allocate import allocate
from laconic.core.units import Unit, schemes_for
from laconic.nn import matrix_view
from laconic.numerics import ScaleOutOfRange, Scheme, affine_params, dequantize, quantize

from . import learned
from .recipe import LEARNED, Quantize

Progress = Callable[[int, int], None]
SAMPLE = 1 << 20  # elements of a unit whose rounding error is measured; larger units are sampled by whole rows
# Sensitivities are estimates, good to some percent: closer to the optimum of their sum than this buys nothing, and a
# network of many alike layers would hold the search for minutes.
GAP, NODES = 1e-3, 1000


def offered(step: Quantize) -> Callable[[Unit, Sequence[int]], list[Scheme]] | None:
    """What a quantize pass lets a unit be stored as, in order of falling size; None: `units.schemes_for` says."""
    if step.schemes is not None:
        schemes = [Scheme.parse(text) for text in step.schemes]
        return lambda unit, bits: sorted(
            (s for s in schemes if unit.stored(s) < unit.nbytes), key=unit.stored, reverse=True
        )
    if step.method in LEARNED:
        return lambda unit, bits: (
            learned.schemes_for(unit, bits) if learned.learnable(unit) else schemes_for(unit, bits)
        )
    return None


def fisher(
    model: nn.Module,
    task: Any,
    batches: Sequence[Any],
    units: Sequence[Unit],
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """F of every unit that can be packed, float32 in the parameter's shape."""
    wanted = {u.name: model.get_parameter(u.name) for u in units if u.options}
    total = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in wanted.items()}
    generator = torch.Generator().manual_seed(seed)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for p in wanted.values():
        p.requires_grad_(True)
    try:
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                scalar = _probe(task.forward(model, batch), task, generator)
                grads = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
            for name, grad in zip(wanted, grads, strict=True):
                if grad is not None:
                    total[name].addcmul_(grad.float(), grad.float())
            if progress:
                progress(number + 1, len(batches))
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
    return total


def _probe(output: Tensor, task: Any, generator: torch.Generator) -> Tensor:
    """A random scalar of the output whose squared gradient has the expectation that matters."""
    output = output.float()
    if task.metric.name in ("perplexity", "accuracy") and output.dim() >= 2:
        logits = output.reshape(-1, output.shape[-1])
        # Drawn on the CPU, where the generator lives: the same labels on every device.
        chances = torch.softmax(logits.detach(), -1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(logits.device)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output.dtype).mul_(2).sub_(1)
    return (output * signs.to(output.device)).sum()


def option_costs(
    read: Callable[[Unit], Tensor],
    weights: dict[str, Tensor] | None,
    units: Sequence[Unit],
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Cost of every option of every unit (same order as `unit.options`).

    An option whose scales do not fit in their type is replaced, in place, by one with float32 scales.

    Args:
        read: a unit's parameter, or some rows of it.
        weights: F of units: in the parameter's shape, or (K,) mean squares of input columns. Where a unit has none, and
            without it, relative weight error counts.
        units: those that can be packed are judged.
        progress: is called with (done, total).
    """
    costs: dict[str, list[float]] = {}
    packable = [u for u in units if u.options]
    for number, unit in enumerate(packable):
        matrix = matrix_view(read(unit).detach(), unit.view)
        step = max(1, matrix.numel() // SAMPLE)
        x = matrix[::step].float()
        f = weights.get(unit.name) if weights is not None else None
        if f is None:
            f = torch.ones(1, device=x.device) / (float(x.square().mean()) or 1.0)
        elif f.dim() == 1 and f.numel() == x.shape[1]:
            f = f.to(x.device) / (float((x.square() @ f.to(x.device)).mean()) / f.numel() or 1.0)
        else:
            f = matrix_view(f, unit.view)[::step]
        found = []
        for i, scheme in enumerate(unit.options):
            try:
                scale, zero = affine_params(x, scheme, unit.name)
            except ScaleOutOfRange:
                scheme = unit.options[i] = scheme.with_(dtype="float32")
                scale, zero = affine_params(x, scheme, unit.name)
            error = dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme).sub_(x).square_()
            found.append(float((error * f).sum()) * unit.numel / max(1, x.numel()))
        costs[unit.name] = found
        if progress:
            progress(number + 1, len(packable))
    return costs


def choose(units: Sequence[Unit], costs: dict[str, list[float]], budget: int) -> dict[str, Scheme | None]:
    """The schemes of least total cost whose bytes fit in `budget` (tensor bytes of all units, headers included).

    Raises:
        Impossible: they cannot fit.
    """
    packable = [u for u in units if u.options]
    if not packable:
        return {}
    cost = [[0.0, *costs[u.name]] for u in packable]  # the first option is to leave it as it is
    size = [[u.nbytes, *(u.stored(s) for s in u.options)] for u in packable]
    picked = allocate(cost, size, budget, gap=GAP, node_limit=NODES)
    return {u.name: (None, *u.options)[i] for u, i in zip(packable, picked, strict=True)}
