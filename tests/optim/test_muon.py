"""`muon`: its equations written out, what it makes of singular values, and who gets AdamW instead."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from laconic.core.spectral import newton_schulz
from laconic.errors import BadInput
from laconic.optim import Muon, muon, muon_groups
from laconic.testing import Case, Example


def naive_newton_schulz(x, steps=5, a=3.4445, b=-4.7750, c=2.0315, eps=1e-7):
    """The iteration by what it does to each singular value, from a full decomposition."""
    p, s, q = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.square().sum().sqrt() + eps)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return p @ torch.diag(s) @ q


def naive_muon(values, gradients, lr=0.05, decay=0.1, beta=0.95, nesterov=True):
    """The equations of Muon."""
    values = [p.clone() for p in values]
    momenta = [torch.zeros_like(p) for p in values]
    for step in gradients:
        for i, g in enumerate(step):
            momenta[i] = beta * momenta[i] + (1 - beta) * g
            u = (1 - beta) * g + beta * momenta[i] if nesterov else momenta[i]
            matrix = u.reshape(len(u), -1)
            scale = math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
            update = scale * naive_newton_schulz(matrix).view_as(u)
            values[i] = values[i] * (1 - lr * decay) - lr * update
    return values


def torch_adamw(values, gradients):
    """AdamW of torch."""
    params = [nn.Parameter(p.clone()) for p in values]
    optimizer = torch.optim.AdamW(params, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


EXAMPLES = [
    Example(
        lambda params: Muon(params, lr=0.05, weight_decay=0.1, precision=None),
        kind="Optimizer",
        inputs=[(4, 3), (2, 3, 2, 1)],
        reference=naive_muon,
    ),
    Example(
        lambda params: Muon(params, lr=0.02, weight_decay=0.1, muon=False), kind="Optimizer", reference=torch_adamw
    ),
]


def run_vector(case: Case) -> dict[str, Tensor | list[Tensor]]:
    """The iteration in two precisions, or the updates and the momentum of some steps."""
    args = case.args
    coefficients = tuple(args["coefficients"])
    if "input" in case:
        g = case.array("input")
        steps = [coefficients] * args["ns_steps"]
        found = {"output_float64": torch.float64, "output_bfloat16": torch.bfloat16}
        return {role: newton_schulz(g, steps, eps=args["eps"], dtype=dtype) for role, dtype in found.items()}
    gradients = case.arrays("grad")
    buffer = torch.full_like(gradients[0], args["momentum_init"])
    updates, momenta = [], []
    for g in gradients:
        update = muon(
            g, buffer, momentum=args["momentum"], nesterov=args["nesterov"], ns_steps=args["ns_steps"],
            coefficients=coefficients, eps=args["eps"], precision=args["compute_dtype"],
        )  # fmt: skip
        updates.append(update)
        momenta.append(buffer.clone())
    return {"update_bfloat16": updates, "momentum_after": momenta}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 3, 2, 2)])
def test_equations_of_every_shape(shape, nesterov):
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    p = nn.Parameter(weight.clone())
    optimizer = Muon([p], lr=0.05, weight_decay=0.1, nesterov=nesterov, precision="float64")
    for g in gradients:
        p.grad = g
        optimizer.step()
    want = naive_muon([weight], [[g] for g in gradients], nesterov=nesterov)
    torch.testing.assert_close(p.detach(), want[0], rtol=1e-9, atol=1e-9)


def test_a_step_has_even_singular_values_and_the_vectors_of_the_gradient():
    generator = torch.Generator().manual_seed(0)
    p, _, q = torch.linalg.svd(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    gradient = p @ torch.diag(torch.tensor([1, 0.5, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)) @ q
    update = muon(gradient, torch.zeros_like(gradient), precision="float64")
    found = p.T @ update @ q.T
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-9
    assert found.diagonal().min() > 0.65 and found.diagonal().max() < 1.25


@pytest.mark.parametrize(("shape", "original", "rms"), [((8, 2), 2.0, 0.2 * 8**0.5), ((2, 8), 1.0, 0.2 * 8**0.5)])
def test_scales(shape, original, rms):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = newton_schulz(gradient * 0.05, dtype=torch.float32)
    for scale, factor in (("original", original), ("match_rms_adamw", rms)):
        found = muon(gradient, torch.zeros(shape), nesterov=False, scale=scale, precision="float32")
        torch.testing.assert_close(found, factor * plain, rtol=1e-4, atol=1e-5)


def test_torch_takes_the_same_steps():
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    a = Muon([ours], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for step in range(3):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 + step))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # both in bfloat16


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.norm = nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.words.weight


def test_groups_of_a_tied_model():
    model = Tied()
    matrices, rest = muon_groups(model, lr=0.03, adam_lr=0.001)
    assert [id(p) for p in matrices["params"]] == [id(model.hidden.weight)]
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in (model.words.weight, model.hidden.bias, *model.norm.parameters(), model.head.bias)
    }
    assert (matrices["lr"], matrices["muon"], rest["lr"], rest["muon"]) == (0.03, True, 0.001, False)


def test_a_pattern_that_fits_nothing_and_a_model_without_matrices_are_refused():
    with pytest.raises(BadInput, match=r"no parameter's name fits 'lm_head\.\*'; they are words.weight"):
        muon_groups(Tied(), adam=["lm_head.*"])
    with pytest.raises(BadInput, match="no hidden matrix"):
        muon_groups(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"scale": "none"}, "scale is 'none'"),
        ({"ns_steps": -1}, "ns_steps is -1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **options)


def test_a_vector_is_no_matrix():
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(BadInput, match=r"shape \(3,\) is no matrix: put it in a group with muon=False"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "muon": False})
    assert len(optimizer.param_groups) == 2
