"""`nmc`: exact sums, new classes, refusals; the contract of its kind is checked from `EXAMPLES`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.embed import NearestMean, incremental_accuracies, nearest_mean_scores
from laconic.errors import BadInput
from laconic.testing import Example


def stream(generator):
    """Five batches of three classes, each of which holds them all, and a query."""
    labels = torch.arange(6) % 3
    batches = [(torch.randn(6, 4, generator=generator), labels) for _ in range(5)]
    return [batches, torch.randn(7, 4, generator=generator)]


EXAMPLES = [
    Example(lambda: NearestMean(4), kind="Protocol", traits=("order:independent",), inputs=stream),
    Example(lambda: NearestMean(4, normalize=False), kind="Protocol", traits=("order:independent",), inputs=stream),
]


def data(n=60, features=8, classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, features, generator=generator), torch.randint(classes, (n,), generator=generator)


def learned(*batches, normalize=True):
    learner = NearestMean(8, normalize=normalize)
    for batch in batches:
        learner.update(*batch)
    return learner


@pytest.mark.parametrize("normalize", [True, False])
def test_the_equation(normalize):
    f, y = data()
    u = F.normalize(f.double(), dim=1) if normalize else f.double()
    means = torch.stack([u[y == c].mean(0) for c in range(4)])
    learner = learned((f, y), normalize=normalize)
    assert torch.allclose(learner.means, means, atol=2**-32)
    nearest = torch.cdist(u, means).argmin(1)
    assert torch.equal(learner.predict(f).argmax(1), nearest)
    distances = torch.cdist(u, means).square()
    assert torch.allclose(-2 * nearest_mean_scores(u, means) + u.square().sum(1, keepdim=True), distances)


def test_means_are_not_brought_to_length_one_again():
    f = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
    learner = NearestMean(2)
    learner.update(f, torch.tensor([0, 0, 1]))
    assert torch.allclose(learner.means[0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    # By the angle class 1 is nearer to this query, but the short mean of class 0 is at a smaller distance.
    query = torch.tensor([[0.05, 1.0]])
    cosine = F.cosine_similarity(query.double(), learner.means).argmax()
    assert (int(cosine), int(learner.predict(query).argmax(1))) == (1, 0)


def test_every_order_gives_the_same_bits():
    f, y = data()
    offline = learned((f, y))
    for seed in range(5):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        one_by_one = learned(*((f[i : i + 1], y[i : i + 1]) for i in order.tolist()))
        assert torch.equal(one_by_one.sums, offline.sums) and torch.equal(one_by_one.counts, offline.counts)
        assert torch.equal(one_by_one.predict(f), offline.predict(f))


def test_new_classes_may_come_at_any_time():
    f, y = data()
    learner = NearestMean(8)
    learner.update(f[y == 2], y[y == 2])
    scores = learner.predict(f)
    assert scores.shape == (60, 3) and (scores[:, :2] == -torch.inf).all() and scores[:, 2].isfinite().all()
    learner.update(f[y != 2], y[y != 2])
    assert torch.equal(learner.predict(f), learned((f, y)).predict(f))
    learner.update(f[:0], y[:0])
    assert torch.equal(learner.predict(f), learned((f, y)).predict(f))


def test_incremental_accuracies_test_all_steps_so_far():
    eye = torch.eye(3)
    first = (eye[:1], torch.tensor([0])), (eye[:2], torch.tensor([0, 1]))  # class 1 has not been learned: wrong
    second = (eye[1:], torch.tensor([1, 2])), (eye[1:], torch.tensor([1, 2]))
    assert incremental_accuracies(NearestMean(3), [first, second]) == [0.5, 1.0]


def test_a_refused_batch_leaves_the_state_as_it_was():
    learner = NearestMean(2, normalize=False)
    learner.update(torch.ones(1, 2), torch.tensor([0]))
    before = learner.state_dict()
    with pytest.raises(BadInput, match="too large"):
        learner.update(torch.full((2, 2), 1e9), torch.tensor([0, 5]))
    assert torch.equal(learner.sums, before["sums"]) and torch.equal(learner.counts, before["counts"])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: NearestMean(0), ValueError, "features is 0"),
        (lambda: NearestMean(8).predict(torch.ones(1, 8)), BadInput, "nothing has been learned"),
        (lambda: NearestMean(8).update(torch.ones(1, 7), torch.tensor([0])), ValueError, r"\(N, 8\), not \(1, 7\)"),
        (lambda: NearestMean(8).update(torch.ones(2, 8), torch.tensor([0])), ValueError, "2 features"),
        (lambda: NearestMean(8).update(torch.ones(1, 8), torch.tensor([0.5])), ValueError, "whole-numbered"),
        (lambda: NearestMean(8).update(torch.ones(1, 8), torch.tensor([-1])), ValueError, "from -1"),
        (lambda: NearestMean(8).update(torch.ones(1, 8), torch.tensor([2**40])), ValueError, "are possible"),
        (lambda: NearestMean(8).update(torch.full((1, 8), torch.nan), torch.tensor([0])), BadInput, "not finite"),
        (lambda: NearestMean(7).load_state_dict(learned(data()).state_dict()), ValueError, "7 features are needed"),
    ],
)
def test_what_cannot_be_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
