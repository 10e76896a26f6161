"""Views of embeddings, and one loss summed over them: what nested representations are trained by.

A view v is a layer l_v, a number of leading dimensions d_v and a weight c_v. For a base loss on embeddings (N, D)

    L_i = sum_v c_v base(z^(l_v)[:, :d_v], ...)_i        i = 1 .. N

Views of one layer at several widths are Matryoshka embeddings; at several layers they make the depth elastic too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("none", "mean", "sum")

Layers = Tensor | Sequence[Tensor]
"""The embeddings (N, D) of one side (queries, say): of the last layer, or a sequence with those of every layer."""


@dataclass(frozen=True)
class View:
    """A part of an embedding, and what its loss counts.

    Attributes:
        dim: leading dimensions that are kept; None keeps all.
        layer: index into the layers, where there are several.
        weight: of its loss in the sum.
    """

    dim: int | None = None
    layer: int = -1
    weight: float = 1.0

    def of(self, side: Layers, *, normalize: bool = False) -> Tensor:
        """The view of one side, (N, dim), brought to length 1 if asked: after it is cut, not before.

        Raises:
            ValueError: the embedding is narrower than the view.
        """
        whole = side if isinstance(side, Tensor) else side[self.layer]
        if self.dim is not None and self.dim > whole.shape[-1]:
            raise ValueError(f"a view of {self.dim} dimensions is wider than the embedding {tuple(whole.shape)}")
        part = whole[..., : self.dim]
        return F.normalize(part, dim=-1) if normalize else part


def nested(
    base: Callable[..., Tensor],
    sides: Sequence[Layers],
    views: Iterable[View],
    *rest: object,
    normalize: bool = False,
) -> Tensor:
    """sum_v c_v base(sides in view v, *rest), in the shape that `base` gives.

    Args:
        base: a loss of one embedding per side and of `rest`.
        sides: the embeddings.
        views: at least one.
        rest: handed to `base` unchanged (labels).
        normalize: bring every view to length 1.

    Raises:
        ValueError: there is no view, or one is wider than the embeddings.
    """
    losses = [view.weight * base(*(view.of(side, normalize=normalize) for side in sides), *rest) for view in views]
    if not losses:
        raise ValueError("a nested loss needs at least one view")
    return sum(losses[1:], start=losses[0])


def reduced(losses: Tensor, reduction: str, who: str) -> Tensor:
    """Losses (N,) as they are, their mean or their sum.

    Raises:
        ValueError: there is nothing to reduce, or the base loss has already reduced it in another way.
    """
    if losses.ndim == 0:
        if reduction != "mean":
            raise ValueError(f"{who}: the base loss gives one number, and reduction={reduction!r} needs one per item")
        return losses
    if losses.numel() == 0:
        raise ValueError(f"{who}: the batch is empty")
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def known_reduction(reduction: str, who: str) -> str:
    """The reduction, if there is one of that name.

    Raises:
        ValueError: there is none.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{who}: reduction is {reduction!r}: it must be one of {', '.join(REDUCTIONS)}")
    return reduction


CARD = None
