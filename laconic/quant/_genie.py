"""`genie`: learns which way each weight rounds together with its scale, on data that the model itself remembers.

Genie-M. For a weight w with a row's scale s0 and zero point z, both from a search over shrunken ranges, once:

    B = floor(w / s0)                      never changes again
    h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1),     h(V0) = w / s0 - B
    w^ = s (clamp(B + h(V) + z, 0, 2^b - 1) - z)  soft, in training;   h -> 1[V >= 0] hard, afterwards

Both s (from s0 on) and V are trained. B does not move with s, so that the two do not fight; with s fixed this is AdaRound.
Inputs are rounded by a scale that is learned too, as LSQ's, and while it trains each element is rounded at random only
(QDrop):

    x^ = where(u < drop, x, s clamp(round(x / s), qmin, qmax))

Unit by unit, a layer or a block, on inputs that are an element-wise mixture of float and rounded activations:

    min  mean over N, H, W of sum over C of (f^ - f)^2  +  lambda sum (1 - |2 h(V) - 1|^beta)

beta stays at 20 for a fifth of the steps, during which the second term is left out, and then falls to 2.

Genie-D makes the data: latents and a small generator, trained so that the statistics of the batch at every batch norm are
those that the norm remembers (`laconic.core.synthesis`); strided convolutions swing while it does.

Source: "Genie: Show Me the Data for Quantization", Jeon, Kim, Kim, 2022, arXiv 2212.04780. Official code:
SamsungLabs/Genie, Apache-2.0. AdaRound: arXiv 2004.10568. QDrop: arXiv 2203.05740. We differ from the code: learning rates
of latents (0.1) and generator (0.01) are named for what they drive; a unit ends with the best of what its training saw on
all inputs, rounded hard.

What is stored are weights packed by channel; nothing else is left of V. Use it at 4 bits and below, most of all without
data. `adaquant` is faster, `gptq` for large linear layers.

Example:
    >>> import torch
    >>> weight = torch.tensor([[0.04, 0.26, -0.5, 1.0]])
    >>> rounding = AdaRound(weight, bits=2).eval()
    >>> rounding(weight).unique().numel() <= 4
    True
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.fake_quant import code_range, lsq
from laconic.core.reconstruct import Group, Twins, linear_decay, output_loss, reconstruct
from laconic.core.statistics import widened
from laconic.core.synthesis import Generator, Synthesized, matched_inputs
from laconic.errors import BadInput
from laconic.nn import matrix_view
from laconic.nn.packed import View
from laconic.numerics import Int, Scale, Scheme, check_finite

from ._learned import LearnedWeight, Trainings, attach_input_quantizer, chosen_layers, row_dim
from ._rtn import Solved

ZETA, GAMMA = 1.1, -0.1
NORM, GRID = 2.4, 100


# --- mathematics ------------------------------------------------------------------------------------


def rectified_sigmoid(V: Tensor, zeta: float = ZETA, gamma: float = GAMMA) -> Tensor:
    """h(V) = clamp((zeta - gamma) sigmoid(V) + gamma, 0, 1)."""
    return ((zeta - gamma) * V.sigmoid() + gamma).clamp(0, 1)


def inverse_sigmoid(h: Tensor, zeta: float = ZETA, gamma: float = GAMMA) -> Tensor:
    """The V of h(V) = h, for h in [0, 1]."""
    return -((zeta - gamma) / (h - gamma) - 1).log()


def rounding_penalty(V: Tensor, beta: float, zeta: float = ZETA, gamma: float = GAMMA) -> Tensor:
    """Sum of 1 - |2 h(V) - 1|^beta: 0 where every h is 0 or 1."""
    return (1 - (2 * rectified_sigmoid(V, zeta, gamma) - 1).abs().pow(beta)).sum()


def searched_range(
    x: Tensor,
    bits: int,
    *,
    dims: Sequence[int] = (),
    symmetric: bool = False,
    norm: float = NORM,
    grid: int = GRID,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the shrunken range p [low, high], p = 1, 1 - 1/grid, ..., with least |x^ - x|^norm.

    The zero point is computed anew for each. Where two are equally good the wider range is taken.

    Args:
        x: floating.
        bits: b.
        dims: the axes that share a scale, kept with size 1; all by default.
        symmetric: the range is [-high, high] with high the largest magnitude.
        norm: of the error.
        grid: how many ranges are tried.
        reduction: "mean" or "sum" of errors, which choose the same.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"searched_range: reduction is {reduction!r}: mean or sum")
    axes = tuple(d % x.ndim for d in dims) or tuple(range(x.ndim))
    wide = widened(x.detach())
    low, high = wide.amin(axes, keepdim=True).clamp(max=0), wide.amax(axes, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    top = (1 << bits) - 1
    flat = high == low
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for i in range(grid):
        p = 1 - i / grid
        s = torch.where(flat, torch.ones_like(low), p * (high - low) / top)
        z = (-p * low / s).round()
        error = (s * (((wide / s).round() + z).clamp(0, top) - z) - wide).abs().pow(norm)
        error = error.mean(axes, keepdim=True) if reduction == "mean" else error.sum(axes, keepdim=True)
        better = error < best
        best, scale, zero = (torch.where(better, new, old) for new, old in ((error, best), (s, scale), (z, zero)))
    return scale, zero


# --- quantizers -------------------------------------------------------------------------------------


class AdaRound(LearnedWeight):
    """A weight whose roundings, and scales, are learned: soft in training mode, hard in evaluation mode.

    Args:
        weight: before rounding.
        bits: 2 to 8.
        learn_scale: Genie-M; without it AdaRound.
        dim: the axis of the outputs, each of which has a scale; None for one scale in all.
        zeta, gamma: ends of the stretched sigmoid.
        norm, grid, reduction: of the search for the first scale, see `searched_range`.

    Attributes:
        scale: s, a parameter where it is learned.
        logit: V.
        zero, base: z and B, which stay.

    Raises:
        BadInput: another width.
    """

    base: Tensor
    zero: Tensor

    def __init__(
        self, weight: Tensor, bits: int, *, learn_scale: bool = True, dim: int | None = 0, zeta: float = ZETA,
        gamma: float = GAMMA, norm: float = NORM, grid: int = GRID, reduction: str = "mean",
    ):  # fmt: skip
        super().__init__()
        if not 2 <= bits <= 8:
            raise BadInput(f"AdaRound: bits={bits}: 2 to 8")
        self.bits, self.zeta, self.gamma, self.learn_scale = bits, zeta, gamma, learn_scale
        self.scheme = Scheme(Int(bits), Scale("channel", dtype="float32"), zero="int")
        axes = tuple(a for a in range(weight.ndim) if dim is None or a != dim % weight.ndim)
        scale, zero = searched_range(weight, bits, dims=axes, norm=norm, grid=grid, reduction=reduction)
        v = widened(weight.detach()) / scale
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=learn_scale)
        self.register_buffer("zero", zero.to(weight.dtype))
        self.register_buffer("base", v.floor().to(weight.dtype))
        self.logit = nn.Parameter(inverse_sigmoid(v - v.floor(), zeta, gamma).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """w^; of the weight only the type and the shape are used, since B and V hold its values."""
        up = rectified_sigmoid(widened(self.logit), self.zeta, self.gamma) if self.training else self.up()
        zero = widened(self.zero)
        codes = (widened(self.base) + up + zero).clamp(0, (1 << self.bits) - 1)
        rounded = widened(self.scale) * (codes - zero)
        # The weight itself has no part in it, but keeps a gradient (of 0), so that whatever trains it finds one.
        return rounded.to(weight.dtype) + 0 * weight

    def up(self) -> Tensor:
        """1[V >= 0]: which weights are rounded up."""
        return (widened(self.logit) >= 0).to(widened(self.scale).dtype)

    def penalty(self, beta: float) -> Tensor:
        """See `rounding_penalty`."""
        return rounding_penalty(self.logit, beta, self.zeta, self.gamma)

    @torch.no_grad()
    def solved(self, weight: Tensor, view: View) -> Solved:
        """Hard codes; scales (rows, 1) float32, zeros (rows, 1) uint8."""
        top = (1 << self.bits) - 1
        scale, zero = widened(self.scale), widened(self.zero)
        codes = (widened(self.base) + self.up() + zero).clamp(0, top)
        loss = float((scale * (codes - zero) - widened(weight)).square().sum(dtype=torch.float64))
        rows = codes.shape[1 if view == "transposed" else 0]
        return Solved(
            matrix_view(codes, view).to(torch.uint8).contiguous(),
            scale.float().view(-1, 1).expand(rows, 1).contiguous(),
            zero.to(torch.uint8).view(-1, 1).expand(rows, 1).contiguous(),
            loss,
        )

    def extra_repr(self) -> str:
        return f"bits={self.bits}, learn_scale={self.learn_scale}"


class InputQuantizer(nn.Module):
    """Inputs rounded by one learned scale, signed where there are negative ones; in training mode some are dropped.

    Args:
        x: inputs that the first scale and the sign come from.
        bits: 2 to 8.
        signed: codes have a sign; by default where x has.
        drop: the probability of an element to stay as it is, in training mode.
        grad_scale: what the scale's gradient is multiplied by (LSQ has 1 / sqrt(n qmax), Genie 1).

    Raises:
        BadInput: another width, or nothing to take a scale from.
    """

    def __init__(
        self, x: Tensor, bits: int, *, signed: bool | None = None, drop: float = 0.5, grad_scale: float | None = 1.0
    ):
        super().__init__()
        if not 2 <= bits <= 8 or not x.numel():
            raise BadInput(f"InputQuantizer: bits={bits} and inputs of shape {tuple(x.shape)}: 2 to 8 bits, of inputs")
        self.signed = bool((x < 0).any()) if signed is None else signed
        self.bits, self.drop, self.grad_scale = bits, drop, grad_scale
        scale, _ = searched_range(x if self.signed else x.clamp(min=0), bits, symmetric=self.signed)
        self.scale = nn.Parameter(scale.reshape([1] * x.ndim).to(x.dtype))
        self.qmin, self.qmax = code_range(bits, signed=self.signed)

    def forward(self, x: Tensor) -> Tensor:
        rounded = lsq(x, self.scale.view(()), self.qmin, self.qmax, self.grad_scale)
        if self.training and self.drop > 0:
            return torch.where(torch.rand(x.shape, device=x.device) < self.drop, x, rounded)
        return rounded

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, drop={self.drop}"


# --- reconstruction ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenieRates:
    """Learning rates of Adam: V (constant), scales of weights and of inputs (falling to 0 as a cosine)."""

    rounding: float = 1e-3
    weight_scale: float = 1e-4
    input_scale: float = 4e-5


def genie_reconstruct(
    model: nn.Module,
    batches: Sequence[Any],
    bits: int | Mapping[str, int] = 4,
    *,
    input_bits: int | Mapping[str, int] | None = None,
    units: Sequence[str] | None = None,
    steps: int = 20_000,
    batch: int = 32,
    learn_scale: bool = True,
    rounding_weight: float = 1.0,
    mix: float = 0.5,
    drop: float = 0.5,
    warmup: float = 0.2,
    beta: tuple[float, float] = (20.0, 2.0),
    rates: GenieRates = GenieRates(),
    summed_dim: int | None = None,
    teacher: nn.Module | None = None,
    seed: int = 0,
) -> Trainings:
    """Round the layers of a model and train how, unit by unit, in place.

    Batch norms outside of units must have been folded before. Weights stay parametrized; `pack_learned` packs them.

    Args:
        model: in evaluation mode, with float weights.
        batches: data, real or made by the model, each what `laconic.core.calls.call` takes.
        bits: of weights, or path of a layer -> bits; layers that are not named then stay float. (The paper keeps the first
            and the last layer at 8.)
        input_bits: of their inputs, likewise; None leaves inputs as they are.
        units: paths of blocks that are trained as one; every layer by itself by default. Layers outside stay float.
        steps, batch: of each unit.
        learn_scale: Genie-M; without it AdaRound.
        rounding_weight: lambda.
        mix: the part of a unit's inputs that are the float model's.
        drop: of `InputQuantizer`.
        warmup, beta: see `laconic.core.reconstruct.linear_decay`.
        rates: see `GenieRates`.
        summed_dim: the axis of the channels in the loss; 1 of pictures, the last of all else by default.
        teacher: the float model; a copy of `model` by default.
        seed: of all that is drawn.

    Returns:
        Unit -> its training.

    Raises:
        BadInput: no data, a path that there is not, a tied weight that is named, a unit without layers, or NaN.
    """
    chosen, skipped = chosen_layers(model, bits, "genie")
    inside = {unit: _inside(chosen, unit) for unit in (chosen if units is None else units)}
    empty = [unit for unit, held in inside.items() if not held]
    if empty or not inside:
        raise BadInput(f"genie: {empty[0] if empty else type(model).__name__} has no layer that is to be rounded")
    teacher = copy.deepcopy(model) if teacher is None else teacher
    twins, done = Twins(teacher, model, batches), Trainings(skipped)
    for calls in twins.walk(list(inside), inputs="both" if mix > 0 else "student"):
        unit = calls.path
        block = model.get_submodule(unit)
        quantizers: list[AdaRound] = []
        scales: list[Tensor] = []
        learned: list[nn.Module] = []
        if input_bits is not None:
            first = _layer_inputs(
                block, calls.inputs[0], calls.rest[0], [p[len(unit) :].lstrip(".") for p in inside[unit]]
            )
        for path in inside[unit]:
            layer: Any = model.get_submodule(path)
            check_finite(layer.weight.detach(), f"{path}.weight")
            one = AdaRound(layer.weight, chosen[path], learn_scale=learn_scale, dim=row_dim(layer))
            parametrize.register_parametrization(layer, "weight", one.eval())
            quantizers.append(one)
            width = input_bits.get(path) if isinstance(input_bits, Mapping) else input_bits
            if width is not None:
                of_input = InputQuantizer(first[path[len(unit) :].lstrip(".")], width, drop=drop).eval()
                attach_input_quantizer(layer, of_input)
                scales.append(of_input.scale)
                learned.append(of_input)
        groups = [Group([q.logit for q in quantizers], rates.rounding)]
        if learn_scale:
            groups.append(Group([q.scale for q in quantizers], rates.weight_scale, "cosine"))
        if scales:
            groups.append(Group(scales, rates.input_scale, "cosine"))
        dim = summed_dim if summed_dim is not None else (1 if calls.targets[0].ndim == 4 else -1)

        def loss(output: Tensor, target: Tensor, dim: int = dim) -> Tensor:
            return output_loss(output, target, summed_dim=dim)

        def penalty(step: int, of: list[AdaRound] = quantizers) -> Tensor | None:
            if step < warmup * steps:
                return None
            b = linear_decay(step, steps, warmup=warmup, start=beta[0], end=beta[1])
            return rounding_weight * torch.stack([q.penalty(b) for q in of]).sum()

        done[unit] = reconstruct(
            block, calls, groups, steps=steps, batch=batch, loss=loss, penalty=penalty, mix=mix,
            learned=[*quantizers, *learned], seed=seed,
        )  # fmt: skip
    return done


def _inside(layers: Mapping[str, int], unit: str) -> list[str]:
    return [path for path in layers if path == unit or not unit or path.startswith(f"{unit}.")]


@torch.no_grad()
def _layer_inputs(block: nn.Module, x: Tensor, rest: tuple[tuple, dict], paths: Sequence[str]) -> dict[str, Tensor]:
    """What the layers of a float block read."""
    found: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: found.__setitem__(path, args[0]))
        for path in paths
    ]
    try:
        block(x, *rest[0], **rest[1])
    finally:
        for handle in handles:
            handle.remove()
    return found


# --- data -------------------------------------------------------------------------------------------


def distilled_images(
    model: nn.Module,
    shape: Sequence[int],
    n: int = 1024,
    *,
    batch: int = 128,
    steps: int = 4000,
    lr_latent: float = 0.1,
    lr_generator: float = 0.01,
    latent: int = 256,
    width: int = 128,
    swing: bool = True,
    include_input: bool = True,
    seed: int = 0,
) -> Synthesized:
    """Genie-D: pictures (n, C, H, W) that a model's batch norms would take for its training data.

    Args:
        model: in evaluation mode, with batch norms; it is not changed.
        shape: (C, H, W), sides that 4 divides.
        n: pictures.
        batch: pictures that share a fresh generator.
        steps: of training for each batch.
        lr_latent, lr_generator, latent, width: see `laconic.core.synthesis.Generator`.
        swing: see `laconic.core.synthesis.swinging`.
        include_input: pictures shall have mean 0 and deviation 1, each by itself.
        seed: of all that is drawn.

    Raises:
        BadInput: the model has no batch norms, or sides that 4 does not divide.
    """
    parts = []
    for number in range(math.ceil(n / batch)):
        count = min(batch, n - number * batch)
        parts.append(
            matched_inputs(
                model,
                lambda count=count: Generator(
                    (count, *shape), latent=latent, width=width, lr_latent=lr_latent, lr_generator=lr_generator
                ),
                steps=steps, per="batch", include_input=include_input, swing=swing, seed=seed + number,
            )
        )  # fmt: skip
    return Synthesized(torch.cat([part.inputs for part in parts]), [loss for part in parts for loss in part.losses])


CARD = Card(
    id="genie",
    title="Genie: Show Me the Data for Quantization",
    authors="Jeon, Kim, Kim",
    year=2022,
    source="arXiv 2212.04780",
    family="quant",
    summary="Learns which way each weight rounds together with its scale, on data that the model itself remembers.",
    objects={"AdaRound": "Weight"},
    traits={"AdaRound": ("gradient:surrogate",)},
    use="Convolutional networks at 4 bits and below, most of all where there are no data.",
    avoid="Where seconds count: adaquant trains less, gptq nothing.",
    composes=("fold_batchnorm", "zeroq"),
    vectors=("genie",),
    code="SamsungLabs/Genie, Apache-2.0",
    claim={
        "text": "At 2-bit weights and 4-bit inputs, on pictures made by the model itself, learning scales and roundings "
        "together keeps more of a small convolutional network's accuracy than rounding to nearest.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.05,
        "arms": ("rtn", "genie"),
        "seeds": 5,
        "minutes": 2,
        "task": "mnist-cnn",
    },
)
