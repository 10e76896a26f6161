"""`lpgnas`: formats of weights and of what flows, chosen by gradients while a graph network is searched and trained.

Every choice among K options has logits a (K,). One option runs, and gradients reach the logits of all:

    c = argmax softmax(a + noise u),   p = onehot(c) + softmax(a + noise u) - stop(softmax(a + noise u))
    y = p_c op_c(x)                                               u Gumbel; the noise falls to 0 during the search

Options are whole operations (kinds of attention, aggregation, activation), or formats. A fixed-point number has i bits
before the point, the sign included, and f behind it. It has no scale that data would have to set:

    q(x) = clip(round(x 2^f), -2^(i+f-1), 2^(i+f-1) - 1) / 2^f    unsigned: from 0 to 2^(i+f) - 1

Its gradient passes straight through inside the range, and is 0 outside. Weights may be binary or ternary as well, with the
mean size as their scale. What is minimized on the data held out is

    loss + beta sum over choices of p (bits * elements)           elements of the weight, or of the buffer that is written

with one step for the weights on the training data to each step, or to every few, for the logits. At the end the likeliest
options are kept, and the network found is trained by itself.

Source: "Learned Low Precision Graph Neural Networks", Zhao, Wang, Bates, Mullins, Jamnik, Lio, 2020, arXiv 2009.09232; no
code was found, and only the abstract was at hand: the list of formats, the noise and how gradients pass are our reading.

Softmax outputs and normalized adjacencies are in [0, 1]: give them unsigned formats. Sums over neighbours grow with the
degree, so what is aggregated needs bits before the point that what goes in does not.

Example:
    >>> import torch
    >>> FixedPoint(2, 2)(torch.tensor([0.3, -0.9, 5.0, -5.0])).tolist()
    [0.25, -1.0, 1.75, -2.0]
    >>> FixedPoint(1, 3, signed=False)(torch.tensor([0.3, -0.9, 5.0])).tolist()
    [0.25, 0.0, 1.875]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.fake_quant import code_range, fake_quant_ste, pass_through
from laconic.errors import BadInput

# --- mathematics ------------------------------------------------------------------------------------


def fixed_point(x: Tensor, int_bits: int, frac_bits: int, *, signed: bool = True) -> Tensor:
    """q(x) with the clipped straight-through gradient; `int_bits` counts the sign."""
    low, high = code_range(int_bits + frac_bits, signed=signed)
    return fake_quant_ste(x, 2.0**-frac_bits, 0.0, low, high)


def scaled_signs(x: Tensor, *, ternary: bool = False) -> Tensor:
    """Binary mean|x| sgn(x), or ternary: zeros below .7 mean|x|, the others at the mean of their size.

    The gradient passes straight through.
    """
    with torch.no_grad():
        size = x.abs()
        kept = size > 0.7 * size.mean() if ternary else torch.ones_like(x, dtype=torch.bool)
        scale = (size * kept).sum() / kept.sum().clamp(min=1)
        rounded = torch.where(kept, torch.where(x < 0, -scale, scale), torch.zeros_like(x))
    return pass_through(x, rounded)


# --- layers -----------------------------------------------------------------------------------------


class FixedPoint(nn.Module):
    """Fixed-point rounding, for what flows or, as a parametrization, for a weight.

    Args:
        int_bits: before the point, the sign included.
        frac_bits: behind it.
        signed: else from 0.

    Raises:
        BadInput: no bit beside the sign, or more than 24, which float32 does not hold.
    """

    def __init__(self, int_bits: int, frac_bits: int, *, signed: bool = True):
        super().__init__()
        if not 1 + signed <= int_bits + frac_bits <= 24 or min(int_bits, frac_bits) < 0:
            raise BadInput(
                f"FixedPoint: {int_bits} and {frac_bits} bits: 1 to 24 in all, signed ones 2 at least, and none negative"
            )
        self.int_bits, self.frac_bits, self.signed = int_bits, frac_bits, signed

    @property
    def bits(self) -> int:
        """Of a number."""
        return self.int_bits + self.frac_bits

    def forward(self, x: Tensor) -> Tensor:
        """Rounded, in the shape and type of x."""
        if not x.is_floating_point():
            raise BadInput(f"FixedPoint rounds floats, and got {x.dtype} of shape {tuple(x.shape)}")
        return fixed_point(x, self.int_bits, self.frac_bits, signed=self.signed)

    def extra_repr(self) -> str:
        """What was given."""
        return f"{self.int_bits}, {self.frac_bits}, signed={self.signed}"


class ScaledSigns(nn.Module):
    """Binary or ternary numbers with the mean size as their scale."""

    def __init__(self, *, ternary: bool = False):
        super().__init__()
        self.ternary = ternary
        self.bits = 2 if ternary else 1

    def forward(self, x: Tensor) -> Tensor:
        """Rounded, in the shape and type of x."""
        return scaled_signs(x, ternary=self.ternary)

    def extra_repr(self) -> str:
        """What was given."""
        return f"ternary={self.ternary}"


class PathChoice(nn.Module):
    """One of several modules runs, and gradients reach the logits of all.

    In training the choice is drawn, in evaluation it is the likeliest.

    Args:
        options: modules that take the same input and give outputs of one shape.
        noise: standard Gumbel noise times this is added to logits in training.
        device, dtype: of the logits.

    Attributes:
        elements: of the last output, which what it costs in bits is counted by.
    """

    def __init__(
        self, options: Sequence[nn.Module], *, noise: float = 1.0, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if not options:
            raise BadInput("PathChoice: at least one option is needed")
        self.options = nn.ModuleList(options)
        self.logits = nn.Parameter(torch.zeros(len(options), device=device, dtype=dtype))
        self.noise, self.elements = noise, 0
        self._last: Tensor | None = None

    def shares(self) -> Tensor:
        """p (K,) of the last draw in training, else of the likeliest: 0 and 1, with the gradient of a softmax."""
        if self.training and self._last is not None:
            return self._last
        return _straight_through(self.logits.float())

    def chosen(self) -> int:
        """The likeliest option."""
        return int(self.logits.argmax())

    def forward(self, x: Tensor) -> Tensor:
        """The output of the option that is drawn."""
        noisy = self.logits.float()
        if self.training and self.noise:
            uniform = torch.rand_like(noisy).clamp(min=torch.finfo(torch.float32).tiny)
            noisy = noisy - self.noise * (-uniform.log()).log()
        shares = _straight_through(noisy)
        if torch.compiler.is_exporting():  # a program cannot look at the logits: it computes all options
            return sum((s.to(x.dtype) * option(x) for s, option in zip(shares, self.options, strict=True)))  # type: ignore[return-value]
        self._last = shares if self.training else None
        at = int(noisy.argmax())
        y = self.options[at](x)
        self.elements = y.numel()
        return y * shares[at].to(y.dtype)

    def expected_bits(self) -> Tensor:
        """sum_k p_k bits_k * elements, a scalar; options without `bits` cost nothing."""
        bits = torch.tensor([float(getattr(o, "bits", 0)) for o in self.options], device=self.logits.device)
        return (self.shares() * bits).sum() * self.elements

    def extra_repr(self) -> str:
        """What was given."""
        return f"noise={self.noise}"


def _straight_through(logits: Tensor) -> Tensor:
    soft = logits.softmax(0)
    hard = torch.nn.functional.one_hot(logits.argmax(), len(logits)).to(soft.dtype)
    return hard + soft - soft.detach()


# --- the search -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantSpace:
    """Formats to choose from, each a number of bits (before, behind) the point, or "binary" or "ternary".

    Attributes:
        weights: of weights.
        activations: of what layers write.
    """

    weights: tuple[Any, ...] = ("binary", "ternary", (2, 2), (2, 4), (2, 6), (4, 6), (4, 8), (4, 12))
    activations: tuple[Any, ...] = ((2, 2), (4, 4), (4, 8), (4, 12))

    @staticmethod
    def modules(formats: Iterable[Any]) -> list[nn.Module]:
        """A module for each format.

        Raises:
            BadInput: there is no such format.
        """
        found: list[nn.Module] = []
        for fmt in formats:
            if fmt in ("binary", "ternary"):
                found.append(ScaledSigns(ternary=fmt == "ternary"))
            elif isinstance(fmt, (tuple, list)) and len(fmt) == 2:
                found.append(FixedPoint(*fmt))
            else:
                raise BadInput(f"lpgnas: {fmt!r} is no format: (bits before, bits behind), 'binary' or 'ternary'")
        return found


class SearchedFormats:
    """A model with a choice of formats at the weight and at the output of every linear layer, put in place.

    Choices of operations that the model has itself are found as well.

    Args:
        model: changed in place: parametrizations of weights, and hooks on outputs.
        space: formats.
        noise: at first.

    Raises:
        BadInput: there is no linear layer, or a weight that is computed already.
    """

    def __init__(self, model: nn.Module, space: QuantSpace | None = None, *, noise: float = 1.0):
        space = space or QuantSpace()
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise BadInput("lpgnas: the model has no linear layer whose formats could be chosen")
        taken = next((path for path, module in layers if parametrize.is_parametrized(module, "weight")), None)
        if taken is not None:
            raise BadInput(f"lpgnas: {taken}.weight is computed by a parametrization already: remove that first")
        self.model, self._layers, self._hooks = model, layers, []
        for _, layer in layers:
            weight = PathChoice(space.modules(space.weights), noise=noise, device=layer.weight.device)
            output = PathChoice(space.modules(space.activations), noise=noise, device=layer.weight.device)
            parametrize.register_parametrization(layer, "weight", weight)
            layer.add_module("output_format", output)
            self._hooks.append(layer.register_forward_hook(lambda module, args, y: module.output_format(y)))
        self.choices = {name: m for name, m in model.named_modules() if isinstance(m, PathChoice)}

    def logits(self) -> list[nn.Parameter]:
        """Of all choices."""
        return [choice.logits for choice in self.choices.values()]

    def weights(self) -> list[nn.Parameter]:
        """All other parameters."""
        own = {id(p) for p in self.logits()}
        return [p for p in self.model.parameters() if id(p) not in own]

    def set_noise(self, noise: float) -> None:
        """Of all choices."""
        for choice in self.choices.values():
            choice.noise = noise

    def bits(self) -> Tensor:
        """Bits of weights and buffers as the last forward had them, with a gradient for the logits."""
        return torch.stack([choice.expected_bits() for choice in self.choices.values()]).sum()

    def elements(self) -> int:
        """Weights and entries of buffers that have a format."""
        return sum(c.elements for c in self.choices.values() if any(hasattr(o, "bits") for o in c.options))

    def chosen(self) -> dict[str, str]:
        """Choice -> its likeliest option, as it prints."""
        return {name: str(choice.options[choice.chosen()]) for name, choice in self.choices.items()}

    def freeze(self) -> None:
        """Keep the likeliest options: no noise, logits no longer trained and so far apart that they stay."""
        self.set_noise(0.0)
        with torch.no_grad():
            for choice in self.choices.values():
                choice.logits.copy_(torch.where(torch.arange(len(choice.logits)) == choice.chosen(), 50.0, -50.0))
                choice.logits.requires_grad_(False)


def search_formats(
    searched: SearchedFormats, train_loss: Callable[[], Tensor], held_out_loss: Callable[[], Tensor], *, steps: int,
    beta: float, lr: float = 1e-2, choice_lr: float = 5e-2, every: int = 1, noise: float = 1.0,
) -> list[dict[str, float]]:  # fmt: skip
    """Train weights and choices in turns, and keep the likeliest options in the end.

    Args:
        searched: the model with its choices.
        train_loss: runs the model on training data; the loss.
        held_out_loss: likewise, on data that weights are not trained on.
        steps: of the weights.
        beta: what a bit costs, as a part of the bits that 32 everywhere would take.
        lr: of Adam on the weights.
        choice_lr: of Adam on the logits.
        every: steps of the weights to one of the logits.
        noise: at first; it falls to 0 in a line.

    Returns:
        A row for each step of the logits: `step`, `loss` (held out), `bits` (mean of a weight or entry of a buffer).

    Raises:
        BadInput: a loss that is not finite.
    """
    weights = torch.optim.Adam(searched.weights(), lr=lr)
    logits = torch.optim.Adam(searched.logits(), lr=choice_lr)
    history: list[dict[str, float]] = []
    for step in range(steps):
        searched.model.train()
        searched.set_noise(noise * (1 - step / steps))
        _step(weights, train_loss(), step)
        if (step + 1) % every:
            continue
        loss = held_out_loss()
        mean = searched.bits() / max(searched.elements(), 1)
        _step(logits, loss + beta * mean / 32, step)
        history.append({"step": float(step), "loss": loss.item(), "bits": mean.item()})
    searched.freeze()
    return history


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    if not math.isfinite(loss.item()):
        raise BadInput(
            f"lpgnas: the loss is {loss.item()} at step {step}: lower lr, or give more bits before the point"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


CARD = Card(
    id="lpgnas",
    title="Learned Low Precision Graph Neural Networks",
    authors="Zhao, Wang, Bates, Mullins, Jamnik, Lio",
    year=2020,
    source="arXiv 2009.09232",
    family="quant",
    summary="Chooses formats of weights and of buffers, and operations, by gradients while a graph network is trained.",
    objects={"FixedPoint": "Layer", "PathChoice": "Layer"},
    traits={
        "FixedPoint": ("gradient:surrogate", "batch_independent_eval"),
        "PathChoice": ("gradient:surrogate", "batch_independent_eval"),
    },
    use="Small networks, such as graph networks, whose formats and operations are searched in one training.",
    avoid="Trained networks: measured losses by layer and an integer program take seconds.",
    composes=("fliqs",),
    code="none found",
    claim={
        "text": "On a graph with communities, searched formats lose at most one point against 8 bits everywhere and take "
        "at least two bits less.",
        "metric": "mean bits of weights and buffers, 16 where more than a point is lost",
        "direction": "lower",
        "margin": 2.0,
        "arms": ("uniform", "searched"),
        "seeds": 5,
        "minutes": 2,
        "task": "stochastic block model",
    },
)
