"""`nmc`: continual learning by the mean of each class in the features of a frozen network.

For features f (N, F) of a network that is not trained any further, u(f) = f / |f|:

    mu_c = sum_{i: y_i = c} u(f_i) / n_c
    answer = argmin_c |u(f) - mu_c| = argmax_c (u(f) . mu_c - |mu_c|^2 / 2)

The means are not brought to length 1 again, so this is not the largest cosine. There is one head for all classes, new
ones may appear at any time, nothing is replayed and no boundary between tasks is needed. A class costs F + 1 numbers.

Sums are kept in fixed point: a feature is rounded to a multiple of 2^-32 and added as an integer. Integer sums are
exact, so the state is the same to the bit for every order of the stream, and so for training on all at once.

Source: "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning", Janson, Zhang, Aljundi,
Elhoseiny, 2022, arXiv 2210.04428. Official code: Pauljanson002/pretrained-cl (no licence stated). We differ: sums in
fixed point; the network is the caller's, and should be in evaluation mode.

Use it as the first baseline of any class-incremental problem with a pretrained network. Where the features do not
separate the classes, only training the network helps.

Example:
    >>> import torch
    >>> from laconic.embed import NearestMean
    >>> learner = NearestMean(features=2)
    >>> learner.update(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    >>> learner.update(torch.tensor([[0.0, 5.0]]), torch.tensor([1]))
    >>> learner.predict(torch.tensor([[2.0, 1.0]])).argmax(1)
    tensor([0])
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.errors import BadInput

FRACTION = 2.0**32  # steps of the fixed point to 1
LARGEST = 2**62  # of a sum, in such steps: twice that is the end of int64
LARGEST_CLASS = 2**20  # a label above this is a mistake: the table of sums has a row for each


def nearest_mean_scores(features: Tensor, means: Tensor) -> Tensor:
    """f . mu_c - |mu_c|^2 / 2, (N, classes): the nearest mean has the largest score.

    Args:
        features: (N, F).
        means: (classes, F).
    """
    return features @ means.T - means.square().sum(1) / 2


class NearestMean:
    """The classifier: update it with what comes, ask it at any time.

    Args:
        features: F, size of a feature vector.
        normalize: bring features to length 1.

    Raises:
        ValueError: `features` is not positive.
    """

    def __init__(self, features: int, *, normalize: bool = True):
        if features < 1:
            raise ValueError(f"nmc: features is {features}: it must be at least 1")
        self.features, self.normalize = features, normalize
        self.sums = torch.zeros(0, features, dtype=torch.int64)
        self.counts = torch.zeros(0, dtype=torch.int64)

    @property
    def means(self) -> Tensor:
        """mu (classes, F) in float64; of a class that has not been seen, zeros."""
        return self.sums.double() / FRACTION / self.counts.clamp(min=1)[:, None]

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Learn features (N, F) and their classes (N,).

        Raises:
            ValueError: shapes or labels are impossible.
            BadInput: features are not finite, or the sums grow beyond what is exact.
        """
        f = self._prepared(features)
        y = labels.detach().cpu()
        if y.shape != (len(f),) or y.is_floating_point():
            raise ValueError(
                f"nmc: {len(f)} features need as many whole-numbered labels, not {tuple(y.shape)} {y.dtype}"
            )
        if len(y) == 0:
            return
        if not 0 <= int(y.min()) <= int(y.max()) < LARGEST_CLASS:
            raise ValueError(
                f"nmc: labels go from {int(y.min())} to {int(y.max())}: 0 .. {LARGEST_CLASS - 1} are possible"
            )
        # Checked before anything is added, so that a refused batch leaves the state as it was.
        if float(f.abs().sum(0).max()) * FRACTION + self._largest() >= LARGEST:
            raise BadInput("nmc: the sums of features are too large to be exact: scale them, or set normalize=True")
        self._grow(int(y.max()) + 1)
        self.sums.index_add_(0, y.long(), (f * FRACTION).round().long())
        self.counts += torch.bincount(y.long(), minlength=len(self.counts))

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Scores (N, classes) in float64; -inf for a class that has not been seen.

        Raises:
            ValueError: a wrong shape.
            BadInput: nothing has been learned, or features are not finite.
        """
        if not len(self.counts):
            raise BadInput("nmc: nothing has been learned yet: call update first")
        scores = nearest_mean_scores(self._prepared(features), self.means)
        return scores.masked_fill(self.counts == 0, -torch.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """All that going on needs."""
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of another number of features.
        """
        if state["sums"].shape != (len(state["counts"]), self.features):
            raise ValueError(
                f"nmc: the state has sums {tuple(state['sums'].shape)}: {self.features} features are needed"
            )
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()

    def _prepared(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"nmc: features are (N, {self.features}), not {tuple(features.shape)}")
        f = features.detach().cpu().double()
        if not torch.isfinite(f).all():
            raise BadInput("nmc: a feature is not finite")
        return F.normalize(f, dim=1) if self.normalize else f

    def _grow(self, classes: int) -> None:
        more = max(0, classes - len(self.counts))
        self.sums = F.pad(self.sums, (0, 0, 0, more))
        self.counts = F.pad(self.counts, (0, more))

    def _largest(self) -> int:
        return int(self.sums.abs().max()) if len(self.sums) else 0


def incremental_accuracies(
    learner: NearestMean, steps: Iterable[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
) -> list[float]:
    """Accuracy after each step on the test examples of all steps so far; their mean is the usual figure.

    Args:
        learner: it is updated.
        steps: (features, labels) to learn and (features, labels) to test, for each step.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    accuracies = []
    for train, test in steps:
        learner.update(*train)
        seen.append(test)
        features, labels = (torch.cat(column) for column in zip(*seen, strict=True))
        accuracies.append(float((learner.predict(features).argmax(1) == labels.cpu()).double().mean()))
    return accuracies


CARD = Card(
    id="nmc",
    title="A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
    authors="Janson, Zhang, Aljundi, Elhoseiny",
    year=2022,
    source="arXiv 2210.04428",
    family="embed",
    summary="Learns classes one after another without forgetting: the mean of each in a frozen network's features.",
    objects={"NearestMean": "Protocol"},
    traits={"NearestMean": ("order:independent",)},
    use="As the first baseline of class-incremental learning with a pretrained network; keeps no data.",
    avoid="When the frozen features do not separate the classes: then the network itself has to be trained.",
    code="github.com/Pauljanson002/pretrained-cl, no licence stated",
    claim={
        "text": "On pairs of classes that come one after another, nearest means in the features of a frozen, "
        "pretrained network have a higher average incremental accuracy than fine-tuning the network.",
        "metric": "average incremental accuracy",
        "direction": "higher",
        "margin": 0.1,
        "arms": ("fine-tuning", "nmc"),
        "seeds": 5,
        "minutes": 4,
        "task": "mnist-cnn",
    },
)
