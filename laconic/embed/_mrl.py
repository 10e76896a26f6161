"""`mrl`: one embedding whose leading dimensions are embeddings of their own.

An embedding z (N, D) is trained so that every prefix z[:, :d], d in dims, does the task. With weights c_d (1 each):

    MRL       L = sum_d c_d CE(z[:, :d] W_d^T + b_d, y)                 W_d (classes, d), y (N,)
    MRL-E     L = sum_d c_d CE(z[:, :d] W[:, :d]^T + b, y)              W (classes, D): one head, one bias
    any base  L = sum_d c_d base(u(z[:, :d]), ...)                      u: to length 1, for losses on cosines

It is a sum and not a mean over the widths, so the loss grows with their number. The prefix is cut before it is brought
to length 1. At inference a prefix is taken and normalized again; a head for one width alone is `head.at(d)`.

Search with few multiplications: rank everything by a short prefix, keep a shortlist, rank that by a longer one. One
shortlist is adaptive retrieval; several that shrink while the prefix grows are a funnel. Per query and n items that is
n d_0 + sum_i s_i d_(i+1) multiply-adds.

Source: "Matryoshka Representation Learning", Kusupati, Bhatt, Rege, Wallingford, Sinha, Ramanujan, Howard-Snyder, Chen,
Kakade, Jain, Farhadi, 2022, arXiv 2205.13147. Official code: RAIVNLab/MRL, MIT; the base-loss form is that of
sentence-transformers' MatryoshkaLoss, Apache-2.0. We differ from them: widths sampled per step (`per_step`) always
include the largest, so that the full embedding is trained at every step.

Use it where one model serves several budgets of memory or search time. For a single width known in advance, train an
embedding of that width. Binary or 8-bit codes save more bytes at the same loss, and go with it.

Example:
    >>> import torch
    >>> from laconic.embed import MatryoshkaHead, nested_cross_entropy
    >>> head = MatryoshkaHead(dims=(8, 16, 32), num_classes=10)
    >>> logits = head(torch.randn(4, 32))
    >>> [tuple(one.shape) for one in logits]
    [(4, 10), (4, 10), (4, 10)]
    >>> nested_cross_entropy(logits, torch.tensor([1, 2, 3, 4])).shape
    torch.Size([])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card

from ._views import View, known_reduction, nested, reduced


def nested_cross_entropy(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """sum_d c_d CE(logits_d, target), what a `MatryoshkaHead` is trained by.

    Args:
        logits: (N, classes) of every width.
        target: (N,) classes.
        weights: c_d; 1 each by default.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        reduction: over the items; "none" gives (N,).

    Raises:
        ValueError: not one weight per width, an unknown reduction, or an empty batch.
    """
    known_reduction(reduction, "mrl")
    factors = _weights(weights, len(logits))
    losses = [
        factor * F.cross_entropy(one, target, reduction="none", label_smoothing=label_smoothing)
        for factor, one in zip(factors, logits, strict=True)
    ]
    return reduced(torch.stack(losses).sum(0), reduction, "mrl")


class MatryoshkaHead(nn.Module):
    """Linear classifiers on prefixes: (N, features) -> logits (N, classes) of every width, as a tuple.

    Args:
        dims: the widths, ascending; features beyond the last are not looked at.
        num_classes: outputs.
        tied: one weight of which each width uses the leading columns, and one bias (MRL-E), instead of one of each
            per width.
        bias: whether there are biases.

    Raises:
        ValueError: the widths are not positive and ascending.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        tied: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dims, self.num_classes, self.tied = _ascending(dims), num_classes, tied
        widths = self.dims[-1:] if tied else self.dims
        self.classifiers = nn.ModuleList(
            nn.Linear(width, num_classes, bias=bias, device=device, dtype=dtype) for width in widths
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[-1] < self.dims[-1]:
            raise ValueError(f"mrl: the widths go up to {self.dims[-1]}, and the embedding is {tuple(x.shape)}")
        return tuple(F.linear(x[..., :dim], *self._of(dim)) for dim in self.dims)

    def at(self, dim: int) -> nn.Linear:
        """The classifier of one width by itself: a copy, for a model that keeps no more than that prefix.

        Raises:
            ValueError: there is no such width.
        """
        if dim not in self.dims:
            raise ValueError(f"mrl: {dim} is none of the widths {', '.join(map(str, self.dims))}")
        weight, bias = self._of(dim)
        alone = nn.Linear(dim, self.num_classes, bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            alone.weight.copy_(weight)
            if bias is not None:
                alone.bias.copy_(bias)
        return alone.train(self.training)

    def _of(self, dim: int) -> tuple[Tensor, Tensor | None]:
        layer: nn.Linear = self.classifiers[0 if self.tied else self.dims.index(dim)]  # type: ignore[assignment]
        return layer.weight[:, :dim], layer.bias

    def extra_repr(self) -> str:
        return f"dims={self.dims}, num_classes={self.num_classes}, tied={self.tied}"


class MatryoshkaLoss(nn.Module):
    """A base loss on every prefix: sum_d c_d base(z[:, :d], ...).

    Args:
        base: (embeddings of each side, *rest) -> losses (N,), or one number that is a mean already.
        dims: the widths, ascending.
        weights: c_d; 1 each by default.
        per_step: how many widths a call uses: the largest, and others drawn anew. All by default.
        normalize: bring every prefix to length 1, for losses on cosines.
        generator: of the widths that are drawn; torch's own by default.
        reduction: "none" gives (N,), "mean" and "sum" one number.

    Raises:
        ValueError: widths, weights, `per_step` or `reduction` cannot be right.
    """

    def __init__(
        self,
        base: Callable[..., Tensor],
        dims: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        per_step: int | None = None,
        normalize: bool = False,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
    ):
        super().__init__()
        dims = _ascending(dims)
        if per_step is not None and not 1 <= per_step <= len(dims):
            raise ValueError(f"mrl: per_step is {per_step}: there are {len(dims)} widths")
        self.base, self.per_step, self.normalize, self.generator = base, per_step, normalize, generator
        self.reduction = known_reduction(reduction, "mrl")
        self.views = [View(dim, weight=c) for dim, c in zip(dims, _weights(weights, len(dims)), strict=True)]

    def forward(self, embeddings: Tensor | Sequence[Tensor], *rest: object) -> Tensor:
        """The loss of embeddings (N, D), of one side or of several; `rest` goes to the base loss as it is."""
        sides = (embeddings,) if isinstance(embeddings, Tensor) else embeddings
        losses = nested(self.base, sides, self._drawn(), *rest, normalize=self.normalize)
        return reduced(losses, self.reduction, "mrl")

    def _drawn(self) -> list[View]:
        if self.per_step is None:
            return self.views
        order = torch.randperm(len(self.views) - 1, generator=self.generator)[: self.per_step - 1]
        return [*(self.views[i] for i in sorted(order.tolist())), self.views[-1]]


def funnel_search(
    database: Tensor, queries: Tensor, dims: Sequence[int], shortlists: Sequence[int], *, normalize: bool = True
) -> Tensor:
    """Nearest items by Euclidean distance, on longer and longer prefixes of fewer and fewer items.

    Args:
        database: (n, D).
        queries: (q, D).
        dims: widths, ascending: the first ranks everything, each further one what is left.
        shortlists: how many items each width but the last leaves, descending.
        normalize: bring prefixes to length 1 (ranking by cosine).

    Returns:
        (q, shortlists[-1]) indices into the database, nearest first.

    Raises:
        ValueError: widths and shortlists do not fit each other or the data.
    """
    dims = _ascending(dims)
    sizes = [min(size, len(database)) for size in shortlists]
    if len(sizes) != len(dims) - 1 or min(sizes, default=0) < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(
            f"mrl: {len(dims)} widths need {len(dims) - 1} shortlists, descending and at least 1: {list(shortlists)}"
        )
    kept = _nearest(_prefix(queries, dims[0], normalize), _prefix(database, dims[0], normalize), sizes[0])
    for dim, size in zip(dims[1:], [*sizes[1:], sizes[-1]], strict=True):
        # Only what is left is cut and normalized: (q, s, dim).
        q, items = _prefix(queries, dim, normalize), _prefix(database[:, :dim][kept], dim, normalize)
        distances = (items - q[:, None]).square().sum(-1)
        kept = kept.gather(1, distances.argsort(dim=1, stable=True)[:, :size])
    return kept


def adaptive_search(
    database: Tensor, queries: Tensor, *, low: int = 16, high: int = 2048, shortlist: int = 200, normalize: bool = True
) -> Tensor:
    """(q, shortlist) indices: the nearest by the first `low` dimensions, in their order by the first `high`.

    Raises:
        ValueError: see `funnel_search`.
    """
    return funnel_search(database, queries, (low, high), (shortlist,), normalize=normalize)


def search_cost(items: int, dims: Sequence[int], shortlists: Sequence[int] = ()) -> int:
    """Multiply-adds per query of a search by `dims` with `shortlists`; one width alone is exact search.

    >>> search_cost(100_000, [2048]), search_cost(100_000, [16, 2048], [200])
    (204800000, 2009600)
    """
    return sum(n * dim for n, dim in zip((items, *shortlists), dims, strict=True))


def _nearest(queries: Tensor, items: Tensor, count: int) -> Tensor:
    distances = items.square().sum(1) - 2 * queries @ items.T  # up to |q|^2, the same for all items
    return distances.topk(count, dim=1, largest=False).indices


def _prefix(x: Tensor, dim: int, normalize: bool) -> Tensor:
    return View(dim).of(x, normalize=normalize)


def _ascending(dims: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(dim) for dim in dims)
    if not found or found[0] < 1 or any(a >= b for a, b in zip(found, found[1:], strict=False)):
        raise ValueError(f"mrl: the widths are {list(dims)}: positive numbers in ascending order are needed")
    return found


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    found = (1.0,) * count if weights is None else tuple(float(weight) for weight in weights)
    if len(found) != count:
        raise ValueError(f"mrl: there are {len(found)} weights for {count} widths")
    return found


CARD = Card(
    id="mrl",
    title="Matryoshka Representation Learning",
    authors="Kusupati, Bhatt, Rege, Wallingford, Sinha, Ramanujan, Howard-Snyder, Chen, Kakade, Jain, Farhadi",
    year=2022,
    source="arXiv 2205.13147",
    family="embed",
    summary="Trains an embedding so that its leading dimensions can be used alone: many sizes from one model.",
    objects={"MatryoshkaHead": "Layer", "MatryoshkaLoss": "Loss"},
    traits={"MatryoshkaHead": ("batch_independent_eval",)},
    use="When one encoder serves several budgets of memory or search time, or a search can go from coarse to fine.",
    avoid="When a single small width is known in advance: an embedding of that width is as good and simpler.",
    vectors=("mrl",),
    code="github.com/RAIVNLab/MRL, MIT",
    claim={
        "text": "Prefixes of 4, 8 and 16 of 64 dimensions classify better than those of an embedding that was trained "
        "as a whole, even with a classifier fitted to each prefix afterwards.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.05,
        "arms": ("plain", "mrl"),
        "seeds": 5,
        "minutes": 4,
        "task": "mnist-mlp",
    },
)
