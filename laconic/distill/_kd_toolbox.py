"""`kd_toolbox`: the losses by which a small network learns from a large one: outputs, features, attention, relations.

Of the logits s, t (N, C) of student and teacher and the labels y (N,), at temperature T:

    p = softmax(t / T), q = softmax(s / T)
    D_i = sum_c p_ic log(p_ic / q_ic)                                 direction "forward"; "reverse": KL(q || p); "js"
    l_i = (1 - alpha) CE(s_i, y_i) + alpha w D_i                      `KDLoss`, w by convention:

- "batchmean": w = T^2, which keeps the size of the gradient as T grows (Hinton);
- "numel": w = T^2 / C, the mean over all entries (DeiT and those who follow it): C times weaker;
- "soft_cross_entropy": w = 1 and D_i = -sum_c p_ic log q_ic, whose gradient lacks the T^2 (BiStil).

The same alpha means different things under the three, so the convention is part of what is printed. The others:

    l_i = (1 - alpha) CE(s_i, y_i) + alpha CE(s_i, argmax_c t_ic)     `HardLabelKD`
    l_i = mean (r(F_s) - F_t)^2                                       `FeatureMSE`, r an adapter (FitNets)
    Q = vec(mean_c |F_c|^p) / ||.||_2,  l_i = beta mean (Q_s - Q_t)^2 `AttentionTransfer`, F (N, C, places)
    l_i = mean (A_s - A_t)^2, or mean over rows of KL(A_t || A_s)     `AttentionMapKD`, A (N, heads, queries, keys)
    l_i = a mean_j h(d_ij) + b mean_jk h(cos_ijk)                     `RelationKD`, h Huber's loss of the difference

with d_ij = |x_i - x_j| over its mean, and cos_ijk = <e_ij, e_ik>, e_ij = (x_j - x_i) / |x_j - x_i|. No gradient flows
to the teacher. Each loss has one value per example (or per token that counts), and torch's three reductions.

Source: "Distilling the Knowledge in a Neural Network", Hinton, Vinyals, Dean, 2015, arXiv 1503.02531. Further: FitNets
1412.6550; attention transfer 1612.03928; RKD 1904.05068; TinyBERT 1909.10351; DeiT 2012.12877. Official code: none of
Hinton's. We differ: of attention maps, entries where the teacher's is exactly 0 are left out, as masked by its softmax;
features of other sizes are pooled to the smaller size.

Nothing of it is left at inference; `Distill` hangs the losses on a training and keeps adapters out of the student. Use
it where labels are few or the student is much smaller than what fits the data. With many labels expect little.

Example:
    >>> import torch
    >>> loss = KDLoss(T=2.0, alpha=1.0)
    >>> teacher = torch.tensor([[4.0, 0.0, 0.0]])
    >>> float(loss(teacher, teacher)), round(float(loss(torch.zeros(1, 3), teacher)), 3)
    (0.0, 1.732)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card

REDUCTIONS = ("none", "mean", "sum")
CONVENTIONS = ("batchmean", "numel", "soft_cross_entropy")
DIRECTIONS = ("forward", "reverse", "js")
IGNORED = -100  # the label of positions that do not count, as in torch's cross-entropy


# --- mathematics ------------------------------------------------------------------------------------


def soft_divergence(student: Tensor, teacher: Tensor, T: float = 1.0, direction: str = "forward") -> Tensor:
    """D (...,) of logits (..., C): the divergence of softened outputs, summed over classes."""
    log_q, log_p = F.log_softmax(_wide(student) / T, -1), F.log_softmax(_wide(teacher).detach() / T, -1)
    if direction == "forward":
        return _kl(log_p, log_q)
    if direction == "reverse":
        return _kl(log_q, log_p)
    middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_q.dtype))
    return (_kl(log_p, middle) + _kl(log_q, middle)) / 2


def soft_cross_entropy(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """-sum_c p_c log q_c (...,) of logits (..., C)."""
    p = F.softmax(_wide(teacher).detach() / T, -1)
    return -_weighted(p, F.log_softmax(_wide(student) / T, -1))


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Q (N, places) of unit length: where in features (N, C, ...) the energy mean_c |F_c|^p lies."""
    return F.normalize(_wide(features).abs().pow(p).mean(1).flatten(1), dim=1)


def distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """d (N, N) of embeddings (N, D): Euclidean, over the mean of those not 0; squares below eps count as eps."""
    squares = (x[:, None] - x[None]).square().sum(-1)
    d = squares.clamp(min=eps).sqrt().masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    return d / d[d > 0].mean()


def cosines(x: Tensor) -> Tensor:
    """cos (N, N, N) of embeddings (N, D): that of the angle at the first index between the other two."""
    e = F.normalize(x[None] - x[:, None], dim=-1)
    return e @ e.mT


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _weighted(log_p.exp(), log_p - log_q)


def _weighted(p: Tensor, values: Tensor) -> Tensor:
    """sum p * values over the last axis, where 0 * anything is 0, also in the gradient: classes masked by -inf."""
    return (p * torch.where(p > 0, values, 0.0)).sum(-1)


def _wide(x: Tensor) -> Tensor:
    """Half precisions as float32: sums over classes and squares need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- the losses -------------------------------------------------------------------------------------


class _Distance(nn.Module):
    """A loss with one value an example.

    Args:
        reduction: "none" gives all values, "mean" and "sum" one number.
    """

    def __init__(self, reduction: str):
        super().__init__()
        self.reduction = _one_of("reduction", reduction, REDUCTIONS)

    def reduce(self, each: Tensor) -> Tensor:
        """Of values (M,), one at least."""
        if each.numel() == 0:
            raise ValueError(f"{type(self).__name__}: there is nothing to compare: no example, or all are left out")
        return each if self.reduction == "none" else each.mean() if self.reduction == "mean" else each.sum()


class KDLoss(_Distance):
    """Softened outputs of the teacher, and the labels.

    Args:
        T: temperature, positive.
        alpha: weight of the teacher, 0 to 1; 1 needs no labels.
        convention: one of `CONVENTIONS`, see above.
        direction: one of `DIRECTIONS`; "reverse" lets a language model drop what it cannot fit.
        t_squared: whether to multiply by T^2; by default as the convention does.
        reduction: over examples, or over the tokens that count.

    Raises:
        ValueError: an option that there is not.
    """

    def __init__(
        self, T: float = 4.0, alpha: float = 0.9, *, convention: str = "batchmean", direction: str = "forward",
        t_squared: bool | None = None, reduction: str = "mean",
    ):  # fmt: skip
        super().__init__(reduction)
        if not T > 0:
            raise ValueError(f"KDLoss: T={T} must be positive")
        self.T, self.alpha = T, _share("KDLoss", alpha)
        self.convention = _one_of("convention", convention, CONVENTIONS)
        self.direction = _one_of("direction", direction, DIRECTIONS)
        if convention == "soft_cross_entropy" and direction != "forward":
            raise ValueError("KDLoss: a soft cross-entropy has the direction 'forward' alone")
        self.t_squared = convention != "soft_cross_entropy" if t_squared is None else t_squared

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss.

        Args:
            student: logits (..., C).
            teacher: logits of the same shape.
            target: classes (...); -100 leaves a position out.
            mask: (...), true where a position counts.

        Raises:
            ValueError: shapes that do not fit, no labels though alpha < 1, or nothing counts.
        """
        if target is None and self.alpha != 1:
            raise ValueError(f"KDLoss: alpha={self.alpha} needs labels: give them, or alpha=1")
        student, teacher, target = _counted("KDLoss", student, teacher, target, mask)
        if self.convention == "soft_cross_entropy":
            soft = soft_cross_entropy(student, teacher, self.T)
        else:
            soft = soft_divergence(student, teacher, self.T, self.direction)
            soft = soft / student.shape[-1] if self.convention == "numel" else soft
        each = self.alpha * (self.T**2 if self.t_squared else 1.0) * soft
        if target is not None and self.alpha != 1:
            each = each + (1 - self.alpha) * F.cross_entropy(_wide(student), target, reduction="none")
        return self.reduce(each)

    def extra_repr(self) -> str:
        return (
            f"T={self.T}, alpha={self.alpha}, convention={self.convention!r}, direction={self.direction!r}, "
            f"t_squared={self.t_squared}"
        )


class HardLabelKD(_Distance):
    """The teacher's decision as a second label.

    Args:
        alpha: weight of the teacher, 0 to 1.
        reduction: over examples, or over the tokens that count.
    """

    def __init__(self, alpha: float = 0.5, *, reduction: str = "mean"):
        super().__init__(reduction)
        self.alpha = _share("HardLabelKD", alpha)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss; arguments as those of `KDLoss.forward`."""
        student, teacher, labels = _counted("HardLabelKD", student, teacher, target, mask)
        assert labels is not None
        logits = _wide(student)
        by_label = F.cross_entropy(logits, labels, reduction="none")
        by_teacher = F.cross_entropy(logits, teacher.argmax(-1), reduction="none")
        return self.reduce((1 - self.alpha) * by_label + self.alpha * by_teacher)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class FeatureMSE(_Distance):
    """Squared difference of features, each example by itself.

    Args:
        adapter: maps the student's features to the shape of the teacher's, see `regressor`; trained with the student.
        normalize: compare directions: both are scaled to unit length along `dim`.
        dim: the axis of channels; 1 for images, -1 for tokens.
        reduction: over examples.
    """

    def __init__(
        self, adapter: nn.Module | None = None, *, normalize: bool = False, dim: int = 1, reduction: str = "mean"
    ):
        super().__init__(reduction)
        self.adapter, self.normalize, self.dim = adapter, normalize, dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features (N, ...)."""
        student = student if self.adapter is None else self.adapter(student)
        if student.shape != teacher.shape or student.ndim < 2:
            raise ValueError(
                f"FeatureMSE: features of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: they must be "
                "(N, ...) and alike, give an adapter (laconic.distill.regressor)"
            )
        a, b = _wide(student), _wide(teacher).detach()
        if self.normalize:
            a, b = F.normalize(a, dim=self.dim), F.normalize(b, dim=self.dim)
        return self.reduce((a - b).square().flatten(1).mean(1))


class AttentionTransfer(_Distance):
    """Where in a picture the energy lies.

    Args:
        p: power of the features.
        beta: weight; 1000 is common, since entries of unit vectors are small.
        distance: "mean_square" over places, as code has it, or "norm" ||Q_s - Q_t||_2, as the paper has it.
        reduction: over examples.
    """

    def __init__(
        self, p: float = 2.0, beta: float = 1000.0, *, distance: str = "mean_square", reduction: str = "mean"
    ):
        super().__init__(reduction)
        self.p, self.beta = p, beta
        self.distance = _one_of("distance", distance, ("mean_square", "norm"))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features (N, C, places) with one to three axes of places; channels and sizes may differ."""
        if not 3 <= student.ndim == teacher.ndim <= 5 or len(student) != len(teacher):
            raise ValueError(
                f"AttentionTransfer: features of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: both must "
                "be (N, C, places) with as many axes"
            )
        size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
        gap = attention_map(_pooled(student, size), self.p) - attention_map(_pooled(teacher.detach(), size), self.p)
        each = gap.square().mean(1) if self.distance == "mean_square" else torch.linalg.vector_norm(gap, dim=1)
        return self.reduce(self.beta * each)

    def extra_repr(self) -> str:
        return f"p={self.p}, beta={self.beta}, distance={self.distance!r}"


class AttentionMapKD(_Distance):
    """What each position looks at: attention after the softmax.

    Args:
        kind: "mse" over entries, or "kl" over rows.
        reduction: over examples.
    """

    def __init__(self, kind: str = "mse", *, reduction: str = "mean"):
        super().__init__(reduction)
        self.kind = _one_of("kind", kind, ("mse", "kl"))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            student: (N, heads, queries, keys); other numbers of heads are compared by their mean.
            teacher: likewise.
            mask: (N, positions), true where there is text; for self-attention.
        """
        if student.ndim != 4 or student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                f"AttentionMapKD: maps of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: both must be "
                "(N, heads, queries, keys), alike but for the heads"
            )
        s, t = _wide(student), _wide(teacher).detach()
        if s.shape[1] != t.shape[1]:
            s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        seen = t != 0
        if mask is not None:
            seen = seen & mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
        if not bool(seen.flatten(1).any(1).all()):
            raise ValueError("AttentionMapKD: an example has no position that counts")
        if self.kind == "mse":
            return self.reduce(_mean_where((s - t).square(), seen))
        logs = t.clamp(min=torch.finfo(t.dtype).tiny).log() - s.clamp(min=torch.finfo(s.dtype).tiny).log()
        return self.reduce(_mean_where((t * logs * seen).sum(-1), seen.any(-1)))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class RelationKD(_Distance):
    """Distances and angles among the examples of a batch; embeddings may differ in length.

    It takes memory for N^3 + N^2 D numbers.

    Args:
        distance: weight a of the distances.
        angle: weight b of the angles.
        delta: where Huber's loss turns from square to linear.
        eps: smallest squared distance.
        reduction: over the examples at the first index.
    """

    def __init__(
        self, distance: float = 25.0, angle: float = 50.0, *, delta: float = 1.0, eps: float = 1e-12,
        reduction: str = "mean",
    ):  # fmt: skip
        super().__init__(reduction)
        self.distance, self.angle, self.delta, self.eps = distance, angle, delta, eps

    def parts(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms (N,), not weighted, of embeddings (N, D)."""
        if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
            raise ValueError(
                f"RelationKD: embeddings of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: both must be "
                "(N, D) with one N of at least 2"
            )
        s, t = _wide(student), _wide(teacher).detach()
        far = F.huber_loss(distances(s, self.eps), distances(t, self.eps), reduction="none", delta=self.delta)
        bent = F.huber_loss(cosines(s), cosines(t), reduction="none", delta=self.delta)
        return far.mean(1), bent.mean((1, 2))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        far, bent = self.parts(student, teacher)
        return self.reduce(self.distance * far + self.angle * bent)

    def extra_repr(self) -> str:
        return f"distance={self.distance}, angle={self.angle}, delta={self.delta}, eps={self.eps}"


def _counted(
    who: str, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (M, C) and labels (M,) of the positions that count."""
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            f"{who}: logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: they must be (..., C), alike"
        )
    for name, given in (("labels", target), ("the mask", mask)):
        if given is not None and given.shape != student.shape[:-1]:
            raise ValueError(f"{who}: {name} of shape {tuple(given.shape)} for logits {tuple(student.shape)}")
    counts = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    counts = counts if target is None else counts & (target != IGNORED)
    return student[counts], teacher.detach()[counts], None if target is None else target[counts]


def _pooled(features: Tensor, size: tuple[int, ...]) -> Tensor:
    if features.shape[2:] == size:
        return features
    pool: Callable[..., Tensor] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return pool(features, size)


def _mean_where(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over all axes but the first, of what counts."""
    return (values * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)


def _one_of(name: str, given: str, known: tuple[str, ...]) -> str:
    if given not in known:
        raise ValueError(f"{name}={given!r} is not known; it is one of {', '.join(known)}")
    return given


def _share(who: str, alpha: float) -> float:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{who}: alpha={alpha} is not within 0 and 1")
    return alpha


CARD = Card(
    id="kd_toolbox",
    title="Distilling the Knowledge in a Neural Network",
    authors="Hinton, Vinyals, Dean",
    year=2015,
    source="arXiv 1503.02531; FitNets 1412.6550; AT 1612.03928; RKD 1904.05068; TinyBERT 1909.10351; DeiT 2012.12877",
    family="distill",
    summary="Trains a small network on what a large one says: softened outputs, features, attention maps, relations.",
    objects={
        "KDLoss": "Loss",
        "HardLabelKD": "Loss",
        "FeatureMSE": "Loss",
        "AttentionTransfer": "Loss",
        "AttentionMapKD": "Loss",
        "RelationKD": "Loss",
    },
    traits={"RelationKD": ("pairwise",)},
    use="Where labels are few, or to train back what pruning and few bits took from a network.",
    avoid="With many labels for a student that fits them: it costs a forward pass of the teacher and gains little.",
    composes=("rtn", "gptq"),
    vectors=("kd_toolbox",),
    code="none of the authors; equations checked against AutoDL-Projects (MIT)",
    claim={
        "text": "A small student that also learns from a large teacher's softened outputs is more accurate than one "
        "that learns from the same labels alone.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.005,
        "arms": ("labels", "teacher"),
        "seeds": 5,
        "minutes": 3,
        "task": "mnist-mlp",
    },
)
