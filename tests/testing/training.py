"""Objects of the kinds Constraint, Optimizer, Schedule and Loss: sound ones, and one that breaks each promise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.testing import Example


class UnitRows:
    """Every row has norm 1."""

    @torch.no_grad()
    def project_(self, p: Tensor) -> None:
        p.div_(p.norm(dim=1, keepdim=True))

    def tangent(self, p: Tensor, x: Tensor) -> Tensor:
        return x - (x * p).sum(1, keepdim=True) * p


class ProjectsNothing(UnitRows):
    def project_(self, p):
        pass


class Shrinks(UnitRows):
    @torch.no_grad()
    def project_(self, p):
        p.mul_(0.9)


class Recorded(UnitRows):
    def project_(self, p):
        p.div_(p.norm(dim=1, keepdim=True))


class Moves(UnitRows):
    def project_(self, p):
        p.data = p.data / p.data.norm(dim=1, keepdim=True)


class ToFloat32(UnitRows):
    def project_(self, p):
        p.data = p.data.float() / p.data.float().norm(dim=1, keepdim=True)


class NoTangent(UnitRows):
    def tangent(self, p, x):
        return x


class NotLinearTangent(UnitRows):
    def tangent(self, p, x):
        return super().tangent(p, x) / 2


def unit_rows(p: Tensor) -> Tensor:
    return (p.double().norm(dim=1) - 1).abs().max() < (1e-2 if p.dtype == torch.bfloat16 else 1e-5)


def constraint(rule: type, *traits: str) -> Example:
    return Example(rule, kind="Constraint", traits=traits, holds=unit_rows)


class Momentum(torch.optim.Optimizer):
    """m <- 0.9 m + g, p <- p - lr m; the sound optimizer that the broken ones change in one place."""

    def __init__(self, params, lr: float = 0.05):
        self.validate(lr)
        super().__init__(params, {"lr": lr})

    def validate(self, lr):
        if lr < 0:
            raise ValueError(f"lr is {lr}, and must not be negative")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.groups():
            for p in group["params"]:
                self.visit(p, group)
        return loss

    def groups(self):
        return self.param_groups

    def visit(self, p, group):
        if p.grad is None:
            return
        if p.grad.is_sparse:
            raise RuntimeError("Momentum does not take sparse gradients")
        self.update(p, p.grad, group["lr"])

    def update(self, p, g, lr):
        m = self.memory(p)
        m.mul_(0.9).add_(g)
        p.sub_(lr * m)

    def memory(self, p):
        return self.state[p].setdefault("momentum", torch.zeros_like(p))


class TwiceAsFar(Momentum):
    def update(self, p, g, lr):
        super().update(p, 2 * g, lr)


class ForgetsMomentum(Momentum):
    def memory(self, p):
        self.kept = getattr(self, "kept", {})
        return self.kept.setdefault(p, torch.zeros_like(p))


class ObjectInState(Momentum):
    def memory(self, p):
        self.state[p]["when"] = object
        return super().memory(p)


class OneLearningRate(Momentum):
    def update(self, p, g, lr):
        super().update(p, g, self.defaults["lr"])


class ReadsRateOnce(Momentum):
    def update(self, p, g, lr):
        super().update(p, g, self.state[p].setdefault("lr", lr))


class FirstGroupOnly(Momentum):
    def groups(self):
        return self.param_groups[:1]


class LosesLoss(Momentum):
    def step(self, closure=None):
        super().step(closure)


class NoGradientsInClosure(Momentum):
    @torch.no_grad()
    def step(self, closure=None):
        return closure() if closure else None


class DecaysEverything(Momentum):
    def visit(self, p, group):
        p.mul_(0.9)
        super().visit(p, group)


class Widens(Momentum):
    def update(self, p, g, lr):
        p.data = p.data.float() - lr * g.float()


class Densifies(Momentum):
    def visit(self, p, group):
        if p.grad is not None:
            self.update(p, p.grad.to_dense(), group["lr"])


class Climbs(Momentum):
    def update(self, p, g, lr):
        super().update(p, -g, lr)


class DecaysGradient(Momentum):
    def update(self, p, g, lr):
        super().update(p, g.add_(p, alpha=0.1), lr)


class Normalized(Momentum):
    def update(self, p, g, lr):
        super().update(p, g / g.norm(), lr)


class AnyRate(Momentum):
    def validate(self, lr):
        pass


class Ahead(Momentum):
    """Looks at the gradient twice, as methods that need a closure do."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise ValueError("Ahead needs a closure: it computes the loss twice")
        with torch.enable_grad():
            closure()
        return super().step(closure)


def momentum(values: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """The equations of `Momentum`, one number at a time in effect."""
    for i in range(len(values)):
        m = torch.zeros_like(values[i])
        for g in gradients:
            m = 0.9 * m + g[i]
            values[i] = values[i] - 0.05 * m
    return values


def optimizer(kind: type[torch.optim.Optimizer], *traits: str, lr: float = 0.05) -> Example:
    return Example(lambda parameters: kind(parameters, lr=lr), kind="Optimizer", traits=traits, reference=momentum)


class Halves(torch.optim.lr_scheduler.LRScheduler):
    """Half the learning rate every five steps."""

    def get_lr(self):
        return [base * 0.5 ** (self.last_epoch // 5) for base in self.base_lrs]


class HalvesLate(Halves):
    def get_lr(self):
        return [base * 0.5 ** (self.last_epoch // 6) for base in self.base_lrs]


class GoesNegative(Halves):
    def get_lr(self):
        return [base * (1 - self.last_epoch / 25) for base in self.base_lrs]


class ForgetsStep(Halves):
    def load_state_dict(self, state):
        pass


class SaysAnother(Halves):
    def get_last_lr(self):
        return [2 * rate for rate in super().get_last_lr()]


def schedule(kind: type) -> Example:
    return Example(kind, kind="Schedule", reference=lambda step, base: base * 0.5 ** (step // 5))


class Squares(nn.Module):
    """(x - y)^2 / 2, refused where there is nothing to average."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; it is none, mean or sum")
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not len(x):
            raise ValueError("the batch is empty")
        return self.reduce(self.each(x, y))

    def each(self, x, y):
        return (x - y).square() / 2

    def reduce(self, each):
        return {"none": each, "mean": each.mean(), "sum": each.sum()}[self.reduction]


class NeverReduces(Squares):
    def reduce(self, each):
        return each


class NoGradient(Squares):
    def each(self, x, y):
        return super().each(x.detach(), y)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class WrongLossGradient(Squares):
    def each(self, x, y):
        return _Doubled.apply(super().each(x, y))


class OddMean(Squares):
    def reduce(self, each):
        return each.mean() / 2 if self.reduction == "mean" else super().reduce(each)


class AnyReduction(Squares):
    def __init__(self, reduction="mean"):
        super().__init__(reduction if reduction != "typo" else "mean")


class EmptyIsNan(Squares):
    def forward(self, x, y):
        return self.reduce(self.each(x, y))


class SingleIsNan(Squares):
    def each(self, x, y):
        return super().each(x, y) * (len(x) - 1) / (len(x) - 1.0 if len(x) > 1 else torch.zeros(()).to(x))


class Unbiased(Squares):
    def forward(self, x, y):
        if len(x) < 2:
            raise ValueError("two items at least")
        return super().forward(x, y)


class ChangesTarget(Squares):
    def each(self, x, y):
        return x * y.add_(1)


class LossInFloat32(Squares):
    def each(self, x, y):
        return super().each(x.float(), y.float())


class SumOfSquares(nn.Module):
    """A regulariser over a list of parameters."""

    def forward(self, parameters: list[Tensor]) -> Tensor:
        if not parameters:
            return torch.zeros(())
        return torch.stack([p.square().sum() for p in parameters]).sum()


def loss(kind: type[nn.Module], *traits: str) -> Example:
    return Example(lambda reduction="mean": kind(reduction), kind="Loss", traits=traits, inputs=[(4, 3), (4, 3)])


SOUND = [
    constraint(UnitRows, "tangent"),
    optimizer(Momentum),
    Example(
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        kind="Optimizer",
        traits=("sparse",),
        reference=momentum,
    ),
    Example(lambda parameters: Ahead(parameters), kind="Optimizer", traits=("closure",)),
    Example(lambda parameters: torch.optim.Adam(parameters, lr=0.05), kind="Optimizer"),
    schedule(Halves),
    loss(Squares),
    loss(Unbiased, "pairwise"),
    Example(SumOfSquares, kind="Loss", traits=("regulariser",), inputs=lambda g: [[torch.randn(3, 2), torch.randn(4)]]),
]

BROKEN = [
    ("check_constraint_holds_after_each_step", constraint(ProjectsNothing), "after step 1"),
    ("check_constraint_idempotent", constraint(Shrinks), "twice"),
    ("check_constraint_no_gradient", constraint(Recorded), "raised RuntimeError"),
    ("check_constraint_no_gradient", constraint(Moves), "moved"),
    ("check_constraint_dtypes", constraint(ToFloat32), "became torch.float32"),
    ("check_constraint_tangent", constraint(NoTangent, "tangent"), "drifts"),
    ("check_constraint_tangent", constraint(NotLinearTangent, "tangent"), "tangent part of a tangent"),
    ("check_optimizer_equations", optimizer(TwiceAsFar), "than the equations"),
    ("check_optimizer_resumes", optimizer(ForgetsMomentum), "goes another way"),
    ("check_optimizer_resumes", optimizer(ObjectInState), "without pickle"),
    ("check_optimizer_groups", optimizer(OneLearningRate), "lr 0 moved"),
    ("check_optimizer_groups", optimizer(ReadsRateOnce), "is not read"),
    ("check_optimizer_adds_group", optimizer(FirstGroupOnly), "added later"),
    ("check_optimizer_closure", optimizer(LosesLoss), "does not return the loss"),
    ("check_optimizer_closure", optimizer(NoGradientsInClosure), "without gradients"),
    ("check_optimizer_skips_missing_gradient", optimizer(DecaysEverything), "without gradient moved"),
    ("check_optimizer_dtypes", optimizer(Widens), "became torch.float32"),
    ("check_optimizer_sparse", optimizer(Densifies), "without a word"),
    ("check_optimizer_converges", optimizer(Climbs), "the loss went from"),
    ("check_optimizer_keeps_gradients", optimizer(DecaysGradient), "changed the gradients"),
    ("check_optimizer_zero_gradient", optimizer(Normalized), "not finite"),
    ("check_optimizer_refuses_negative_lr", optimizer(AnyRate), "without a word"),
    ("check_optimizer_needs_closure", optimizer(Momentum, "closure"), "does not need the trait"),
    ("check_schedule_values", schedule(HalvesLate), "step 5"),
    ("check_schedule_finite", schedule(GoesNegative), "the learning rates are"),
    ("check_schedule_resumes", schedule(ForgetsStep), "goes another way"),
    ("check_schedule_sets_groups", schedule(SaysAnother), "get_last_lr says"),
    ("check_loss_scalar", loss(NeverReduces), "not a tensor of one number"),
    ("check_loss_scalar", loss(NoGradient), "no gradient"),
    ("check_loss_gradient", loss(WrongLossGradient), "not the derivative"),
    ("check_loss_reductions", loss(OddMean), "not the mean"),
    ("check_loss_reductions", loss(AnyReduction), "without a word"),
    ("check_loss_empty", loss(EmptyIsNan), "the value of nothing is not finite"),
    ("check_loss_single", loss(SingleIsNan), "the value of a single item is not finite"),
    ("check_loss_single", loss(Unbiased), "declare 'pairwise'"),
    ("check_loss_single", loss(Squares, "pairwise"), "takes a single item"),
    ("check_loss_keeps_input", loss(ChangesTarget), "changed in place"),
    ("check_loss_dtypes", loss(LossInFloat32), "another type"),
]
