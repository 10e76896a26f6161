"""`fliqs`: one training finds the format of each layer and the weights for it; nothing is trained again.

A policy holds free logits theta_l for each decision l (a layer, a block, or the model). Every training step draws a
format for each, p_l = softmax(theta_l / tau), in the first `delay` steps uniformly; the shared float weights take an
ordinary step through the fake quantization drawn; and the policy learns from how it went (REINFORCE):

    R = q - beta |1 - C / C0|                                     q the quality of the step, C its cost, C0 the target
    m <- .99 m + .01 R,  A = R - m                                m begins with the first R
    loss = - A mean_l log p_l(drawn) + lambda_t mean_l H(p_l)     Adam on theta
    lambda_t = lambda (1 - cos(pi (t - delay) / (T - delay))) / 2

The entropy term is a penalty that grows: the policy explores freely at first and is forced to one choice in the end, so
that the network which is drawn stops changing and the shared weights have already become its own. The result is the most
likely format of each decision.

    q(x; b) = s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1),   s = max|x| / (2^(b-1) - 1)     weights by output channel,
                                                                                              inputs by tensor
    memory = sum_l P_l b_w / 8 / 2^20 (MiB)        compute = sum_l P_l M_l ((b_w + b_a) / 2)^2 / 10^6

with P weights and M output positions of a layer (1 for linear layers). Gradients pass straight through, also outside the
range. "e4m3" and "e2m1" are floats of 8 and 4 bits scaled to their largest number; a format may also be a pair (weights,
inputs). At inference formats are fixed: pack each weight under its own.

Source: "FLIQS: One-Shot Mixed-Precision Floating-Point and Integer Quantization Search", Dotzel, Wu, Li, Umar, Ni,
Abdelfattah, Zhang, Cheng, Dixon, Jouppi, Le, Li, 2023, arXiv 2308.03290. Read in a modification of the code published with
the submission, which has no licence (not copied). There quality is minus the loss of the training batch, as here by
default; compute there leaves M out. Formats of floats are not in that code.

Use it where a network is trained anyway. For a trained one, measured losses by layer and an integer program
(`laconic.core.allocate`) take seconds.

Example:
    >>> round(entropy_weight(7, maximum=0.5, delay=3, total=12), 4), tunas_abs(0.9, 60.0, target=50.0, beta=1.0)
    (0.2066, 0.7000000000000001)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.allocate import allocate
from laconic.core.card import Card
from laconic.core.fake_quant import code_range, pass_through
from laconic.core.hooks import Hook, Run
from laconic.core.modes import evaluating
from laconic.errors import BadInput
from laconic.numerics import mini_float, round_float

from ._rounded import CONVOLUTIONS, call
from ._spaces import HasSizes

SCHEDULES = ("cosine", "linear", "heaviside", "constant")
FLOATS = {name: mini_float(name).bits for name in ("e4m3", "e2m1")}
Format = int | str | tuple[int | str, int | str]
Quality = Callable[[Tensor, Any, Any], float]


# --- mathematics ------------------------------------------------------------------------------------


def entropy_weight(
    step: int, *, maximum: float, delay: int, total: int, schedule: str = "cosine", switch_at: float = 0.5
) -> float:
    """lambda_t of the entropy penalty.

    Args:
        step: t, from 0.
        maximum: lambda.
        delay: steps before the policy learns.
        total: T.
        schedule: "cosine" and "linear" rise from the delay to the end, "heaviside" jumps after `switch_at` of all steps.
        switch_at: see there.
    """
    if schedule not in SCHEDULES:
        raise BadInput(f"fliqs: the schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        return maximum
    if schedule == "heaviside":
        return maximum if step > switch_at * total else 0.0
    share = min(max((step - delay) / max(total - delay, 1), 0.0), 1.0)
    return maximum * (share if schedule == "linear" else (1 - math.cos(math.pi * share)) / 2)


def tunas_abs(quality: float, cost: float, target: float, beta: float = 1.0, *, one_sided: bool = False) -> float:
    """q - beta |1 - C/C0|; one-sided: costs below the target count as the target."""
    ratio = cost / target
    return quality - beta * abs(1 - (max(1.0, ratio) if one_sided else ratio))


def power_reward(quality: float, cost: float, target: float, beta: float = -0.07, *, hard: bool = False) -> float:
    """q (C/C0)^beta; hard: costs below the target count as the target."""
    ratio = cost / target
    return quality * (max(1.0, ratio) if hard else ratio) ** beta


REWARDS: Mapping[str, Callable[..., float]] = {
    "tunas_abs": tunas_abs,
    "one_sided_tunas_abs": lambda *given, **more: tunas_abs(*given, **more, one_sided=True),
    "soft": power_reward,
    "hard": lambda *given, **more: power_reward(*given, **more, hard=True),
}


def fake_format(x: Tensor, fmt: int | str, *, share: str = "tensor", clip: float | None = 1.0) -> Tensor:
    """x rounded to a format with the scale of its largest number, the gradient straight through.

    Args:
        x: float.
        fmt: bits of an integer, or one of `FLOATS`.
        share: what shares a scale: the whole "tensor", a "channel" (entry of the first dimension), or a "token" (row of
            the last).
        clip: which part of the largest number is the end of the range; None: the one of .1, .2, ... 1 that is best in
            squares.
    """
    with torch.no_grad():
        size = x.detach().abs()
        if share == "channel" and x.ndim > 1:
            top = size.flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1))
        else:
            top = size.amax(-1, keepdim=True) if share == "token" else size.amax()
        top = top.clamp(min=1e-8)
        parts = [i / 10 for i in range(10, 0, -1)] if clip is None else [clip]
        rounded = min((_rounded_to(x, fmt, top * part) for part in parts), key=lambda y: float((y - x).square().sum()))
    return pass_through(x, rounded)


def _rounded_to(x: Tensor, fmt: int | str, top: Tensor) -> Tensor:
    """The nearest numbers of a format whose largest is `top`."""
    if isinstance(fmt, str):
        numbers = mini_float(fmt)
        s = top / numbers.largest
        return round_float(x / s, numbers) * s
    low, high = code_range(int(fmt))
    s = top / high
    return (x / s).round().clamp(low, high) * s


def bits_of(fmt: Format) -> tuple[int, int]:
    """Bits of weights and of inputs in a format.

    Raises:
        BadInput: there is no such format.
    """
    pair = fmt if isinstance(fmt, tuple) else (fmt, fmt)
    for part in pair:
        if part not in FLOATS and not (isinstance(part, int) and 2 <= part <= 16):
            raise BadInput(f"fliqs: {part!r} is no format: 2 to 16 bits, or {', '.join(FLOATS)}")
    return FLOATS.get(pair[0], pair[0]), FLOATS.get(pair[1], pair[1])  # type: ignore[arg-type,return-value]


# --- the policy, a search ---------------------------------------------------------------------------


class FliqsPolicy:
    """The search: independent logits for every decision, which learn from rewards.

    Args:
        space: to search.
        seed: of what is drawn.
        total: T, steps in all; the entropy penalty is at its height there.
        delay: steps that are drawn uniformly, and teach the baseline alone.
        lr, betas, eps: of Adam.
        entropy: lambda.
        schedule, switch_at: of the entropy penalty, see `entropy_weight`.
        ema: the share of the baseline that stays.
        temperature: tau.
        init: first logits.
        clamp: least probability.
        baseline_first: update the baseline before the advantage is taken.
    """

    def __init__(
        self, space: HasSizes, seed: int = 0, *, total: int, delay: int = 2500, lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, entropy: float = 0.5, schedule: str = "cosine",
        switch_at: float = 0.5, ema: float = 0.99, temperature: float = 1.0, init: float = 0.5, clamp: float = 1e-8,
        baseline_first: bool = True,
    ):  # fmt: skip
        if not 0 <= delay <= total:
            raise BadInput(f"fliqs: a delay of {delay} steps does not fit in {total} steps in all")
        if not temperature > 0:
            raise BadInput(f"fliqs: the temperature is positive, not {temperature}")
        self.sizes = tuple(space.sizes)
        self.total, self.delay, self.lr, self.betas, self.eps = total, delay, lr, betas, eps
        self._lambda = {
            "maximum": entropy,
            "delay": delay,
            "total": total,
            "schedule": schedule,
            "switch_at": switch_at,
        }
        entropy_weight(0, **self._lambda)  # type: ignore[arg-type]
        self.ema, self.temperature, self.clamp, self.baseline_first = ema, temperature, clamp, baseline_first
        widest = max(self.sizes)
        self._there = torch.arange(widest) < torch.tensor(self.sizes)[:, None]
        self.logits = torch.full((len(self.sizes), widest), init)
        self._moments = (torch.zeros_like(self.logits), torch.zeros_like(self.logits))
        self.step, self.baseline, self._updates = 0, math.nan, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._best: tuple[int, ...] | None = None
        self._result = -math.inf

    def probabilities(self, logits: Tensor | None = None) -> Tensor:
        """p (decisions, options), 0 where a decision has fewer options."""
        shown = (self.logits if logits is None else logits) / self.temperature
        p = shown.masked_fill(~self._there, -math.inf).softmax(-1).clamp(min=self.clamp) * self._there
        return p / p.sum(-1, keepdim=True)

    def ask(self) -> list[tuple[int, ...]]:
        """What to train next, drawn."""
        p = self._there.float() if self.step < self.delay else self.probabilities()
        return [tuple(torch.multinomial(p, 1, generator=self._generator)[:, 0].tolist())]

    def tell(self, candidate: tuple[int, ...], result: float) -> None:
        """The reward of a candidate; one that is not finite counts as a step and teaches nothing."""
        t, self.step = self.step, self.step + 1
        if not math.isfinite(result):
            return
        if self._best is None or result > self._result:
            self._best, self._result = tuple(candidate), result
        before = result if math.isnan(self.baseline) else self.baseline
        self.baseline = self.ema * before + (1 - self.ema) * result
        if t >= self.delay:
            self._learn(candidate, result - (self.baseline if self.baseline_first else before), t)

    def _learn(self, candidate: tuple[int, ...], advantage: float, t: int) -> None:
        logits = self.logits.clone().requires_grad_()
        with torch.enable_grad():
            p = self.probabilities(logits)
            safe = torch.where(self._there, p, 1.0).log()
            drawn = safe.gather(1, torch.tensor(candidate)[:, None]).mean()
            entropy = -(p * safe).sum(-1).mean()
            loss = -advantage * drawn + entropy_weight(t, **self._lambda) * entropy  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(loss, logits)
        self._updates += 1
        (b1, b2), steps = self.betas, self._updates
        first, second = self._moments
        first.lerp_(gradient, 1 - b1)
        second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        spread = second.sqrt() / math.sqrt(1 - b2**steps) + self.eps
        self.logits = self.logits - self.lr / (1 - b1**steps) * first / spread

    def best(self) -> tuple[int, ...] | None:
        """What had the highest reward; None before the first. The result of the search is `choice`."""
        return self._best

    def choice(self, cost: Sequence[Sequence[float]] | None = None, target: float = math.inf) -> tuple[int, ...]:
        """The most likely options; with a table of costs by decision and option, the most likely that keep a target.

        Raises:
            Impossible: nothing keeps it.
        """
        if cost is None:
            return tuple(self.probabilities().argmax(-1).tolist())
        unlikely = [(-row[:size].log()).tolist() for row, size in zip(self.probabilities(), self.sizes, strict=True)]
        return tuple(allocate(unlikely, cost, target))

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "logits": self.logits.clone(), "moments": [m.clone() for m in self._moments], "step": self.step,
            "updates": self._updates, "baseline": self.baseline, "generator": self._generator.get_state(), "result": self._result,
            "best": None if self._best is None else list(self._best),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.logits, self.step, self.baseline = state["logits"].clone(), state["step"], state["baseline"]
        self._updates = state["updates"]
        first, second = state["moments"]
        self._moments = (first.clone(), second.clone())
        self._generator.set_state(state["generator"])
        self._best, self._result = None if state["best"] is None else tuple(state["best"]), state["result"]


# --- a model whose formats can be changed -----------------------------------------------------------


class _Rounding(nn.Module):
    """The weight in the format that is set; none: as it is."""

    def __init__(self, share: str, clip: float | None) -> None:
        super().__init__()
        self.fmt: int | str | None = None
        self.share, self.clip = share, clip

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.fmt is None else fake_format(weight, self.fmt, share=self.share, clip=self.clip)


@dataclass
class _Layer:
    path: str
    module: nn.Module
    rounding: _Rounding
    weights: int
    positions: int = 1
    inputs: int | str | None = None


class Switched:
    """The linear and convolution layers of a model, fake-quantized in formats that can be set at every step.

    Make it before the optimizer. `remove` gives the model back.

    Args:
        model: changed in place, by parametrizations and hooks.
        options: formats, see `bits_of`.
        granularity: what decides by itself: every "layer", every "block" (layers with the same parent), or the "model".
        cost: "memory" (MiB) or "compute".
        example: a batch, which "compute" needs to see how many positions convolutions have.
        skip: paths of layers that stay float and cost nothing, such as the first and the last.
        activations: round inputs as well.
        weight_scale: "channel" or "tensor", see `fake_format`.
        input_scale: "tensor" or "token".
        clip: of weights, see `fake_format`.

    Raises:
        BadInput: nothing to switch, or options that are none.
    """

    def __init__(
        self, model: nn.Module, options: Sequence[Format] = (4, 8), *, granularity: str = "layer", cost: str = "memory",
        example: Any = None, skip: Sequence[str] = (), activations: bool = True,
        weight_scale: str = "channel", input_scale: str = "tensor", clip: float | None = 1.0,
    ):  # fmt: skip
        if granularity not in ("layer", "block", "model") or cost not in ("memory", "compute"):
            raise BadInput(
                f"fliqs: granularity={granularity!r} is layer, block or model, and cost={cost!r} memory or compute"
            )
        if weight_scale not in ("channel", "tensor") or input_scale not in ("tensor", "token"):
            raise BadInput(
                f"fliqs: weight_scale={weight_scale!r} is channel or tensor, and input_scale={input_scale!r} tensor or token"
            )
        if len(options) < 1 or len(set(options)) != len(options):
            raise BadInput(f"fliqs: formats to choose from are different ones, not {tuple(options)}")
        self.options, self.cost_of = tuple(options), cost
        self._bits = [bits_of(option) for option in self.options]
        self._pairs = [option if isinstance(option, tuple) else (option, option) for option in self.options]
        chosen = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and path not in skip
        ]
        if not chosen:
            raise BadInput("fliqs: the model has no linear or convolution layer whose format could be chosen")
        taken = next((path for path, module in chosen if parametrize.is_parametrized(module, "weight")), None)
        if taken is not None:
            raise BadInput(f"fliqs: {taken}.weight is computed by a parametrization already: remove that first")
        layers = [_Layer(path, module, _Rounding(weight_scale, clip), module.weight.numel()) for path, module in chosen]
        if cost == "compute":
            _count_positions(model, layers, example)
        self._hooks = []
        for layer in layers:
            parametrize.register_parametrization(layer.module, "weight", layer.rounding)
            if activations:
                self._hooks.append(layer.module.register_forward_pre_hook(_round_input(layer, input_scale)))
        groups: dict[str, list[_Layer]] = {}
        for layer in layers:
            key = {"layer": layer.path, "block": layer.path.rpartition(".")[0], "model": ""}[granularity]
            groups.setdefault(key, []).append(layer)
        self.groups = groups

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each decision has, as those of a space."""
        return (len(self.options),) * len(self.groups)

    def set(self, candidate: Sequence[int] | None) -> None:
        """Run in these formats from now on; None: in floats."""
        for i, group in enumerate(self.groups.values()):
            for layer in group:
                pair = (None, None) if candidate is None else self._pairs[candidate[i]]
                layer.rounding.fmt, layer.inputs = pair

    def table(self) -> list[list[float]]:
        """Cost of each decision and option."""
        return [
            [sum(self._cost(layer, *bits) for layer in group) for bits in self._bits] for group in self.groups.values()
        ]

    def cost(self, candidate: Sequence[int]) -> float:
        """Cost of a candidate."""
        return math.fsum(row[option] for row, option in zip(self.table(), candidate, strict=True))

    def formats(self, candidate: Sequence[int]) -> dict[str, Format]:
        """Weight -> format."""
        return {
            f"{layer.path}.weight" if layer.path else "weight": self.options[option]
            for option, group in zip(candidate, self.groups.values(), strict=True)
            for layer in group
        }

    def remove(self, *, bake: bool = False) -> None:
        """Take everything out again; `bake` leaves the weights rounded as they are set."""
        for handle in self._hooks:
            handle.remove()
        for group in self.groups.values():
            for layer in group:
                parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=bake)

    def _cost(self, layer: _Layer, weights: int, inputs: int) -> float:
        if self.cost_of == "memory":
            return layer.weights * weights / 8 / 2**20
        return layer.weights * layer.positions * ((weights + inputs) / 2) ** 2 / 1e6


def _round_input(layer: _Layer, share: str) -> Callable[[nn.Module, tuple], tuple | None]:
    def rounded(module: nn.Module, args: tuple) -> tuple | None:
        return None if layer.inputs is None else (fake_format(args[0], layer.inputs, share=share), *args[1:])

    return rounded


def _count_positions(model: nn.Module, layers: list[_Layer], example: Any) -> None:
    if example is None:
        raise BadInput("fliqs: cost='compute' needs an example, to see how many positions convolutions have")

    def count(layer: _Layer) -> Any:
        def seen(module: nn.Module, args: tuple, output: Tensor) -> None:
            layer.positions = math.prod(output.shape[2:]) if isinstance(module, CONVOLUTIONS) else 1

        return seen

    handles = [layer.module.register_forward_hook(count(layer)) for layer in layers]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()


# --- training ---------------------------------------------------------------------------------------


def minus_loss(loss: Tensor, batch: Any, output: Any) -> float:
    """Quality of a step: minus the loss of its batch."""
    return -float(loss.detach())


class Fliqs(Hook):
    """The search as a hook of a training: draws before each step, learns after it.

    Args:
        switched: the model's layers, made before the optimizer.
        policy: over `switched`.
        target: C0, in the unit of the cost.
        beta: weight of the cost.
        reward: one of `REWARDS`.
        quality: of a step, from the loss, the batch and the model's output; higher is better.

    Raises:
        BadInput: no such reward, or a target that is not positive.
    """

    def __init__(
        self, switched: Switched, policy: FliqsPolicy, *, target: float, beta: float = 1.0, reward: str = "tunas_abs",
        quality: Quality = minus_loss,
    ):  # fmt: skip
        if reward not in REWARDS:
            raise BadInput(f"fliqs: the reward {reward!r} is none of {', '.join(REWARDS)}")
        if not target > 0:
            raise BadInput(f"fliqs: the target cost is positive, not {target}")
        self.switched, self.policy, self.target, self.beta = switched, policy, target, beta
        self.reward, self.quality = REWARDS[reward], quality
        self._drawn: tuple[int, ...] | None = None
        self._qualities: list[float] = []

    def batch(self, run: Run, batch: Any) -> Any:
        """Draw, at the first micro-batch of a step."""
        if self._drawn is None:
            (self._drawn,) = self.policy.ask()
            self.switched.set(self._drawn)
        return batch

    def loss(self, run: Run, loss: Tensor, batch: Any, output: Any) -> Tensor:
        """Keep the quality."""
        self._qualities.append(self.quality(loss, batch, output))
        return loss

    def step(self, run: Run) -> None:
        """Learn."""
        assert self._drawn is not None
        quality = sum(self._qualities) / len(self._qualities)
        cost = self.switched.cost(self._drawn)
        self.policy.tell(self._drawn, self.reward(quality, cost, target=self.target, beta=self.beta))
        run.log(cost=cost)
        self._drawn, self._qualities = None, []

    def end(self, run: Run) -> None:
        """Set the most likely formats."""
        self.switched.set(self.policy.choice())

    def state_dict(self) -> dict[str, Any]:
        """That of the policy."""
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self.policy.load_state_dict(state)


CARD = Card(
    id="fliqs",
    title="FLIQS: One-Shot Mixed-Precision Floating-Point and Integer Quantization Search",
    authors="Dotzel, Wu, Li, Umar, Ni, Abdelfattah, Zhang, Cheng, Dixon, Jouppi, Le, Li",
    year=2023,
    source="arXiv 2308.03290",
    family="quant",
    summary="Searches the format of each layer by a policy while the shared weights are trained; nothing is trained again.",
    objects={"FliqsPolicy": "Search"},
    use="Where a network is trained anyway, and should fit a bound of memory or of bit operations.",
    avoid="For a trained network: measured losses by layer and an integer program take seconds.",
    composes=("layer_bits", "hessian_interlayer"),
    vectors=("fliqs",),
    code="code of the submission, no licence (not copied)",
    claim={
        "text": "At the memory of 4 bits everywhere, formats of 2, 4 and 8 bits that are searched while training give a "
        "more accurate network.",
        "metric": "test accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("uniform", "fliqs"),
        "seeds": 5,
        "minutes": 2,
        "task": "digits",
    },
)
