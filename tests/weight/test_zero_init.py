"""`zero_init`: against scipy's Hadamard matrices, each kind of layer, what is refused, and the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from laconic.errors import BadInput
from laconic.testing import Case, Example
from laconic.weight import zero_init_, zero_matrix


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))


def as_stated(model):
    """The stem's centre is a Hadamard block and the head a partial identity, all else is 0; the norm is as it was."""
    stem, norm, head = model[0], model[1], model[3]
    block = torch.tensor(hadamard(8)[:, :3], dtype=stem.weight.dtype) / 8**0.5
    around = stem.weight.abs().sum() - stem.weight[:, :, 1, 1].abs().sum()
    return (
        torch.equal(stem.weight[:, :, 1, 1], block)
        and around == 0
        and torch.equal(head.weight, torch.eye(5, 32, dtype=head.weight.dtype))
        and not stem.bias.any()
        and not head.bias.any()
        and bool((norm.weight == 1).all())
    )


EXAMPLES = [
    Example(
        lambda: zero_init_,
        kind="Init",
        name="zero_init_",
        traits=("deterministic",),
        inputs=lambda g: [network()],
        holds=as_stated,
    )
]


def run_vector(case: Case):
    sizes = case.args["in_features"], case.args["out_features"]
    return {"weight": zero_init_(nn.Linear(*sizes)).weight}


@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (8, 7), (9, 2), (64, 48), (33, 32)])
def test_the_equation_where_a_layer_widens(shape):
    m, n = shape
    p = 1
    while p < m:
        p *= 2
    want = torch.tensor(hadamard(p)[:m, :n] / p**0.5, dtype=torch.float64)
    torch.testing.assert_close(zero_matrix(m, n, dtype=torch.float64), want)
    assert torch.linalg.matrix_rank(zero_matrix(m, n)) == n


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7)])
def test_the_equation_where_it_does_not(shape):
    assert torch.equal(zero_matrix(*shape), torch.eye(*shape))


def test_a_convolution_of_equal_widths_is_the_identity():
    for layer, shape in (
        (nn.Conv1d(4, 4, 5, padding=2), (2, 4, 9)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 5, 5)),
        (nn.Conv3d(4, 4, 3, padding=1, groups=4), (2, 4, 3, 3, 3)),
        (nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), (2, 4, 5, 5)),
    ):
        x = torch.randn(shape)
        assert torch.equal(zero_init_(layer)(x), x)


def test_groups_and_transposed_convolutions_have_the_matrix_of_each_group():
    grouped = zero_init_(nn.Conv1d(4, 6, 1, groups=2))
    for g in range(2):
        assert torch.equal(grouped.weight[3 * g : 3 * g + 3, :, 0], zero_matrix(3, 2))
    transposed = zero_init_(nn.ConvTranspose1d(4, 6, 1, groups=2))
    for g in range(2):
        assert torch.equal(transposed.weight[2 * g : 2 * g + 2, :, 0].t(), zero_matrix(3, 2))


def test_named_layers_start_at_zero():
    model = nn.ModuleDict({"block0": nn.Linear(3, 3), "block1": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    zero_init_(model, zero=["block*"])
    assert not model["block0"].weight.any() and not model["block1"].weight.any()
    assert torch.equal(model["head"].weight, torch.eye(2, 3))


def test_tied_layers_stay_tied():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = zero_init_(nn.Sequential(first, second))
    assert model[1].weight is model[0].weight and torch.equal(first.weight, torch.eye(3))


def test_refusals():
    with pytest.raises(BadInput, match="ReLU has no linear layer"):
        zero_init_(nn.ReLU())
    with pytest.raises(BadInput, match=r"no layer's path fits 'conv\*'; there are 0, 3"):
        zero_init_(network(), zero=["conv*"])
    with pytest.raises(BadInput, match="parametrization computes the weight of 0"):
        zero_init_(nn.Sequential(weight_norm(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"a matrix \(0, 3\)"):
        zero_matrix(0, 3)
