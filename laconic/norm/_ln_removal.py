"""`ln_removal`: a transformer is trained to do without its layer norms, one after the other, until none is left.

While training goes on, each norm y = g (x - mean(x)) / s + b is *real* first, s = sqrt(var(x) + eps) of its own vector, and
becomes *fake* at its step of a schedule: s is a constant then, the running average that was kept while it was real,

    a <- m a + (1 - m) mean over examples and positions 1.. of s            a_0 likewise for position 0, whose s is far larger

frozen at the switch; s is the vector [a_0, a, a, ...] over positions. In the end the exception of position 0 goes too,
s_0 <- a, and s is one number. A loss beside the task's keeps deviations alike: w mean over all positions of
(std(x) - t)^2 for the input x of the last norm, t the mean std over positions that are neither first nor end-of-text,
without gradient, w = 0.1. Then nothing depends on x any more, and `fold` takes the norms away:

    writers <- C writers, C = I - 11^T / d        readers W <- W diag(g) / s,  b <- b + W beta

Source: "Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the Implications for
Mechanistic Interpretability", Baroni, Khara, Schaeffer, Subkhankulov, Heimersheim, 2025, arXiv 2507.02559. Official code:
submarat/removing-layer-norm; its page says MIT, and it has no licence file. There the norm before attention is switched
for queries and keys first and for values later, with an exception for end-of-text tokens in between: `LayerNormRemover`
switches it as a whole, and `FakeLayerNorm` has that path (`std_type="bos"`) for who builds it. There, too, the result is a
layer norm with eps 1e12 and gain 1e6 g / s, which loses digits in bfloat16: `fold` really removes it.

The averages keep moving in fake mode, as released; what divides is frozen. They never move in evaluation mode. Use it where
norms stand in the way: analysis of what a model computes, hardware without reductions. Steps must be small (a norm every
few optimizer steps, the last one last): switched together, the model is lost. Pre-LN models only. Take `pre_rmsnorm` where
the model must compute exactly the same.

Example:
    >>> import torch
    >>> norm = FakeLayerNorm(4, n_ctx=3, init_average_std=2.0)
    >>> _ = norm.remove_bos_exception()
    >>> _ = norm.make_fake()
    >>> norm.eval()(torch.tensor([[[4.0, 0.0, 0.0, 0.0]]])).tolist()
    [[[1.5, -0.5, -0.5, -0.5]]]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.hooks import Hook, Run
from laconic.core.modes import evaluating
from laconic.core.record import Record, apply_records
from laconic.core.renorm import refusal, solve, ties_in_the_way, untie
from laconic.core.statistics import widened
from laconic.core.structure import Example, Structure
from laconic.errors import BadInput

__all__ = ["FakeLayerNorm", "LayerNormRemover", "RemovalSchedule", "deviation", "std_loss"]

STD_TYPES = ("avg", "bos")


def deviation(x: Tensor, eps: float = 1e-5) -> Tensor:
    """sqrt(var + eps) over the last axis, the variance divided by d; float16 and bfloat16 are computed in float32."""
    wide = widened(x)
    return (wide.var(-1, correction=0) + eps).sqrt()


def std_loss(
    hidden: Tensor, ids: Tensor | None = None, *, eos_id: int | None = None, weight: float = 0.1, eps: float = 1e-5
) -> Tensor:
    """w mean (std - t)^2 over all positions.

    Args:
        hidden: (N, T, d), what the last norm reads.
        ids: (N, T) tokens, where end-of-text ones are to be left out of t.
        eos_id: that token.
        weight: w.
        eps: added to the variance.

    Raises:
        ValueError: a single position, or nothing but first and end-of-text ones: t is the mean over none.
    """
    std = deviation(hidden, eps)
    counted = torch.ones_like(std, dtype=torch.bool)
    counted[:, 0] = False
    if ids is not None and eos_id is not None:
        counted &= ids != eos_id
    if not counted.any():
        raise ValueError(
            f"ln_removal: no position of {tuple(std.shape)} is neither first nor end-of-text: none has a target"
        )
    target = std.detach()[counted].mean()
    return weight * (std - target).square().mean()


class FakeLayerNorm(nn.Module):
    """A layer norm over the last axis that can be frozen to division by a constant: (N, T, d) -> (N, T, d).

    Args:
        normalized_shape: d.
        n_ctx: the most positions that there may be.
        eps: added to the variance.
        init_average_std, init_bos_std: first values of the averages.
        momentum: m; with `grad_acc_steps` k, m^(1/k) in each call.
        bos_special_treatment: whether position 0 has a constant of its own.
        correct_bos: whether it is that of position 0; otherwise all positions divide by the average.
        recompute_std_on_real, recompute_std_on_fake: whether the constants follow the averages in real and in fake mode.
        non_bos_average_std: whether the average leaves position 0 out, while that is treated apart.
        grad_acc_steps: calls to an optimizer step.
        device, dtype: of gain and bias.

    Attributes:
        is_fake: whether it divides by a constant.
        bos_special_treatment: whether position 0 divides by another one.

    Raises:
        ValueError: the momentum is not in [0, 1], or a count is below 1.
    """

    average_std: Tensor
    bos_std: Tensor
    real_average_std: Tensor
    real_bos_std: Tensor
    flags: Tensor

    def __init__(
        self, normalized_shape: int, n_ctx: int, eps: float = 1e-5, *, init_average_std: float = 1.0,
        init_bos_std: float | None = None, momentum: float = 0.9, bos_special_treatment: bool = True, correct_bos: bool = True,
        recompute_std_on_real: bool = True, recompute_std_on_fake: bool = False, non_bos_average_std: bool = True,
        grad_acc_steps: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"ln_removal: the momentum is {momentum}: it must be in [0, 1]")
        if normalized_shape < 1 or n_ctx < 1 or grad_acc_steps < 1:
            raise ValueError(
                f"ln_removal: normalized_shape={normalized_shape}, n_ctx={n_ctx}, grad_acc_steps={grad_acc_steps}: "
                "each is 1 or more"
            )
        self.normalized_shape, self.n_ctx, self.eps = (normalized_shape,), n_ctx, eps
        self.momentum, self.grad_acc_steps, self.correct_bos = momentum, grad_acc_steps, correct_bos
        self.recompute_std_on_real, self.recompute_std_on_fake = recompute_std_on_real, recompute_std_on_fake
        self.non_bos_average_std = non_bos_average_std
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(normalized_shape, **options))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(normalized_shape, **options))
        first = init_average_std if init_bos_std is None else init_bos_std
        self.register_buffer("real_average_std", torch.tensor(float(init_average_std), device=device))
        self.register_buffer("real_bos_std", torch.tensor(float(first), device=device))
        self.register_buffer("average_std", torch.full((n_ctx,), float(init_average_std), device=device))
        self.register_buffer("bos_std", torch.full((n_ctx,), float(first), device=device))
        # Whether it is fake, and whether position 0 is treated apart: saved with the model.
        self.is_fake, self.bos_special_treatment = False, bos_special_treatment
        self.register_buffer("flags", torch.tensor([False, bos_special_treatment], device=device))
        if bos_special_treatment and correct_bos:
            self.average_std[0] = first

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_fake, self.bos_special_treatment = self.flags.tolist()

    def make_fake(self) -> FakeLayerNorm:
        """Divide by the constants from now on."""
        self.is_fake = self.flags[0] = True
        return self

    def remove_eot_exception(self) -> FakeLayerNorm:
        """Let what divides end-of-text tokens be what divides all others."""
        self.bos_std.copy_(self.average_std)
        return self

    def remove_bos_exception(self) -> FakeLayerNorm:
        """Let position 0 divide by what the others divide by; the averages go over all positions then."""
        for buffer in (self.average_std, self.bos_std):
            if self.n_ctx > 1:
                buffer[0] = buffer[1]
        self.bos_special_treatment = self.flags[1] = False
        return self

    def forward(self, x: Tensor, std_type: str = "avg") -> Tensor:
        """y.

        Args:
            x: (N, T, d).
            std_type: "avg", or "bos" to divide every position as end-of-text tokens are.

        Raises:
            ValueError: another shape, more than `n_ctx` positions, or another `std_type`.
        """
        if x.ndim < 2 or x.shape[-1] != self.normalized_shape[0] or not 1 <= x.shape[-2] <= self.n_ctx:
            want = f"(..., T, {self.normalized_shape[0]}) with T of 1 to {self.n_ctx}"
            raise ValueError(f"ln_removal: an input of shape {want} is wanted, not {tuple(x.shape)}")
        if std_type not in STD_TYPES:
            raise ValueError(f"ln_removal: std_type is {std_type!r}: it must be one of {', '.join(STD_TYPES)}")
        if self.training:
            self._follow(x.detach())
        if not self.is_fake:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        held = self.average_std if std_type == "avg" else self.bos_std
        wide = widened(x)
        y = (wide - wide.mean(-1, keepdim=True)) / held[: x.shape[-2], None].to(wide.dtype)
        y = y * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _follow(self, x: Tensor) -> None:
        """Move the averages towards this batch, and the constants with them where they are not frozen."""
        std = deviation(x, self.eps)
        keep = self.momentum ** (1 / self.grad_acc_steps)
        apart = self.bos_special_treatment
        rest = std[..., 1:] if apart and self.non_bos_average_std else std
        if rest.numel():  # a batch of single positions says nothing of the others
            self.real_average_std.lerp_(rest.mean().to(self.real_average_std), 1 - keep)
        first = std[..., 0] if apart else std
        self.real_bos_std.lerp_(first.mean().to(self.real_bos_std), 1 - keep)
        if self.recompute_std_on_fake if self.is_fake else self.recompute_std_on_real:
            self.average_std.fill_(self.real_average_std)
            self.bos_std.fill_(self.real_bos_std if apart else self.real_average_std)
            if apart and self.correct_bos:
                self.average_std[0] = self.real_bos_std

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, n_ctx={self.n_ctx}, eps={self.eps}, fake={self.is_fake}"


@dataclass(frozen=True)
class RemovalSchedule:
    """When which norm becomes fake, in optimizer steps; the defaults are those for GPT-2 small.

    First the norms before perceptrons, layer by layer, then those before attention, then the last one; then the exception
    of the first position goes.

    Attributes:
        start: step of the first one.
        gap_mlp, gap_attention: steps from one norm to the next.
        gap_last: steps to wait before the last norm.
        gap_bos: steps between the last norm and the end of the exception.
    """

    start: int = 20
    gap_mlp: int = 2
    gap_attention: int = 5
    gap_last: int = 2
    gap_bos: int = 12

    def __post_init__(self) -> None:
        if min(self.start, self.gap_mlp, self.gap_attention, self.gap_last, self.gap_bos) < 0:
            raise BadInput(f"{self}: a number of steps is not negative")

    def steps(self, norms: tuple[str, ...]) -> tuple[dict[str, int], int]:
        """Step of each norm, given in the order of the forward pass, and that of the end of the exception."""
        *inner, last = norms
        found: dict[str, int] = {}
        at = self.start
        for path in inner[1::2]:
            found[path] = at
            at += self.gap_mlp
        for path in inner[0::2]:
            found[path] = at
            at += self.gap_attention
        found[last] = at + self.gap_last
        return found, found[last] + self.gap_bos


class LayerNormRemover(Hook):
    """Hook of `fit` that removes the layer norms of a Pre-LN model while it trains; `fold` when it is done.

    Making one puts `FakeLayerNorm`s into the model. In a loop of one's own, call `step` with the number of optimizer steps
    taken, and add `aux_loss` to the loss. What it must remember lies in the model's buffers and its `state_dict`.

    Args:
        model: a Pre-LN model with `nn.LayerNorm`s.
        schedule: when; in steps of the optimizer.
        n_ctx: the most positions of an input; by default the model's `config.n_positions` or `max_position_embeddings`.
        example: (args, kwargs) of one forward call; models of transformers bring one of their own.
        momentum: m.
        aux_weight: w; 0 leaves that loss away.
        bos: "exempt" treats the first position apart until the end, "same" never.
        eos_id: token that is left out of the target, where `aux_loss` is given ids.

    Raises:
        BadInput: the norms do not read a stream of their own (the message names the first, and why), or no `n_ctx` is known.
    """

    def __init__(
        self, model: nn.Module, schedule: RemovalSchedule | None = None, *, n_ctx: int | None = None,
        example: Example | None = None, momentum: float = 0.9, aux_weight: float = 0.1, bos: str = "exempt",
        eos_id: int | None = None,
    ):  # fmt: skip
        if bos not in ("exempt", "same"):
            raise BadInput(f'ln_removal: bos is {bos!r}: it is "exempt" or "same"')
        self.example = _example(model) if example is None else example
        structure = Structure.build(model, self.example)
        reason = next((f"{s.norms[0]}: {s.reason}" for s in structure.streams if s.reason), "")
        if reason or not structure.streams:
            why = reason or "no layer norm was found"
            raise BadInput(f"the layer norms of {type(model).__name__} cannot be removed: {why}")
        self.model, self.schedule = model, schedule or RemovalSchedule()
        self.aux_weight, self.eos_id, self.taken = aux_weight, eos_id, 0
        self.norms = tuple(path for stream in structure.streams for path in stream.norms)
        self.at, self.bos_at = self.schedule.steps(self.norms)
        positions = _positions(model) if n_ctx is None else n_ctx
        for path in self.norms:
            model.set_submodule(path, _fake(model.get_submodule(path), path, positions, momentum, bos == "exempt"))
        self._hidden: Tensor | None = None
        self._handle = model.get_submodule(self.norms[-1]).register_forward_pre_hook(self._note)

    @property
    def done(self) -> bool:
        """Whether every norm is a constant."""
        return all(norm.is_fake and not norm.bos_special_treatment for norm in self._fakes().values())

    def step(self, run: Run | int) -> None:
        """Switch what is due after so many optimizer steps."""
        self.taken = run if isinstance(run, int) else run.clock.step
        for path, norm in self._fakes().items():
            if self.taken >= self.at[path] and not norm.is_fake:
                norm.make_fake()
            if self.taken >= self.bos_at and norm.bos_special_treatment:
                norm.remove_eot_exception().remove_bos_exception()

    def loss(self, run: Run, loss: Tensor, batch: Any, output: Any) -> Tensor:
        """The task's loss and the auxiliary one."""
        return loss if not self.aux_weight or self._hidden is None else loss + self.aux_loss(self._hidden)

    def aux_loss(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """`std_loss` of what the last norm reads."""
        return std_loss(hidden, ids, eos_id=self.eos_id, weight=self.aux_weight)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = int(state["taken"])

    def fold(self) -> list[Record]:
        """Take the norms away, in place: the model computes the same, and has no norm any more.

        A head that is tied to the embeddings is untied. A norm whose output the model returns leaves a product by channel.

        Returns:
            The changes, for an artifact.

        Raises:
            BadInput: a norm is real still, or has its exception: says at which step it may.
        """
        if not self.done:
            real = [path for path, norm in self._fakes().items() if not norm.is_fake]
            what = f"{len(real)} of {len(self.norms)} norms are real still, {real[0]} for one" if real else (
                "the first position is treated apart still"
            )  # fmt: skip
            raise BadInput(
                f"folding while the schedule is running: {what}, after step {self.taken}; it may after step {self.bos_at}"
            )
        self._handle.remove()
        self._hidden = None
        scales = {}
        for path, fake in self._fakes().items():
            scales[path] = float(fake.average_std[-1])
            self.model.set_submodule(path, _real(fake))
        with evaluating(self.model):
            structure = Structure.build(self.model, self.example)
            records = [untie(name, names) for name, names in ties_in_the_way(structure).items()]
            apply_records(self.model, records)
            structure = Structure.build(self.model, self.example) if records else structure
            for stream in structure.streams:
                if reason := refusal(structure, self.model, stream):
                    raise BadInput(f"{stream.norms[0]} cannot be folded: {reason}")
                record = solve(structure, self.model, stream, "none", scales=scales, method="ln_removal")
                apply_records(self.model, [record])
                records.append(record)
        return records

    def _fakes(self) -> dict[str, FakeLayerNorm]:
        found = {path: self.model.get_submodule(path) for path in self.norms}
        gone = [path for path, module in found.items() if not isinstance(module, FakeLayerNorm)]
        if gone:
            raise BadInput(f"{gone[0]} is no FakeLayerNorm any more: the model was folded, or its norm exchanged")
        return found  # type: ignore[return-value]

    def _note(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        # The gradient flows through it; nothing is kept outside of training, where it would hold the graph.
        self._hidden = given[0] if module.training and torch.is_grad_enabled() else None


def _fake(norm: Any, path: str, n_ctx: int, momentum: float, apart: bool) -> FakeLayerNorm:
    if norm.weight is None:
        raise BadInput(f"{path} has no gain: ln_removal wants layer norms with one")
    like = norm.weight
    made = FakeLayerNorm(
        norm.normalized_shape[-1], n_ctx, norm.eps, momentum=momentum, bos_special_treatment=apart, device=like.device,
        dtype=like.dtype,
    )  # fmt: skip
    made.weight, made.bias = norm.weight, norm.bias
    return made.train(norm.training)


def _real(fake: FakeLayerNorm) -> nn.LayerNorm:
    made = nn.LayerNorm(fake.normalized_shape, fake.eps, bias=fake.bias is not None)
    made.weight = fake.weight
    if fake.bias is not None:
        made.bias = fake.bias
    return made.train(fake.training)


def _positions(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for name in ("n_positions", "max_position_embeddings"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise BadInput(f"ln_removal: how many positions {type(model).__name__} may see is not known: give n_ctx")


def _example(model: nn.Module) -> Example:
    config = getattr(model, "config", None)
    if getattr(config, "vocab_size", None):
        return (), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    raise BadInput(f"{type(model).__name__} brings no example of a call: pass example=(args, kwargs)")


CARD = Card(
    id="ln_removal",
    title="Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the Implications "
    "for Mechanistic Interpretability",
    authors="Baroni, Khara, Schaeffer, Subkhankulov, Heimersheim",
    year=2025,
    source="arXiv 2507.02559",
    family="norm",
    summary="Trains a transformer to do without its layer norms, one after the other, and folds what is left into its linear "
    "layers.",
    objects={"FakeLayerNorm": "Layer"},
    traits={"FakeLayerNorm": ("gradient:exact", "batch_independent_eval")},
    use="Pre-LN language models that are to be analysed, or to run where a norm is dear, when some training can be afforded.",
    avoid="Where the model must compute exactly the same: pre_rmsnorm; Post-LN models.",
    composes=("pre_rmsnorm",),
    vectors=("ln_removal",),
    code="github.com/submarat/removing-layer-norm, MIT by its page, no licence file",
    claim={
        "text": "A norm-free transformer that lost its norms one by one while it was trained predicts better than one that "
        "lost them all at once, untrained: by more than one nat, 1.44 bits, per character.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 1.44,
        "arms": ("at_once", "scheduled"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
