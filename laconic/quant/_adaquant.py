"""`adaquant`: trains each layer's weights, bias and ranges on its own output, picks bits by an integer program, tunes norms.

Per layer, with float inputs X and the activation after it (ReLU, or none):

    min over W', b, ranges of  mean |act(X W^T + b0) - act(Q(X) Q(W')^T + b)|^2

    Q(x; r, m):  s = clamp(r, 1e-6, 1e5) / (2^b - 1),   Z = clamp(round(-m / s), 0, 2^b - 1)
                 x^ = s (round(clamp((x + s Z) / s, 0, 2^b - 1)) - Z)

r is the width of the range and m its low end, both learned: one pair for each row of W (out, in, ...), one for the input.
Gradients pass through both roundings as if they were not there. At the start a row's range is that of its weights, the
input's the mean over examples of their own ranges, 0 included in each. "parallel" gives every layer the float inputs, so
that layers do not depend on each other; "sequential" gives it those of the layers already rounded.

Three steps follow, each by itself:

- bits, by an integer program: for layer l at k bits, all others at the base width, D_lk = max(loss - loss_base, 1e-6),

      min sum_l D_l,k(l)   subject to   sum_l P_l k(l)^p <= P (32 R)^p      R of the float size, P = sum P_l

- `bn_tune`: the batch norm that was folded into a layer comes back with its gain and shift, its statistics are taken
  anew from calibration data through the rounded model, and it is folded again, ranges included. A negative gain turns a
  range around: its ends change places.
- `bias_tune`: all biases at once, by KL divergence from the float model's outputs.

Source: "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", Hubara, Nahshan,
Hanani, Banner, Soudry, 2020, arXiv 2006.10518. Official code: itayhubara/CalibTIP, MIT. We differ from it: negative gains
are handled; a layer ends with the best of what its training saw on all calibration inputs; the program is solved by
`laconic.core.allocate`.

What is stored are weights packed by channel with integer zero points; nothing else is left of the training. Inputs are
rounded in floats where asked for. Use it for convolutional networks with a few hundred calibration examples; `gptq` is
faster for large linear layers at 4 bits.

Example:
    >>> import torch
    >>> x = torch.tensor([[-1.0, 0.1, 0.5, 2.0]])
    >>> range_quantize(x, torch.tensor([3.0]), torch.tensor([-1.0]), bits=2)
    tensor([[-1.,  0.,  1.,  2.]])
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from laconic.core.affine import affine_of, after_layer
from laconic.core.allocate import allocate
from laconic.core.calls import call, first_output
from laconic.core.card import Card
from laconic.core.fake_quant import pass_through
from laconic.core.passes import Context, Decision
from laconic.core.reconstruct import Calls, Group, Reconstructed, Twins, output_loss, reconstruct
from laconic.core.record import Record, apply_records, owner_of
from laconic.core.statistics import widened
from laconic.core.structure import Structure
from laconic.core.units import find_units
from laconic.errors import BadInput, Impossible
from laconic.nn import matrix_view
from laconic.nn.packed import View
from laconic.numerics import Int, Scale, Scheme, check_finite

from ._learned import (
    LearnedWeight,
    Trainings,
    attach_input_quantizer,
    chosen_layers,
    followed_by_relu,
    learned_of,
    learned_record,
    refusal_of,
    row_dim,
)
from ._rtn import Solved

Mode = Literal["parallel", "sequential"]
SCALE_CLAMP = (1e-6, 1e5)
LEAST = 1e-6  # of a degradation: a layer that gained by noise shall not count as better than free


# --- mathematics ------------------------------------------------------------------------------------


def range_quantize(
    x: Tensor,
    span: Tensor,
    low: Tensor,
    bits: int,
    *,
    scale_clamp: tuple[float, float] = SCALE_CLAMP,
    round_ste: bool = True,
    zero_round_ste: bool = True,
) -> Tensor:
    """x^ of the shape and type of x, with gradients for x, the range's width and its low end.

    Args:
        x: of any shape.
        span: r, broadcasts against x.
        low: m, likewise.
        bits: b.
        scale_clamp: bounds of r.
        round_ste: let gradients pass the rounding of values; without it x^ has none from there.
        zero_round_ste: likewise for the rounding of Z.
    """
    wide = widened(x)
    scale, zero, top = _scale_and_zero(span, low, bits, scale_clamp, zero_round_ste)
    v = ((wide + scale * zero) / scale).clamp(0, top)
    q = pass_through(v, v.round()) if round_ste else v.round()
    return (scale * (q - zero)).to(x.dtype)


def _scale_and_zero(
    span: Tensor, low: Tensor, bits: int, scale_clamp: tuple[float, float] = SCALE_CLAMP, ste: bool = True
) -> tuple[Tensor, Tensor, int]:
    top = (1 << bits) - 1
    scale = widened(span).clamp(*scale_clamp) / top
    real = -widened(low) / scale
    whole = pass_through(real, real.round()) if ste else real.round()
    return scale, whole.clamp(0, top), top


def row_range(weight: Tensor, dim: int | None = 0) -> tuple[Tensor, Tensor]:
    """Width and low end of every row's range, 0 included; axes are kept, all but `dim` of size 1, all for None.

    Zeros alone have the width 1.
    """
    axes = tuple(a for a in range(weight.ndim) if dim is None or a != dim % weight.ndim)
    low = weight.detach().amin(axes, keepdim=True).clamp(max=0)
    return _width(weight.detach().amax(axes, keepdim=True).clamp(min=0) - low), low


def input_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Width and low end (1,) of inputs (B, ...): means over examples of each one's extremes, then 0 included."""
    flat = x.detach().flatten(1)
    low = flat.amin(1).mean().clamp(max=0)
    return _width(flat.amax(1).mean().clamp(min=0) - low).view(1), low.view(1)


def _width(span: Tensor) -> Tensor:
    return torch.where(span == 0, torch.ones_like(span), span)


# --- parametrization and input quantizer ------------------------------------------------------------


class RangeQuantizer(LearnedWeight):
    """A weight, or an input, rounded within a range that is learned.

    Args:
        span: first width of the range, of the shape that broadcasts against what is rounded.
        low: first low end.
        bits: 2 to 8.

    Raises:
        BadInput: another width.
    """

    def __init__(self, span: Tensor, low: Tensor, bits: int):
        super().__init__()
        if not 2 <= bits <= 8:
            raise BadInput(f"RangeQuantizer: bits={bits}: 2 to 8")
        self.span, self.low, self.bits = nn.Parameter(span.detach().clone()), nn.Parameter(low.detach().clone()), bits
        self.scheme = Scheme(Int(bits), Scale("channel", dtype="float32"), zero="int")

    @classmethod
    def of_weight(cls, weight: Tensor, bits: int, dim: int = 0) -> RangeQuantizer:
        """With the ranges of a weight's rows."""
        return cls(*row_range(weight, dim), bits)

    @classmethod
    def of_inputs(cls, inputs: Sequence[Tensor], bits: int) -> RangeQuantizer:
        """With the mean range of inputs, each batch by its examples."""
        found = [(*input_range(x), len(x)) for x in inputs]
        count = sum(n for _, _, n in found)
        span = torch.stack([width * n for width, _, n in found]).sum(0) / count
        return cls(span, torch.stack([low * n for _, low, n in found]).sum(0) / count, bits)

    def forward(self, x: Tensor) -> Tensor:
        return range_quantize(x, self.span, self.low, self.bits)

    @torch.no_grad()
    def solved(self, weight: Tensor, view: View) -> Solved:
        """Codes of the weight in the range; scales (rows, 1) float32, zeros (rows, 1) uint8."""
        scale, zero, top = _scale_and_zero(self.span, self.low, self.bits)
        wide = widened(weight)
        codes = ((wide + scale * zero) / scale).clamp(0, top).round()
        loss = float((scale * (codes - zero) - wide).square().sum(dtype=torch.float64))
        rows = codes.shape[1 if view == "transposed" else 0]
        return Solved(
            matrix_view(codes, view).to(torch.uint8).contiguous(),
            scale.float().view(-1, 1).expand(rows, 1).contiguous(),
            zero.to(torch.uint8).view(-1, 1).expand(rows, 1).contiguous(),
            loss,
        )

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Let the range follow rows that are multiplied by a factor; a negative one changes its ends."""
        f = factor.to(self.span.dtype).view(self.span.shape)
        high = self.low + self.span
        self.low.copy_(torch.where(f < 0, f * high, f * self.low))
        self.span.mul_(f.abs())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, ranges={self.span.numel()}"


# --- one layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam: of weights, biases, and the ranges of weights and inputs."""

    weight: float = 1e-5
    bias: float = 1e-3
    weight_range: float = 1e-3
    input_range: float = 1e-1


def adaquant_layer(
    layer: Any,
    calls: Calls,
    bits: int,
    *,
    input_bits: int | None = None,
    steps: int = 1000,
    batch: int | None = 50,
    activation: Callable[[Tensor], Tensor] | None = None,
    rates: Rates = Rates(),
    keep_better: bool = True,
    seed: int = 0,
) -> Reconstructed:
    """Round a layer and train what rounds it, in place.

    Args:
        layer: linear or convolution, with float weights.
        calls: of it; targets are the float layer's outputs.
        bits: of its weight.
        input_bits: of its inputs; None leaves them as they are.
        steps: of Adam.
        batch: rows of a step; None for all.
        activation: that follows.
        rates: see `Rates`.
        keep_better: see `laconic.core.reconstruct.reconstruct`.
        seed: of the rows.

    Raises:
        BadInput: inf or nan in the weight, named by the layer's path.
    """
    check_finite(layer.weight.detach(), f"{calls.path}.weight")
    quantizer = RangeQuantizer.of_weight(layer.weight, bits, row_dim(layer))
    parametrize.register_parametrization(layer, "weight", quantizer)
    groups = [
        Group([layer.parametrizations.weight.original], rates.weight),
        Group([quantizer.span, quantizer.low], rates.weight_range),
    ]
    if layer.bias is not None:
        groups.append(Group([layer.bias], rates.bias))
    if input_bits is not None:
        of_input = RangeQuantizer.of_inputs(calls.inputs, input_bits)
        attach_input_quantizer(layer, of_input)
        groups.append(Group([of_input.span, of_input.low], rates.input_range))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output_loss(output, target, activation=activation)

    return reconstruct(
        layer, calls, groups, steps=steps, batch=batch, loss=loss, keep_better=keep_better, seed=seed
    )  # fmt: skip


# --- a model ----------------------------------------------------------------------------------------


def adaquant(
    model: nn.Module,
    batches: Sequence[Any],
    bits: int | Mapping[str, int] = 4,
    *,
    input_bits: int | Mapping[str, int] | None = None,
    steps: int = 1000,
    mode: Mode = "sequential",
    batch: int | None = 50,
    activations: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    rates: Rates = Rates(),
    teacher: nn.Module | None = None,
    seed: int = 0,
) -> Trainings:
    """Round every linear layer and convolution of a model and train what rounds it, in place.

    Batch norms must have been folded before. Weights stay parametrized, so that more can be tuned; `pack_learned` packs
    them in the end.

    Args:
        model: in evaluation mode, with float weights.
        batches: calibration data, each what `laconic.core.calls.call` takes.
        bits: of weights, or path of a layer -> bits; layers that are not named then stay float.
        input_bits: of their inputs, likewise; None leaves inputs as they are.
        steps, batch, rates: see `adaquant_layer`.
        mode: "parallel" or "sequential".
        activations: path of a layer -> what follows it; a ReLU module after it is found by itself.
        teacher: the float model; a copy of `model` by default.
        seed: of the rows that are drawn.

    Returns:
        Layer -> its training.

    Raises:
        BadInput: no data, a path that there is not, a tied weight that is named, NaN, or another mode.
    """
    if mode not in ("parallel", "sequential"):
        raise BadInput(f"adaquant: mode is {mode!r}: parallel or sequential")
    chosen, skipped = chosen_layers(model, bits, "adaquant")
    paths, done = list(chosen), Trainings(skipped)
    teacher = copy.deepcopy(model) if teacher is None else teacher
    twins = Twins(teacher, model, batches)
    relus = followed_by_relu(teacher, lambda: call(teacher, batches[0]), paths)
    for calls in twins.walk(paths, inputs="float" if mode == "parallel" else "student"):
        path = calls.path
        follows = (activations or {}).get(path, F.relu if path in relus else None)
        done[path] = adaquant_layer(
            model.get_submodule(path), calls, chosen[path], steps=steps, batch=batch, activation=follows, rates=rates,
            input_bits=input_bits.get(path) if isinstance(input_bits, Mapping) else input_bits, seed=seed,
        )  # fmt: skip
    return done


# --- bits -------------------------------------------------------------------------------------------


def compose(models: Mapping[int, nn.Module], choice: Mapping[str, int], base: int) -> nn.Module:
    """A copy of the model of `base` bits in which each layer of `choice` is that of another width's model."""
    made = copy.deepcopy(models[base])
    for path, width in choice.items():
        if width != base:
            made.set_submodule(path, copy.deepcopy(models[width].get_submodule(path)))
    return made


def degradations(
    models: Mapping[int, nn.Module], evaluate: Callable[[nn.Module], float], layers: Sequence[str], base: int = 8
) -> dict[str, dict[int, float]]:
    """What each layer costs at each width while all others have the base width: layer -> bits -> loss - loss_base.

    Args:
        models: bits -> the model rounded to so many.
        evaluate: a loss; lower is better.
        layers: paths.
        base: bits of all others.
    """
    start = evaluate(models[base])
    return {
        path: {
            width: 0.0 if width == base else evaluate(compose(models, {path: width}, base)) - start for width in models
        }
        for path in layers
    }


def integer_program(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, float],
    ratio: float,
    *,
    power: int = 1,
    least: float = LEAST,
) -> dict[str, int]:
    """Bits of every layer: the least sum of costs within a part of the float model's size.

    Args:
        costs: layer -> bits -> what it costs; at least `least` counts for any but the widest.
        sizes: layer -> parameters P_l, or products with `power` 2.
        ratio: R, what the layers may take of 32-bit floats.
        power: p; 2 counts operations on bits.
        least: see `LEAST`.

    Raises:
        Impossible: fewer bits than there are would be needed; the message says what can be had.
        BadInput: a cost that is NaN.
    """
    layers = list(costs)
    for path in layers:
        if any(math.isnan(value) for value in costs[path].values()):
            raise BadInput(f"{path}: what it costs at some width is NaN")
    widths = {path: sorted(costs[path]) for path in layers}
    total = sum(sizes[path] for path in layers)
    budget = total * (32 * ratio) ** power
    smallest = sum(sizes[path] * widths[path][0] ** power for path in layers)
    if smallest > budget:
        have = (smallest / total) ** (1 / power) / 32
        raise Impossible(
            f"the layers take at least {have:.4g} of their float size, more than the {ratio:.4g} asked for"
        )
    table = [
        [
            max(costs[path][width], least) if width != widths[path][-1] else max(costs[path][width], 0.0)
            for width in widths[path]
        ]
        for path in layers
    ]
    taken = allocate(table, [[sizes[path] * width**power for width in widths[path]] for path in layers], budget)
    return {path: widths[path][i] for path, i in zip(layers, taken, strict=True)}


def best_of_noise(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, float],
    ratio: float,
    evaluate: Callable[[dict[str, int]], float],
    *,
    tries: int = 4,
    noise: float = 0.1,
    power: int = 1,
    seed: int = 0,
) -> dict[str, int]:
    """The best of several integer programs, the first with the costs as they are, the others with relative noise.

    Args:
        costs, sizes, ratio, power: of `integer_program`.
        evaluate: the loss of a choice; lower is better.
        tries: programs in all.
        noise: deviation of the factors, 1 on average.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], tuple[float, dict[str, int]]] = {}
    for number in range(max(tries, 1)):
        noised = {
            path: {
                width: value * (1 + (noise * float(torch.randn((), generator=generator)) if number else 0.0))
                for width, value in row.items()
            }
            for path, row in costs.items()
        }
        choice = integer_program(noised, sizes, ratio, power=power)
        key = tuple(choice.values())
        if key not in found:
            found[key] = (evaluate(choice), choice)
    return min(found.values(), key=lambda pair: pair[0])[1]


# --- tuning afterwards ------------------------------------------------------------------------------


@torch.no_grad()
def bn_tune(
    model: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[str, str]], batches: Sequence[Any]
) -> dict[str, tuple[float, float]]:
    """Batch norms that were folded come back, take their statistics anew, and are folded again; in place.

    Args:
        model: rounded by `adaquant`, an identity where each norm was.
        teacher: the float model with its batch norms, in evaluation mode.
        pairs: (layer, batch norm), as `Structure.batchnorm_pairs` of the teacher has them.
        batches: calibration data.

    Returns:
        layer -> root mean squares of how far its output's mean and deviation, in gains, were from the shift and gain.

    Raises:
        BadInput: a layer that was not rounded by `adaquant`, a norm that is still there, or no data.
    """
    if not len(batches):
        raise BadInput("bn_tune needs calibration data, and there is none")
    learned = dict(learned_of(model))
    norms: dict[str, tuple[str, nn.Module]] = {}
    for layer, name in pairs:
        quantizer = learned.get(layer)
        if not isinstance(quantizer, RangeQuantizer):
            raise BadInput(f"{layer}: its weight was not rounded by adaquant, so its ranges cannot follow a norm")
        if not isinstance(model.get_submodule(name), nn.Identity):
            raise BadInput(f"{name}: a batch norm that is still there: fold it into {layer} first")
        old: Any = teacher.get_submodule(name)
        fresh = type(old)(old.num_features, eps=old.eps, momentum=None, affine=True)
        gain = torch.ones(old.num_features) if old.weight is None else old.weight.detach()
        shift = torch.zeros(old.num_features) if old.bias is None else old.bias.detach()
        fresh.weight.copy_(gain)
        fresh.bias.copy_(shift)
        norms[layer] = (name, fresh.to(gain.device, gain.dtype).train())
        model.set_submodule(name, fresh)
    for batch in batches:
        call(model, batch)
    moved = {}
    for layer, (name, norm) in norms.items():
        moved[layer] = _absorb(model.get_submodule(layer), learned[layer], norm)
        model.set_submodule(name, nn.Identity().eval())
    return moved


def _absorb(layer: Any, quantizer: Any, norm: Any) -> tuple[float, float]:
    """Fold a batch norm into a rounded layer: weight, ranges and bias."""
    affine = affine_of(norm.running_var, norm.eps, norm.running_mean, norm.weight, norm.bias)
    original = layer.parametrizations.weight.original
    gain = torch.where(norm.weight == 0, torch.ones_like(norm.weight), norm.weight)
    mean_off = (norm.running_mean - norm.bias).square().mean().sqrt()
    spread_off = ((norm.running_var + norm.eps).sqrt() / gain.abs() - 1).square().mean().sqrt()
    weight, bias = after_layer(affine, original, layer.bias, getattr(layer, "groups", 1))
    original.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(original.dtype))
    else:
        layer.bias.copy_(bias)
    quantizer.scale_(affine.scale)
    return float(mean_off), float(spread_off)


def bias_tune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    temperature: float = 1.0,
    keep_better: bool = True,
) -> Reconstructed:
    """Train all biases of a rounded model together, by KL divergence from the float model's outputs; in place.

    Args:
        model: rounded, in evaluation mode.
        teacher: the float model.
        batches: calibration data, each a step.
        epochs: passes over them.
        lr: of Adam.
        temperature: logits are divided by it.
        keep_better: put biases back where the divergence did not fall.

    Raises:
        BadInput: no data, or no biases.
    """
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise BadInput(f"bias_tune: {type(model).__name__} has no biases")
    if not len(batches):
        raise BadInput("bias_tune needs calibration data, and there is none")
    with torch.no_grad():
        targets = [_logits(teacher, batch) for batch in batches]

    def divergence(batch: Any, target: Tensor) -> Tensor:
        log_q = F.log_softmax(_logits(model, batch) / temperature, -1).flatten(0, -2)
        log_p = F.log_softmax(target / temperature, -1).flatten(0, -2)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def whole() -> float:
        with torch.no_grad():
            return sum(float(divergence(b, t)) for b, t in zip(batches, targets, strict=True)) / len(targets)

    start, before = [p.detach().clone() for p in biases], whole()
    optimizer, losses = torch.optim.Adam(biases, lr=lr), []
    for _ in range(epochs):
        for batch, target in zip(batches, targets, strict=True):
            with torch.enable_grad():
                loss = divergence(batch, target)
                gradients = torch.autograd.grad(loss, biases, allow_unused=True)
            for parameter, gradient in zip(biases, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(float(loss.detach()))
    for parameter in biases:
        parameter.grad = None
    after = whole()
    if keep_better and not after <= before:
        with torch.no_grad():
            for parameter, value in zip(biases, start, strict=True):
                parameter.copy_(value)
        after = before
    return Reconstructed(losses, before, after)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    answer = call(model, batch)
    return first_output(getattr(answer, "logits", answer))


# --- the pass ---------------------------------------------------------------------------------------


class AdaQuant:
    """The pass: every linear layer and convolution that runs once, its weight packed by channel, its bias trained.

    Inputs stay float. `Context` must hold calibration data (`batches`) and the float model (`teacher`).

    Args:
        bits: of weights, 2 to 8.
        steps, batch: see `adaquant_layer`.
        mode: "parallel" or "sequential".

    Raises:
        ValueError: another mode or width.
    """

    id: ClassVar = "adaquant"
    stage: ClassVar = "quantize"
    scope: ClassVar = "module"
    needs: ClassVar = frozenset({"data", "float"})

    def __init__(self, bits: int = 4, steps: int = 1000, batch: int | None = 50, mode: Mode = "sequential"):
        if not 2 <= bits <= 8 or mode not in ("parallel", "sequential"):
            raise ValueError(f"AdaQuant: bits={bits}, mode={mode!r}: 2 to 8 bits, parallel or sequential")
        self.bits, self.steps, self.batch, self.mode = bits, steps, batch, mode

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Weight -> its bits, and path of its bias; weight of a layer -> why it is left alone."""
        units, skipped = {}, {}
        found = {name: unit for unit in find_units(model, structure) for name in unit.names}
        for path, layer in model.named_modules():
            name = f"{path}.weight" if path else "weight"
            unit = found.get(name)
            if unit is None or unit.op not in ("linear", "conv"):
                if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                    skipped[name] = refusal_of(unit, structure)
                continue
            why = refusal_of(unit, structure)
            if why:
                skipped[name] = why
            elif not unit.options:
                skipped[name] = unit.reason or "no width makes it smaller"
            else:
                bias = f"{path}.bias" if path else "bias"
                tied = len(structure.parameters[structure.name_of(bias)].names) > 1 if bias in found else True
                units[name] = {
                    "bits": self.bits, "steps": self.steps, "batch": self.batch, "mode": self.mode,
                    **({} if tied else {"bias": bias}),
                }  # fmt: skip
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Codes, scales and bias of the weight at `path`, trained on `ctx.batches`."""
        said = decision.units[path]
        if ctx.teacher is None or not len(ctx.batches):
            raise ValueError(f"{path}: adaquant needs calibration data (batches) and the float model (teacher)")
        owner = path.rpartition(".")[0]
        calls = Twins(ctx.teacher, ctx.model, ctx.batches).calls(
            owner, inputs="float" if said["mode"] == "parallel" else "student"
        )
        relu = followed_by_relu(ctx.teacher, lambda: call(ctx.teacher, ctx.batches[0]), [owner])  # type: ignore[arg-type]
        layer: Any = copy.deepcopy(ctx.model.get_submodule(owner))
        done = adaquant_layer(
            layer, calls, said["bits"], steps=said["steps"], batch=said["batch"],
            activation=F.relu if relu else None, seed=ctx.seed,
        )  # fmt: skip
        unit = next(u for u in find_units(ctx.model, ctx.structure) if path in u.names)
        quantizer = layer.parametrizations.weight[0]
        record = learned_record(
            unit, quantizer, layer.parametrizations.weight.original.detach(),
            method=self.id, output_before=done.before, output_after=done.after, **said,
        )  # fmt: skip
        if "bias" in said:
            record.tensors["bias"] = layer.bias.detach().clone()
        return record

    def apply(self, model: nn.Module, record: Record) -> None:
        """Pack the weight, and give its layer the bias."""
        tensors = {name: value for name, value in record.tensors.items() if name != "bias"}
        apply_records(model, [Record(record.action, record.path, record.data, tensors)])
        if "bias" in record.tensors:
            owner, name = owner_of(model, record.data["bias"])
            with torch.no_grad():
                getattr(owner, name).copy_(record.tensors["bias"])


CARD = Card(
    id="adaquant",
    title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
    authors="Hubara, Nahshan, Hanani, Banner, Soudry",
    year=2020,
    source="arXiv 2006.10518",
    family="quant",
    summary="Trains each layer's weights, bias and ranges on its own output, and picks bits by an integer program.",
    objects={"AdaQuant": "Pass", "RangeQuantizer": "Weight"},
    traits={"RangeQuantizer": ("gradient:surrogate",)},
    use="Convolutional networks at 4 bits and below, with a hundred calibration examples or more.",
    avoid="Large linear layers, where gptq is far faster; without calibration data, where zeroq makes some.",
    composes=("fold_batchnorm", "zeroq"),
    vectors=("adaquant",),
    code="itayhubara/CalibTIP, MIT",
    claim={
        "text": "A small convolutional network in 3-bit weights and 4-bit activations keeps more of its accuracy where "
        "layers are trained on 100 examples, one after the other, than with ranges from these examples alone.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("rtn", "sequential"),
        "seeds": 5,
        "minutes": 2,
        "task": "mnist-cnn",
    },
)
