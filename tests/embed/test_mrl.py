"""`mrl`: the equations, the views, the searches; the contracts are checked from `EXAMPLES`."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from laconic.embed import (
    MatryoshkaHead,
    MatryoshkaLoss,
    View,
    adaptive_search,
    funnel_search,
    nested,
    nested_cross_entropy,
    search_cost,
)
from laconic.testing import Example

DIMS = (2, 4, 8)


def in_batch(a, b):
    """Losses (N,): cross-entropy of 5 a_i . b_j with the target j = i."""
    return F.cross_entropy(5 * a @ b.T, torch.arange(len(a)), reduction="none")


class OneSide(torch.nn.Module):
    """A loss of one tensor (N, 2, D), whose two sides are compared: in the form that the contract calls."""

    def __init__(self, **options):
        super().__init__()
        self.rule = MatryoshkaLoss(lambda a, b: (a - b).square().sum(-1), DIMS, **options)

    def forward(self, pairs):
        return self.rule([pairs[:, 0], pairs[:, 1]])


EXAMPLES = [
    Example(
        lambda device=None, dtype=None: MatryoshkaHead(DIMS, 3, device=device, dtype=dtype),
        kind="Layer",
        traits=("batch_independent_eval",),
        inputs=[(4, 8)],
        wrong=[(4, 7)],
        stated={"output": (4, 3)},
    ),
    Example(
        lambda device=None, dtype=None: MatryoshkaHead(DIMS, 3, tied=True, bias=False, device=device, dtype=dtype),
        kind="Layer",
        traits=("batch_independent_eval",),
        inputs=[(4, 9)],
        wrong=[(4, 5)],
        stated={"output": (4, 3)},
    ),
    Example(
        lambda reduction="mean": MatryoshkaLoss(
            lambda z, y: (z - y[:, : z.shape[1]]).square().sum(1), DIMS, weights=(1, 2, 0.5), reduction=reduction
        ),
        kind="Loss",
        inputs=[(5, 8), (5, 8)],
    ),
    Example(
        lambda reduction="mean": OneSide(normalize=True, reduction=reduction),
        kind="Loss",
        name="MatryoshkaLoss",
        inputs=[(5, 2, 8)],
    ),
]


def run_vector(case):
    args = case.args
    weights, dims = case.arrays("weight"), case.array("dims").tolist()
    head = MatryoshkaHead(dims, args["num_classes"], tied=args["tied"], bias=args["bias"], dtype=weights[0].dtype)
    biases = case.arrays("bias") if args["bias"] else []
    for i, layer in enumerate(head.classifiers):
        layer.weight.data = weights[i]
        if biases:
            layer.bias.data = biases[i]
    x = case.array("input").requires_grad_()
    logits = head(x)
    loss = nested_cross_entropy(logits, case.array("target"), weights=args["weights"])
    loss.backward()
    found = {
        "loss": loss,
        "logits": list(logits),
        "grad_input": x.grad,
        "grad_weight": [layer.weight.grad for layer in head.classifiers],
    }
    return found | ({"grad_bias": [layer.bias.grad for layer in head.classifiers]} if biases else {})


@pytest.mark.parametrize("tied", [False, True])
def test_the_equation(tied):
    torch.manual_seed(0)
    head = MatryoshkaHead(DIMS, 3, tied=tied, dtype=torch.float64)
    z, y, weights = torch.randn(6, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]), (0.5, 1.0, 3.0)
    want = torch.zeros(6, dtype=torch.float64)
    for place, (d, c) in enumerate(zip(DIMS, weights, strict=True)):
        layer = head.classifiers[0 if tied else place]
        for i in range(6):
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            scores = [bias[k] + sum(float(z[i, j]) * weight[k][j] for j in range(d)) for k in range(3)]
            want[i] += c * (math.log(sum(map(math.exp, scores))) - scores[y[i]])
    got = nested_cross_entropy(head(z), y, weights=weights, reduction="none")
    assert torch.allclose(got, want)
    assert torch.allclose(nested_cross_entropy(head(z), y, weights=weights), want.mean())


def test_a_prefix_is_cut_before_it_is_normalized():
    torch.manual_seed(0)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    want = sum(in_batch(a[:, :d] / a[:, :d].norm(dim=1)[:, None], F.normalize(b[:, :d])).mean() for d in DIMS)
    loss = MatryoshkaLoss(in_batch, DIMS, normalize=True)
    assert torch.allclose(loss([a, b]), want)
    # A normalized embedding gives the same: its prefix is normalized again.
    assert torch.allclose(loss([F.normalize(a), F.normalize(b)]), want)


def test_the_rest_goes_to_the_base_loss_as_it_is():
    z, y = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    loss = MatryoshkaLoss(lambda part, target, scale: F.cross_entropy(part * scale, target), DIMS)
    assert torch.allclose(loss(z, y, 3.0), sum(F.cross_entropy(3 * z[:, :d], y) for d in DIMS))


def test_widths_that_are_drawn_always_hold_the_largest():
    seen = []
    loss = MatryoshkaLoss(
        lambda z: seen[-1].append(z.shape[1]) or z.sum(1),
        (1, 2, 4, 8),
        per_step=2,
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(40):
        seen.append([])
        loss(torch.ones(3, 8))
    assert all(len(widths) == 2 and widths[1] == 8 for widths in seen)
    assert {widths[0] for widths in seen} == {1, 2, 4}


def test_views_of_layers():
    torch.manual_seed(0)
    a, b = [torch.randn(4, 6) for _ in range(3)], [torch.randn(4, 6) for _ in range(3)]
    views = [View(2, layer=0, weight=0.25), View(layer=1), View(4, layer=-1, weight=2.0)]
    want = 0.25 * in_batch(a[0][:, :2], b[0][:, :2]) + in_batch(a[1], b[1]) + 2 * in_batch(a[2][:, :4], b[2][:, :4])
    assert torch.allclose(nested(in_batch, [a, b], views), want)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_width_alone(tied, bias):
    head, z = MatryoshkaHead(DIMS, 3, tied=tied, bias=bias), torch.randn(4, 8)
    for logits, dim in zip(head(z), DIMS, strict=True):
        alone = head.at(dim)
        assert torch.allclose(alone(z[:, :dim]), logits, atol=1e-6)
    before = head(z)[-1].clone()
    alone.weight.data.zero_()
    assert torch.equal(head(z)[-1], before), "the copy shares its weight with the head"


def test_a_funnel_that_keeps_everything_is_exact_search():
    torch.manual_seed(0)
    database, queries = torch.randn(50, 16), torch.randn(7, 16)
    exact = torch.cdist(F.normalize(queries), F.normalize(database)).argsort(1)
    assert torch.equal(funnel_search(database, queries, (2, 4, 16), (50, 50)), exact)
    assert torch.equal(adaptive_search(database, queries, low=2, high=16, shortlist=1000), exact)


def test_a_funnel_by_hand():
    database = torch.tensor([[0.0, 9.0], [1.0, 0.0], [2.0, 0.0], [9.0, 0.0]])
    query = torch.tensor([[0.0, 0.0]])
    # By the first dimension 0, 1 and 2 are nearest; the second sends 0 to the end.
    assert funnel_search(database, query, (1, 2), (3,), normalize=False).tolist() == [[1, 2, 0]]
    assert funnel_search(database, query, (1, 2), (2,), normalize=False).tolist() == [[1, 0]]


def test_shortlists_cut_step_by_step():
    torch.manual_seed(0)
    database, queries = torch.randn(40, 8), torch.randn(3, 8)
    for row, q in zip(
        funnel_search(database, queries, (1, 2, 4, 8), (20, 10, 5), normalize=False), queries, strict=True
    ):
        kept = list(range(40))
        for dim, size in ((1, 20), (2, 10), (4, 5), (8, 5)):
            kept = sorted(kept, key=lambda i, d=dim: float((database[i, :d] - q[:d]).square().sum()))[:size]
        assert row.tolist() == kept


def test_the_cost_of_a_search():
    assert search_cost(1000, [64]) == 64_000
    assert search_cost(1000, [8, 16, 64], [100, 10]) == 8000 + 1600 + 640
    assert search_cost(0, [8, 64], [10]) == 640


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MatryoshkaHead((4, 4), 3), "ascending"),
        (lambda: MatryoshkaHead((), 3), "ascending"),
        (lambda: MatryoshkaHead((0, 4), 3), "positive"),
        (lambda: MatryoshkaHead(DIMS, 3).at(3), "3 is none of the widths 2, 4, 8"),
        (lambda: MatryoshkaLoss(in_batch, DIMS, weights=(1, 2)), "2 weights for 3 widths"),
        (lambda: MatryoshkaLoss(in_batch, DIMS, per_step=4), "per_step is 4"),
        (lambda: MatryoshkaLoss(torch.mean, DIMS, reduction="sum")(torch.ones(2, 8)), "one number"),
        (lambda: MatryoshkaLoss(torch.mean, DIMS)(torch.ones(2, 7)), "8 dimensions is wider"),
        (lambda: nested_cross_entropy([torch.ones(2, 3)], torch.tensor([0, 1]), reduction="typo"), "typo"),
        (lambda: nested_cross_entropy([torch.ones(0, 3)], torch.zeros(0, dtype=torch.long)), "empty"),
        (lambda: nested(in_batch, [torch.ones(2, 2)] * 2, []), "at least one view"),
        (lambda: funnel_search(torch.ones(9, 8), torch.ones(1, 8), DIMS, (4,)), "2 shortlists"),
        (lambda: funnel_search(torch.ones(9, 8), torch.ones(1, 8), DIMS, (2, 4)), "descending"),
        (lambda: funnel_search(torch.ones(9, 8), torch.ones(1, 8), DIMS, (2, 0)), "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
