"""`elr_probe`: how far a step really turns each weight that a normalization makes scale-free.

Where f(a w) = f(w) for every a > 0, as for a layer that a norm follows, grad f(a w) = grad f(w) / a and
<w, grad f> = 0: only the direction of w matters, its length |w| sets what a learning rate means. With learning rate lr,
weight decay lambda and momentum b:

    effective learning rate         lr / |w|^2 for SGD (lr / (1 - b) with momentum), lr / |w| for Adam and its kind
    angle of a step                 arccos(<w, w'> / (|w| |w'|))
    angle it settles at             sqrt(2 lr lambda / (1 + b)) for SGD with L2
                                    sqrt(2 lr lambda (1 - b1) / (1 + b1)) for AdamW (decoupled decay)
    length it settles at            (lr |g|^2 |w|^2 / (2 lambda (1 - b)))^(1/4) for SGD, g the present gradient
    the same training of SGD        (w, lr, lambda) and (a w, a^2 lr, lambda / a^2)

So L2 under normalization does not regularize: it sets the effective learning rate. What it settles at holds where
gradients stay random and do not vanish, after some 1 / (lr lambda) steps. The last line is exact, bit for bit, as the
eps of the norm goes to 0. An eps of 1e-5 is enough for two such trainings to part after some hundred steps, as any two
do that rounding tells apart: they are the same kind of training then, and no longer the same network.

Source: "L2 Regularization versus Batch and Weight Normalization", van Laarhoven, 2017, arXiv 1706.05350, which has no
official code. The settled angles with momentum and for AdamW are derived as there, from the balance of decay and the
length that steps add when gradients are independent; the tests check them against simulated steps.

The probe finds scale-free weights by scaling them: it changes nothing in the model, works on a copy, and costs up to
two forward passes for each weight. Use it to choose weight decay and learning rate together, and to see whether a
training has quietly stopped. It says nothing about weights that no normalization follows.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.weight import ElrProbe
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> probe = ElrProbe(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.005))
    >>> finding = probe(model, (torch.randn(16, 4), torch.randint(3, (16,))))
    >>> [(row["name"], row["scale_free"]) for row in finding.table]
    [('0.weight', 'rows'), ('3.weight', 'no')]
    >>> round(finding.table[0]["settled_angle"], 4)
    0.0316
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.errors import BadInput

from ._layers import MATRIX_LAYERS, rows_of

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]

# What a doubling of a scale-free weight may still change, through the eps of its norm, relative to the outputs' spread.
TOLERANCE = 1e-2
# Whose steps are as long whatever the gradient's length: the direction then turns by lr / |w|.
SCALE_BLIND = (
    torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adadelta,
)  # fmt: skip


def effective_lr(lr: float, length: float, power: int, momentum: float = 0.0) -> float:
    """lr / (1 - momentum) / |w|^power: 2 for SGD, 1 for optimizers whose steps do not know the gradient's length."""
    return lr / (1 - momentum) / length**power if length > 0 else math.inf


def settled_angle(lr: float, weight_decay: float, momentum: float = 0.0, *, adamw: bool = False) -> float:
    """The angle of a step, in radians, where decay and growth of |w| balance.

    Args:
        lr: learning rate.
        weight_decay: of L2 (SGD), or decoupled (AdamW).
        momentum: b for SGD, b1 for AdamW.
        adamw: of AdamW instead of SGD.
    """
    share = (1 - momentum) / (1 + momentum) if adamw else 1 / (1 + momentum)
    return math.sqrt(2 * lr * weight_decay * share)


def settled_length(lr: float, weight_decay: float, length: float, gradient: float, momentum: float = 0.0) -> float:
    """The |w| that SGD with L2 settles at, while the gradient at unit length stays as long as it is now.

    Args:
        lr, weight_decay, momentum: of SGD; the decay is positive.
        length: |w|.
        gradient: |g|, at that length.
    """
    return (lr * (gradient * length) ** 2 / (2 * weight_decay * (1 - momentum))) ** 0.25


def rescaled_sgd(factor: float, lr: float, weight_decay: float) -> tuple[float, float]:
    """Learning rate and L2 with which SGD trains factor * w as it trains w with these, if w is scale-free."""
    return factor**2 * lr, weight_decay / factor**2


def angles(before: Tensor, after: Tensor) -> Tensor:
    """Angle (rows,) in radians between the rows of two matrices; 0 where one of them is 0."""
    a, b = (F.normalize(rows.double(), dim=1) for rows in (before, after))
    # Of half angles: the arccos of a number next to one keeps no digits.
    either = (a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)
    return torch.where(either, 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)), 0.0)


@dataclass(frozen=True)
class ElrFinding:
    """What was found.

    Attributes:
        table: a row for each weight that the optimizer trains, of two dimensions or more: `name`; `scale_free` ("rows":
            every row by itself, as before a batch norm; "whole": the weight as a whole, as before a layer norm; "no");
            `length` |w| and `gradient` |g| (the median over rows, for "rows"); `elr` the effective learning rate,
            `settled_angle` and `settled_length`, None where they do not apply; `angle` of the next step, in radians.
        cost: what it took.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]

    def plot(self) -> str:
        """The angle of the next step for each weight, and where it settles as a line across its bar, in SVG."""
        longest = max((max(row["angle"], row["settled_angle"] or 0.0) for row in self.table), default=0.0) or 1.0
        parts = []
        for i, row in enumerate(self.table):
            top, length = 24 * i, 300 * row["angle"] / longest
            fill = "#bbb" if row["scale_free"] == "no" else "#3b6ea5"
            label = f"{row['name']}: {row['angle']:.3g} rad, scale-free: {row['scale_free']}"
            parts.append(f'<text x="0" y="{top + 10}" font-size="10">{escape(label)}</text>')
            parts.append(f'<rect x="0" y="{top + 13}" width="{length:.1f}" height="8" fill="{fill}"/>')
            if row["settled_angle"] is not None:
                at = 300 * row["settled_angle"] / longest
                parts.append(f'<path d="M{at:.1f} {top + 11}v12" stroke="#c2410c" stroke-width="2"/>')
        size = f'width="320" height="{24 * len(self.table)}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a classifier on (inputs, classes)."""
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)


class ElrProbe:
    """The probe: looks at one batch, and at the step that the optimizer would take on it.

    Args:
        optimizer: of the model, as it stands in the training, its momentum included; or a callable that makes one from
            parameters.
        loss: of a model on a batch, as a task's; the cross-entropy of a classifier by default.
        power: how the effective learning rate falls with |w|, for optimizers that are neither SGD nor Adam's kin:
            lr / |w|^power.
        tolerance: see `scale_free_weights`.
    """

    reads = "batch"

    @classmethod
    def from_options(cls, lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 5e-4) -> ElrProbe:
        """For SGD with these options, where there is no training to take the optimizer from."""
        return cls(lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay))

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | MakeOptimizer,
        loss: Loss = cross_entropy,
        *,
        power: int | None = None,
        tolerance: float = TOLERANCE,
    ):
        self.optimizer, self.loss, self.power, self.tolerance = optimizer, loss, power, tolerance

    def __call__(self, model: nn.Module, batch: Any) -> ElrFinding:
        """What it finds.

        Raises:
            BadInput: the optimizer is of another model or of a kind whose `power` is not known, trains no weight of two
                dimensions or more, or the loss does not call the model.
        """
        began = time.perf_counter()
        model, optimizer = self._copies(model)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        names = {name: p for name, p in model.named_parameters() if p.ndim > 1 and id(p) in group_of}
        if not names:
            raise BadInput("elr_probe: the optimizer trains no weight of two dimensions or more")
        power = self._power(optimizer)
        with torch.random.fork_rng(devices=[]):
            looked = _Look(model, batch, self.loss)
            kinds = {name: looked.scale_free(name, self.tolerance) for name in names}
            looked.restore()
            optimizer.zero_grad()
            with torch.enable_grad():
                self.loss(model, batch).backward()
        before = {name: p.detach().clone() for name, p in names.items()}
        optimizer.step()
        table = [
            _row(name, kinds[name], _rows(model, name, before[name]), model, group_of[id(p)], optimizer, power)
            for name, p in names.items()
        ]
        passes = {"forward passes": looked.passes + 1, "backward passes": 1, "copies of the model": 1}
        return ElrFinding(table, passes | {"seconds": time.perf_counter() - began})

    def _copies(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            model = copy.deepcopy(model).train()
            return model, self.optimizer(model.parameters())
        held = {id(p) for p in model.parameters()}
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            if id(p) not in held:
                raise BadInput(
                    f"elr_probe: the optimizer has a parameter of shape {tuple(p.shape)} that the model has not"
                )
        # Both in one call, so that the copied optimizer holds the copied parameters; its hooks are not copied.
        model, optimizer = copy.deepcopy((model, self.optimizer))
        return model.train(), optimizer

    def _power(self, optimizer: torch.optim.Optimizer) -> int:
        if self.power is not None:
            return self.power
        if isinstance(optimizer, torch.optim.SGD):
            return 2
        if isinstance(optimizer, SCALE_BLIND):
            return 1
        raise BadInput(
            f"elr_probe: how a step of {type(optimizer).__name__} depends on the gradient's length is not known: give "
            "power=2 where it is proportional to it, power=1 where it is independent of it"
        )


def scale_free_weights(
    model: nn.Module, batch: Any, loss: Loss = cross_entropy, *, tolerance: float = TOLERANCE
) -> dict[str, str]:
    """Which weights of two dimensions or more can be scaled without changing outputs: name -> "rows", "whole", "no".

    It is tried: every second row is doubled, then the whole weight, in training mode, with the same random numbers.

    Args:
        model: left as it is.
        batch: what `loss` takes.
        loss: of a model on a batch; what the model returns inside it is compared.
        tolerance: the largest change, relative to the outputs' spread, that the eps of a norm may make.

    Raises:
        BadInput: the loss does not call the model.
    """
    with torch.random.fork_rng(devices=[]):
        looked = _Look(copy.deepcopy(model).train(), batch, loss)
        names = [name for name, p in looked.model.named_parameters() if p.ndim > 1]
        return {name: looked.scale_free(name, tolerance) for name in names}


class _Look:
    """A copy of a model that can be run again and again from the same state."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss):
        self.model, self.batch, self.loss = model, batch, loss
        self.passes = 0
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._before = self._outputs()

    @torch.no_grad()
    def scale_free(self, name: str, tolerance: float) -> str:
        p = self.model.get_parameter(name)
        held = p.clone()
        spread = self._before.std(correction=0) if self._before.numel() > 1 else self._before.abs().max()
        found = "no"
        for kind, step in (("rows", 2), ("whole", 1)):
            _rows(self.model, name, p, write=lambda rows, step=step: rows[::step].mul_(2))
            change = (self._outputs() - self._before).abs().max()
            p.copy_(held)
            if change <= tolerance * spread:
                found = kind
                break
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Buffers as they were, and the random numbers of every pass."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._buffers[name])
        torch.manual_seed(0)

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        self.restore()
        kept: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, args, output: kept.append(output))
        self.loss(self.model, self.batch)
        handle.remove()
        self.passes += len(kept)
        found = [t.double().flatten() for output in kept for t in _tensors(output) if t.is_floating_point()]
        if not found:
            raise BadInput("elr_probe: the loss does not call the model, or the model returns no floating-point tensor")
        return torch.cat(found)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _rows(model: nn.Module, name: str, weight: Tensor, write: Callable[[Tensor], Any] | None = None) -> Tensor:
    """The rows (outputs, entries) of a parameter's value; `write` changes them in the value itself."""
    owner = model.get_submodule(name.rpartition(".")[0])
    matrix = isinstance(owner, MATRIX_LAYERS) and name.rpartition(".")[2] == "weight"
    rows = rows_of(owner, weight) if matrix else weight.flatten(1)
    if write is not None:
        # Rows may be a copy (transposed convolutions): places say where each entry of a row lies in the weight.
        places = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
        rows = rows.clone()
        write(rows)
        flat = torch.empty_like(weight).flatten()
        flat[(rows_of(owner, places) if matrix else places).flatten()] = rows.flatten()
        weight.copy_(flat.view(weight.shape))
    return rows


def _row(
    name: str,
    kind: str,
    before: Tensor,
    model: nn.Module,
    group: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    power: int,
) -> dict[str, Any]:
    p = model.get_parameter(name)
    after, grad = _rows(model, name, p.detach()), p.grad
    gradient = torch.zeros_like(before) if grad is None else _rows(model, name, grad)
    if kind != "rows":
        before, after, gradient = (rows.reshape(1, -1) for rows in (before, after, gradient))
    length, strength = (float(rows.double().norm(dim=1).median()) for rows in (before, gradient))
    lr, momentum, decay = float(group["lr"]), _momentum(group), float(group.get("weight_decay", 0.0))
    row: dict[str, Any] = {"name": name, "scale_free": kind, "length": length, "gradient": strength}
    row |= {"elr": None, "angle": float(angles(before, after).median()), "settled_angle": None, "settled_length": None}
    if kind == "no":
        return row
    if momentum:
        lr *= 1 - group.get("dampening", 0.0)
    # SGD's momentum adds gradients up; the moments of Adam's kin average them.
    row["elr"] = effective_lr(lr, length, power, 0.0 if "betas" in group else momentum)
    if isinstance(optimizer, torch.optim.SGD) and decay > 0 and not group["nesterov"]:
        row["settled_angle"] = settled_angle(lr, decay, momentum)
        row["settled_length"] = settled_length(lr, decay, length, strength, momentum)
    elif group.get("decoupled_weight_decay") and decay > 0:
        row["settled_angle"] = settled_angle(lr, decay, momentum, adamw=True)
    return row


def _momentum(group: Mapping[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


CARD = Card(
    id="elr_probe",
    title="L2 Regularization versus Batch and Weight Normalization",
    authors="van Laarhoven",
    year=2017,
    source="arXiv 1706.05350",
    family="weight",
    summary="Finds the weights that a normalization makes scale-free, and shows their effective learning rate, how far "
    "a step turns them, and where weight decay makes that settle.",
    objects={"ElrProbe": "Probe"},
    use="To choose learning rate and weight decay together, and to see whether a training has quietly stopped.",
    avoid="Networks without normalization, where it says nothing.",
    composes=("nap", "weight_standardization", "norm_loss"),
    claim={
        "text": "Under batch normalization L2 acts through the effective learning rate alone: a quarter of the L2 "
        "leads to the same network if lengths and learning rate follow, closer by a factor of more than ten than if "
        "they do not.",
        "metric": "log10 distance of the outputs",
        "direction": "lower",
        "margin": 1.0,
        "arms": ("less_l2", "less_l2_rescaled"),
        "seeds": 5,
        "minutes": 4,
        "task": "digits",
    },
)
