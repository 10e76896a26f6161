"""Reconstruction: a quantized layer or block is trained to give what the float one gives, on calibration inputs.

    min over theta of  mean over inputs x of  loss(f^(x~; theta), f(x)) + penalty(theta, step)

f is a unit (a layer or a block) of the float model, the *teacher*; f^ is the same unit of its twin, the *student*, whose
weights are rounded. theta is whatever is to be learned: weights before rounding, rounding variables, scales, zero points,
biases, gains of norms, codebooks. It is given in groups, each with a learning rate (and a cosine to 0, where wanted).

Inputs are float, x~ = x (units are independent of each other: "parallel"), or those that the rounded units before give
(x~ of the student: "sequential"), or a mixture of both, element by element. Targets are what the float unit gave in the
float model, or what it gives on the student's own inputs.

- `Twins` walks teacher and student side by side, unit by unit: along a chain of blocks activations are carried, elsewhere
  the model runs from its start to the unit.
- `reconstruct` is the training. With `keep_better` it ends with the best of what it
  looked at on the way, on all inputs that it was given, and so never worse than it began.
- `output_loss` and `channel_loss` compare outputs, `linear_decay` is a temperature's schedule.
- What learns rounds softly while it trains, so it is told when: modules named as `learned` are in training mode during
  steps, and everything else stays in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from .calls import call, capture, first_output, has_tensor

__all__ = [
    "Calls", "Group", "Reconstructed", "Twins", "channel_loss", "linear_decay", "output_loss", "reconstruct",
]  # fmt: skip

Inputs = Literal["float", "student", "both"]
Targets = Literal["float", "same_input"]
Loss = Callable[[Tensor, Tensor], Tensor]
ROWS = 256  # rows of a forward outside training
LOOKS = 8  # at the loss on all inputs, during a training


# --- what is compared -------------------------------------------------------------------------------


def output_loss(
    output: Tensor,
    target: Tensor,
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    summed_dim: int | None = None,
) -> Tensor:
    """Mean of |act(output) - act(target)|^2 over all elements, or over all but one dimension, which is summed.

    Args:
        output: of the rounded unit.
        target: of the float unit, of the same shape.
        activation: what the next module makes of it: what a ReLU cuts off need not be right.
        summed_dim: 1 for the channels of pictures.
    """
    if activation is not None:
        output, target = activation(output), activation(target)
    off = (output - target).square()
    return off.mean() if summed_dim is None else off.sum(summed_dim).mean()


def channel_loss(
    target: Tensor,
    output: Tensor,
    *,
    token_dim: int | Sequence[int] = -2,
    channel_dim: int = -1,
    statistics: Sequence[str] = ("mean", "variance"),
    unbiased: bool = True,
    distance: str = "abs",
    divide_by: str | None = "channels",
    reduction: str = "sum",
) -> Tensor:
    """(1/C) sum over channels of |mean_f - mean_q| + |var_f - var_q|, statistics taken over tokens.

    Args:
        target: what the float unit gave.
        output: of the rounded unit, of the same shape.
        token_dim: the axis, or axes, that statistics are taken over.
        channel_dim: the axis of the channels, C long.
        statistics: any of "mean", "variance" and "std".
        unbiased: divide sums of squares by n - 1.
        distance: "abs", or "square".
        divide_by: "channels" for 1/C, None for the plain sum.
        reduction: "sum" or "mean" over what axes are left, those of the batch.

    Raises:
        ValueError: another statistic, distance or reduction, or a single token, of which an unbiased variance is none.
    """
    known = {"mean", "variance", "std"}
    if not statistics or set(statistics) - known or distance not in ("abs", "square"):
        raise ValueError(
            f"channel_loss: statistics {tuple(statistics)} and distance {distance!r}: there are "
            f"{', '.join(sorted(known))}, and abs and square"
        )
    if reduction not in ("sum", "mean") or divide_by not in ("channels", None):
        raise ValueError(
            f"channel_loss: reduction {reduction!r} is sum or mean, divide_by {divide_by!r} channels or None"
        )
    dims = (token_dim,) if isinstance(token_dim, int) else tuple(token_dim)
    axes = tuple(d % output.ndim for d in dims)
    count = 1
    for axis in axes:
        count *= output.shape[axis]
    if unbiased and count < 2 and set(statistics) != {"mean"}:
        raise ValueError("channel_loss: of a single token there is no variance: give two tokens or more")
    terms = []
    for name in statistics:
        f, q = (_statistic(x, name, axes, unbiased) for x in (target, output))
        terms.append((f - q).abs() if distance == "abs" else (f - q).square())
    total = torch.stack(terms).sum(0)  # (..., C, ...), pooled axes of size 1
    loss = total.sum() if reduction == "sum" else total.sum(channel_dim % output.ndim).mean()
    return loss / output.shape[channel_dim] if divide_by == "channels" else loss


def _statistic(x: Tensor, name: str, axes: tuple[int, ...], unbiased: bool) -> Tensor:
    if name == "mean":
        return x.mean(axes, keepdim=True)
    variance = x.var(axes, correction=int(unbiased), keepdim=True)
    return variance if name == "variance" else variance.sqrt()


def linear_decay(step: int, total: int, *, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """A temperature: `start` for the first part `warmup` of all steps, then linearly to `end` at the last.

    >>> [linear_decay(step, 100) for step in (0, 20, 60, 100)]
    [20.0, 20.0, 11.0, 2.0]
    """
    begin = warmup * total
    if step < begin or total <= begin:
        return float(start)
    return end + (start - end) * max(0.0, 1 - (step - begin) / (total - begin))


# --- what a unit is called with ---------------------------------------------------------------------


@dataclass
class Calls:
    """The calls of one unit on calibration data; each is a batch.

    Attributes:
        path: of the unit.
        inputs: first argument of each call, as training shall see it.
        targets: what the rounded unit shall give.
        rest: further arguments of each call: (args, kwargs).
        floats: first argument in the float model, where `inputs` are the student's and both are wanted.
    """

    path: str
    inputs: list[Tensor]
    targets: list[Tensor]
    rest: list[tuple[tuple, dict]]
    floats: list[Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.inputs or any(not x.numel() for x in self.inputs):
            raise BadInput(f"{self.path}: there are no calibration inputs: give at least one batch that is not empty")
        for what, values in (("inputs", self.inputs), ("outputs", self.targets)):
            if not all(bool(torch.isfinite(x).all()) for x in values if x.is_floating_point()):
                raise BadInput(
                    f"{self.path}: its {what} on calibration data hold NaN or infinite values; look at the model's "
                    "weights before this module"
                )
        self._joined = not any(has_tensor(r) for r in self.rest) and len({x.shape[1:] for x in self.inputs}) == 1
        if self._joined:
            self.inputs, self.targets = [torch.cat(self.inputs)], [torch.cat(self.targets)]
            self.floats = [torch.cat(self.floats)] if self.floats is not None else None

    @property
    def rows(self) -> int:
        """Rows that are drawn from, or calls where these have tensors besides (masks), which are drawn whole."""
        return len(self.inputs[0]) if self._joined else len(self.inputs)

    def draw(self, count: int | None, mix: float = 0.0) -> tuple[Tensor, tuple[tuple, dict], Tensor]:
        """Input, further arguments and target of some rows at random, without repetition; of all for None.

        Args:
            count: rows.
            mix: the probability of an element to be that of the float model.
        """
        if not self._joined:
            at = int(torch.randint(len(self.inputs), ()))
            x, target = self.inputs[at], self.targets[at]
            other = None if self.floats is None else self.floats[at]
        else:
            at = 0
            x, target, other = self.inputs[0], self.targets[0], None if self.floats is None else self.floats[0]
            if count is not None and count < len(x):
                chosen = torch.randperm(len(x))[:count]
                x, target, other = x[chosen], target[chosen], None if other is None else other[chosen]
        if mix > 0 and other is not None:
            x = torch.where(torch.rand(x.shape) < mix, other, x)
        return x, self.rest[at], target

    def every(self) -> Iterator[tuple[Tensor, tuple[tuple, dict], Tensor]]:
        """Input, further arguments and target of all rows, in parts."""
        for x, rest, target in zip(self.inputs, self.rest, self.targets, strict=False):
            if not self._joined:
                yield x, rest, target
                continue
            for a, b in zip(x.split(ROWS), target.split(ROWS), strict=True):
                yield a, rest, b


# --- the training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What is trained together: parameters, their learning rate, and whether it stays or falls to 0 as a cosine."""

    parameters: Sequence[Tensor]
    lr: float
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True)
class Reconstructed:
    """What a training did: losses of the steps (before each), and the loss on all inputs before and after."""

    losses: list[float]
    before: float
    after: float


def reconstruct(
    unit: Callable[..., Any],
    calls: Calls,
    groups: Sequence[Group],
    *,
    steps: int,
    batch: int | None = 32,
    loss: Loss = output_loss,
    penalty: Callable[[int], Tensor | None] | None = None,
    mix: float = 0.0,
    learned: Sequence[nn.Module] = (),
    keep_better: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
) -> Reconstructed:
    """Train a rounded unit on its calls, in place, by Adam.

    Args:
        unit: the module, or any function of what it is called with.
        calls: see `Twins`.
        groups: what is trained.
        steps: of the optimizer.
        batch: rows of a step; None for all.
        loss: of output and target.
        penalty: added to the loss at a step: a regularizer, or None.
        mix: see `Calls.draw`.
        learned: modules that round softly in training mode.
        keep_better: look at the loss on all inputs, rounded as in evaluation mode, `LOOKS` times on the way, and end with
            the best, the start included. Rounding makes losses jump, so the last step is seldom the best.
        betas, eps: of Adam.
        seed: of rows, mixtures and whatever drops elements.

    Raises:
        BadInput: the loss became NaN or infinite.
    """
    if steps < 0 or (batch is not None and batch < 1):
        raise ValueError(f"reconstruct: steps={steps}, batch={batch}: no negative steps, and at least one row")
    trained = [p for group in groups for p in group.parameters]
    before = _whole(unit, calls, loss)
    best = (before, [p.detach().clone() for p in trained])
    used = [group for group in groups if group.parameters]
    optimizer = torch.optim.Adam(
        [{"params": list(group.parameters), "lr": group.lr} for group in used], betas=betas, eps=eps
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [partial(_cosine, steps) if group.schedule == "cosine" else _constant for group in used]
    )
    interval = max(1, math.ceil(steps / LOOKS))
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), _gradients(trained):
        torch.manual_seed(seed)
        for step in range(steps):
            with _training(learned):
                x, (args, kwargs), target = calls.draw(batch, mix)
                value = loss(first_output(unit(x, *args, **kwargs)), target)
                added = penalty(step) if penalty is not None else None
            value = value if added is None else value + added
            losses.append(float(value.detach()))
            if not torch.isfinite(value):
                raise BadInput(
                    f"{calls.path}: the loss of its reconstruction is {losses[-1]} at step {step}: lower the rates"
                )
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            scheduler.step()
            if keep_better and (step + 1) % interval == 0 and step + 1 < steps:
                now = _whole(unit, calls, loss)
                if now < best[0]:
                    best = (now, [p.detach().clone() for p in trained])
    for parameter in trained:
        parameter.grad = None
    after = _whole(unit, calls, loss) if steps else before
    if keep_better and not after <= best[0]:
        after = best[0]
        with torch.no_grad():
            for parameter, kept in zip(trained, best[1], strict=True):
                parameter.copy_(kept)
    return Reconstructed(losses, before, after)


def _cosine(steps: int, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _constant(step: int) -> float:
    return 1.0


@torch.no_grad()
def _whole(unit: Callable[..., Any], calls: Calls, loss: Loss) -> float:
    """The loss on all inputs: the mean over parts, by their rows."""
    total, count = 0.0, 0
    for x, (args, kwargs), target in calls.every():
        total += float(loss(first_output(unit(x, *args, **kwargs)), target)) * len(x)
        count += len(x)
    return total / max(count, 1)


@contextmanager
def _gradients(trained: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for what is trained; as it was afterwards."""
    wanted = [p.requires_grad for p in trained]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, want in zip(trained, wanted, strict=True):
            parameter.requires_grad_(want)


@contextmanager
def _training(learned: Sequence[nn.Module]) -> Iterator[None]:
    """Soft rounding; as it was afterwards."""
    modes = [module.training for module in learned]
    for module in learned:
        module.train()
    try:
        yield
    finally:
        for module, mode in zip(learned, modes, strict=True):
            module.train(mode)


# --- teacher and student ----------------------------------------------------------------------------


class Twins:
    """A float model and its twin that is being rounded, on the same data.

    Both must be in evaluation mode, and have the same units under the same paths.

    Args:
        teacher: the float model; it is not changed.
        student: its twin.
        batches: calibration data, each what `laconic.core.calls.call` takes.

    Raises:
        BadInput: no data, or a model in training mode.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: Sequence[Any]):
        if not len(batches):
            raise BadInput("reconstruction needs calibration data, and there is none: give at least one batch")
        if teacher.training or student.training:
            raise BadInput("reconstruction compares models at inference: call model.eval() first")
        self.teacher, self.student, self.batches = teacher, student, batches

    def walk(self, paths: Sequence[str], *, inputs: Inputs = "float", targets: Targets = "float") -> Iterator[Calls]:
        """The calls of every unit, in call order; what is done to a unit between two of them is seen by the later ones.

        Args:
            paths: of the units.
            inputs: of the float model, of the student, or of the student with those of the float model besides.
            targets: what the unit gave in the float model, or what the float unit gives on the student's inputs.

        Raises:
            BadInput: a unit does not run on this data.
        """
        with torch.no_grad():
            seen, outputs = capture(self.teacher, lambda: call(self.teacher, self.batches[0]), paths)
        missing = [path for path in paths if path not in seen]
        if missing:
            raise BadInput(f"{missing[0]} does not run on this data, so nothing is known of its inputs")
        ordered = list(seen)
        chained = all(
            seen[after][0] and seen[after][0][0] is first_output(outputs[before])
            for before, after in zip(ordered, ordered[1:], strict=False)
        )
        if chained and len(ordered) > 1:
            yield from self._chain(ordered, inputs, targets)
        else:
            for path in ordered:
                yield self.calls(path, inputs=inputs, targets=targets)

    @torch.no_grad()
    def calls(self, path: str, *, inputs: Inputs = "float", targets: Targets = "float") -> Calls:
        """The calls of one unit, both models running from their start to it.

        Raises:
            BadInput: it does not run on this data.
        """
        floats, students, made, rest = [], [], [], []
        for batch in self.batches:
            seen, outputs = capture(self.teacher, partial(call, self.teacher, batch), [path], last=path)
            if path not in seen:
                raise BadInput(f"{path} does not run on this data, so nothing is known of its inputs")
            x, more = _split(path, *seen[path])
            floats.append(x)
            made.append(first_output(outputs[path]))
            rest.append(more)
            if inputs != "float":
                seen, _ = capture(self.student, partial(call, self.student, batch), [path], first=path)
                students.append(_split(path, *seen[path])[0])
        return self._of(path, floats, students, made, rest, inputs, targets)

    def _chain(self, paths: list[str], inputs: Inputs, targets: Targets) -> Iterator[Calls]:
        """The calls along a chain, activations carried from unit to unit."""
        floats, students, rests = [], [], []
        with torch.no_grad():
            for batch in self.batches:
                seen, _ = capture(self.teacher, partial(call, self.teacher, batch), paths)
                floats.append(_split(paths[0], *seen[paths[0]])[0])
                rests.append({path: _split(path, *seen[path])[1] for path in paths})
                if inputs != "float":
                    run = partial(call, self.student, batch)
                    students.append(
                        _split(paths[0], *capture(self.student, run, paths, first=paths[0])[0][paths[0]])[0]
                    )
        for path in paths:
            rest = [one[path] for one in rests]
            with torch.no_grad():
                made = [_run(self.teacher, path, x, more) for x, more in zip(floats, rest, strict=True)]
            yield self._of(path, floats, students, made, rest, inputs, targets)
            floats = made
            if inputs != "float":
                with torch.no_grad():
                    students = [_run(self.student, path, x, more) for x, more in zip(students, rest, strict=True)]

    @torch.no_grad()
    def _of(
        self, path: str, floats: list[Tensor], students: list[Tensor], made: list[Tensor],
        rest: list[tuple[tuple, dict]], inputs: Inputs, targets: Targets,
    ) -> Calls:  # fmt: skip
        shown = floats if inputs == "float" else students
        if targets == "same_input" and inputs != "float":
            made = [_run(self.teacher, path, x, more) for x, more in zip(students, rest, strict=True)]
        return Calls(path, list(shown), list(made), rest, list(floats) if inputs == "both" else None)


def _split(path: str, args: tuple, kwargs: dict) -> tuple[Tensor, tuple[tuple, dict]]:
    """The first argument of a call, and the others."""
    if args and isinstance(args[0], Tensor):
        return args[0], (args[1:], kwargs)
    raise BadInput(f"{path} is not called with a tensor first, so its inputs cannot be collected")


def _run(model: nn.Module, path: str, x: Tensor, rest: tuple[tuple, dict]) -> Tensor:
    args, kwargs = rest
    return first_output(model.get_submodule(path)(x, *args, **kwargs))
