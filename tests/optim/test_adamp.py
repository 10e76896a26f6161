"""`adamp`: AdamP and SGDP against their equations written out, and against what the released code computed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.optim import SGDP, AdamP, invariant_rows
from laconic.testing import Case, Example, VectorFile

VECTORS = Path(__file__).parents[1] / "vectors"


def naive_projection(p, g, u, delta=0.1, eps=1e-8):
    """The projection, row by row in plain numbers: the step, and whether it was projected."""
    if p.ndim < 2:
        return u, False
    for rows in (p.shape[0], 1):
        weights, gradients, steps = (x.reshape(rows, -1).tolist() for x in (p, g, u))
        cosines = []
        for w, h in zip(weights, gradients, strict=True):
            dot = sum(a * b for a, b in zip(w, h, strict=True))
            cosines.append(abs(dot) / (math.hypot(*w) * math.hypot(*h)))
        if max(cosines) < delta / math.sqrt(len(weights[0])):
            for w, s in zip(weights, steps, strict=True):
                n = [a / (math.hypot(*w) + eps) for a in w]
                along = sum(a * b for a, b in zip(n, s, strict=True))
                s[:] = [b - a * along for a, b in zip(n, s, strict=True)]
            return torch.tensor(steps, dtype=p.dtype).view_as(p), True
    return u, False


def naive_adamp(values, gradients, lr=0.02, decay=0.1, b1=0.9, b2=0.999, eps=1e-8, nesterov=False):
    """The equations of AdamP, from the initial values to those after the last step."""
    values = [p.clone() for p in values]
    means, squares = [torch.zeros_like(p) for p in values], [torch.zeros_like(p) for p in values]
    for t, step in enumerate(gradients, 1):
        for i, g in enumerate(step):
            p = values[i]
            means[i] = b1 * means[i] + (1 - b1) * g
            squares[i] = b2 * squares[i] + (1 - b2) * g * g
            top = b1 * means[i] + (1 - b1) * g if nesterov else means[i]
            u = top / (torch.sqrt(squares[i] / (1 - b2**t)) + eps)
            u, found = naive_projection(p, g, u)
            values[i] = p * (1 - lr * decay * (0.1 if found else 1)) - lr / (1 - b1**t) * u
    return values


def naive_sgdp(values, gradients, lr=0.05, decay=0.1, mu=0.9, dampening=0.0, nesterov=False, project_buffer=False):
    """The equations of SGDP."""
    values = [p.clone() for p in values]
    buffers = [torch.zeros_like(p) for p in values]
    for step in gradients:
        for i, g in enumerate(step):
            p = values[i]
            buffers[i] = mu * buffers[i] + (1 - dampening) * g
            u, found = naive_projection(p, g, g + mu * buffers[i] if nesterov else buffers[i])
            if project_buffer:
                buffers[i] = u
            values[i] = p * (1 - lr * decay * (0.1 if found else 1) / (1 - mu)) - lr * u
    return values


EXAMPLES = [
    Example(lambda params: AdamP(params, lr=0.02, weight_decay=0.1), kind="Optimizer", reference=naive_adamp),
    Example(
        lambda params: SGDP(params, lr=0.05, momentum=0.9, weight_decay=0.1), kind="Optimizer", reference=naive_sgdp
    ),
]


def run_vector(case: Case) -> dict[str, Tensor | list[Tensor]]:
    """The parameter after each step."""
    args = case.args
    p = nn.Parameter(case.array("param" if "param" in case else "param_init"))
    shared = {name: args[name] for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")}
    if "betas" in args:
        optimizer: torch.optim.Optimizer = AdamP([p], betas=tuple(args["betas"]), **shared)
    else:
        options = {name: args[name] for name in ("momentum", "dampening", "project_buffer")}
        optimizer = SGDP([p], **shared, **options)
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p, args["momentum_init"])
    after = []
    for gradient in case.arrays("grad"):
        p.grad = gradient
        optimizer.step()
        after.append(p.detach().clone())
    return {"param_after": after}


@pytest.mark.parametrize("name", ["adamp", "sgdp"])
def test_the_recorded_steps_are_the_projected_ones(name):
    for case in VectorFile.read(name, VECTORS).cases():
        start = case.array("param" if "param" in case else "param_init")
        before = [start, *case.expected("param_after")]
        found = [
            step
            for step, gradient in enumerate(case.arrays("grad"))
            if invariant_rows(before[step], gradient, case.args["delta"], case.args["eps"]) is not None
        ]
        assert found == case.args.get("projected_steps", case.args.get("projection_expected_steps"))


def invariant_steps(rows: int, count: int = 4):
    """A (4, 6) weight and gradients orthogonal to its value at the start of every step, in `rows` rows."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    draws = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(count)]

    def orthogonal(p: Tensor, draw: Tensor) -> Tensor:
        w, g = p.detach().reshape(rows, -1), draw.reshape(rows, -1)
        return (g - w * (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)).view_as(p)

    return weight, draws, orthogonal


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(
    ("rule", "nesterov"),
    [("adamp", False), ("adamp", True), ("sgdp", False), ("sgdp", True), ("sgdp, buffer projected", False)],
)
def test_equations_where_the_projection_applies(rule, nesterov, rows):
    weight, draws, orthogonal = invariant_steps(rows)
    p = nn.Parameter(weight.clone())
    buffered = rule == "sgdp, buffer projected"
    if rule == "adamp":
        optimizer: torch.optim.Optimizer = AdamP([p], lr=0.02, weight_decay=0.1, nesterov=nesterov)
    else:
        optimizer = SGDP(
            [p], lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.1, nesterov=nesterov, project_buffer=buffered
        )
    gradients = []
    for draw in draws:
        p.grad = orthogonal(p, draw)
        gradients.append([p.grad.clone()])
        assert invariant_rows(p, p.grad, 0.1, 1e-8) == rows
        optimizer.step()
    if rule == "adamp":
        want = naive_adamp([weight], gradients, nesterov=nesterov)
    else:
        want = naive_sgdp([weight], gradients, dampening=0.2, nesterov=nesterov, project_buffer=buffered)
    torch.testing.assert_close(p.detach(), want[0], rtol=1e-12, atol=1e-12)


def test_a_projected_step_is_orthogonal_and_the_momentum_keeps_its_radial_part():
    weight, draws, orthogonal = invariant_steps(1)
    p = nn.Parameter(weight.clone())
    optimizer = SGDP([p], lr=0.1, momentum=0.9)
    for draw in draws:
        before = p.detach().clone()
        p.grad = orthogonal(p, draw)
        optimizer.step()
        assert abs(float(((p.detach() - before) * before).sum())) < 1e-7
    radial = float((optimizer.state[p]["momentum_buffer"] * before).sum())
    assert abs(radial) > 1e-3, "old steps are not orthogonal to where the weight is now"


def test_with_nesterov_momentum_the_stored_momentum_is_never_projected():
    weight, draws, orthogonal = invariant_steps(4)
    after = []
    for project_buffer in (False, True):
        p = nn.Parameter(weight.clone())
        optimizer = SGDP([p], lr=0.1, momentum=0.9, nesterov=True, project_buffer=project_buffer)
        for draw in draws:
            p.grad = orthogonal(p, draw)
            optimizer.step()
        after.append(p.detach())
    assert torch.equal(*after)


def test_without_scale_invariance_adamp_is_adamw():
    weight = torch.ones(3, 4)
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    a = AdamP([ours], lr=0.01, weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = p.detach().clone()  # along the weight
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_parameters_of_one_dimension_are_never_projected():
    assert invariant_rows(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.1, 1e-8) is None
    assert invariant_rows(torch.empty(0, 3), torch.empty(0, 3), 0.1, 1e-8) is None


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (AdamP, {"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        (AdamP, {"delta": float("nan")}, "delta is nan"),
        (AdamP, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (SGDP, {"momentum": 1.0}, "momentum is 1.0"),
        (SGDP, {"wd_ratio": -1.0}, "wd_ratio is -1.0"),
    ],
)
def test_impossible_options_are_refused(rule, options, message):
    with pytest.raises(BadInput, match=message):
        rule([nn.Parameter(torch.ones(2))], lr=0.1, **options)
