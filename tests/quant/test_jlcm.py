"""`jlcm`: k-means and groups, gradients by hand, what joint training gains, what is stored, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput
from laconic.numerics import NotFinite
from laconic.quant import Codebook, code_jumps, jlcm, k_means, proximal_gradient, row_groups
from laconic.quant._jlcm import decode, nearest
from laconic.testing import Example

EXAMPLES = [
    Example(
        lambda weight: Codebook(weight, 2, 2), name="Codebook", kind="Weight", traits=("gradient:surrogate",)
    ),
    Example(
        lambda weight: Codebook(weight, 2, 2, proximal="softmax"), name="Codebook", kind="Weight",
        traits=("gradient:surrogate",),
    ),
]  # fmt: skip


def network(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12)).eval()
    return model, torch.randn(200, 16) @ torch.randn(16, 16)


def test_k_means_is_at_rest_and_weighted() -> None:
    torch.manual_seed(1)
    v, w = torch.randn(200), torch.rand(200)
    centres = k_means(v, w, 4, rounds=500)
    index = nearest(v[None].double(), centres[None])[0]
    for k in range(4):
        mine = index == k
        assert float(centres[k]) == pytest.approx(float((w * v)[mine].sum() / w[mine].sum()), rel=1e-5)
    heavy = k_means(torch.tensor([0.0, 1.0, 10.0]), torch.tensor([1.0, 3.0, 1.0]), 2)
    assert heavy.tolist() == [0.75, 10.0]


def test_an_empty_codeword_goes_where_the_error_is() -> None:
    v = torch.cat([torch.zeros(50), torch.tensor([5.0, 9.0])])
    found = k_means(v, torch.ones(52), 3)
    assert found.tolist() == [0.0, 5.0, 9.0]
    assert k_means(torch.zeros(5), torch.ones(5), 4).tolist() == [0.0] * 4  # nothing to tell apart


def test_groups_are_of_rows_that_are_spread_alike() -> None:
    torch.manual_seed(2)
    scale = torch.tensor([1.0, 10.0, 1.0, 10.0, 1.0, 10.0])
    found = row_groups(torch.randn(6, 300) * scale[:, None], 2)
    assert len(set(found[::2].tolist())) == 1 and len(set(found[1::2].tolist())) == 1 and found[0] != found[1]
    assert torch.bincount(row_groups(torch.randn(10, 5), 3)).tolist() == [4, 3, 3]
    assert row_groups(torch.randn(3, 5), 9).sort().values.tolist() == [0, 1, 2]


def test_the_nearest_codeword_whatever_their_order() -> None:
    torch.manual_seed(3)
    books, v = torch.randn(5, 4), torch.randn(5, 30)
    want = (v[:, :, None] - books[:, None, :]).abs().argmin(-1)
    assert torch.equal(nearest(v, books), want)


def test_gradients_by_hand() -> None:
    torch.manual_seed(4)
    w, up = torch.randn(4, 5), torch.randn(4, 5)
    for proximal in ("nearest", "softmax", "naive"):
        book = Codebook(w, 2, 2, proximal=proximal)
        u = w.clone().requires_grad_()
        book(u).backward(up)
        m = book.indices(w)
        want = torch.zeros(2, 4)
        for i in range(4):
            for j in range(5):
                want[book.group[i], m[i, j]] += up[i, j]
        torch.testing.assert_close(book.codebook.grad, want)
        if proximal == "nearest":
            assert torch.equal(u.grad, up)
            continue
        assert not u.grad.any()
        c = book.codebook.detach()[book.group]
        for i in range(4):
            spacing = float(c[i].max() - c[i].min()) / 3
            for j in range(5):
                for k in range(4):
                    apart = float(c[i, k] - c[i, m[i, j]])
                    rule = apart if proximal == "naive" else spacing**2 / (abs(apart) + spacing) * (apart > 0 or -1)
                    rule = 0.0 if k == m[i, j] else rule
                    assert float(book.logits.grad[i, j, k]) == pytest.approx(float(up[i, j]) * rule, abs=1e-5)


def test_the_proximal_rule_falls_with_distance() -> None:
    codewords = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    index, w = torch.tensor([[0]]), torch.tensor([[0.0]])
    near, naive = (proximal_gradient(torch.ones(1, 1), w, codewords, index, naive)[0, 0] for naive in (False, True))
    assert near[0] == 0 and near[1] > near[2] > near[3] > 0
    assert naive.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("proximal", ["nearest", "softmax"])
def test_learning_both_lowers_the_error(proximal: str) -> None:
    model, x = network(5)
    learned = copy.deepcopy(model)
    done = jlcm(learned, [x], 2, groups=2, steps=80, proximal=proximal, batch=None, lr_index=3e-3)
    assert done["0"].after < done["0"].before and done["2"].after < 0.9 * done["2"].before
    start = copy.deepcopy(model)
    jlcm(start, [x], 2, groups=2, steps=0, proximal=proximal)
    before, after = (m[0].parametrizations.weight for m in (start, learned))
    assert torch.equal(before[0].group, after[0].group)
    moved = code_jumps(
        before[0].indices(before.original), after[0].indices(after.original), after[0].codebook, after[0].group
    )
    assert int(moved.sum()) == 24 * 16 and int(moved[1:].sum()) > 0 and moved[1] >= moved[3]


def test_outputs_weigh_columns_by_their_inputs() -> None:
    model, x = network(6)
    x[:, 0] *= 30
    off = {}
    for metric in ("output", "weight"):
        made = copy.deepcopy(model)
        off[metric] = jlcm(made, [x], {"0": 2}, groups=1, steps=0, metric=metric)["0"].before
    assert off["output"] < off["weight"]


def test_what_is_stored_comes_back() -> None:
    model, x = network(7)
    jlcm(model, [x], {"0": 1, "2": 3}, groups=3, steps=0)
    for layer, bits in ((model[0], 1), (model[2], 3)):
        held = layer.parametrizations.weight
        stored = held[0].encode(held.original)
        back = decode(stored, bits, layer.weight.shape[1])
        torch.testing.assert_close(back, layer.weight.detach(), rtol=1e-3, atol=1e-4)
        rows, k = layer.weight.shape
        assert held[0].nbytes(held.original) == rows * 4 * -(-k * bits // 32) + 2 * 3 * 2**bits + rows
    want = model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model(x), want)


def test_convolutions_and_what_is_refused() -> None:
    torch.manual_seed(8)
    conv = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)).eval()
    x = torch.randn(20, 2, 7, 7)
    done = jlcm(conv, [x], 3, steps=2)
    assert set(done) == {"0", "2"} and len(conv[0].weight.unique()) <= 8 * 2
    model, x = network(8)
    with pytest.raises(BadInput, match="'1' is no linear"):
        jlcm(model, [x], {"1": 2})
    with pytest.raises(BadInput, match="metric='loss'"):
        jlcm(model, [x], metric="loss")
    with pytest.raises(BadInput, match="4 with logits"):
        Codebook(torch.ones(2, 2), 5, proximal="softmax")
    with pytest.raises(BadInput, match="there is none"):
        jlcm(model, [])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    tied[1].weight = tied[0].weight
    with pytest.raises(BadInput, match="0: its weight is tied: 0.weight = 1.weight"):
        jlcm(tied, [torch.ones(2, 4)], {"0": 2})
    with pytest.raises(BadInput, match="no layer that can be rounded"):
        jlcm(tied, [torch.ones(2, 4)])
    with pytest.raises(BadInput, match="float16"):
        Codebook(torch.full((2, 2), 1e6)).encode(torch.full((2, 2), 1e6))
    flat = Codebook(torch.full((3, 4), 0.5), 2)
    assert torch.equal(flat(torch.full((3, 4), 0.5)), torch.full((3, 4), 0.5))
    broken, x = network(9)
    broken[2].weight.data[0, 0] = torch.inf
    with pytest.raises((NotFinite, BadInput), match="^2"):
        jlcm(broken, [x], {"2": 2})
