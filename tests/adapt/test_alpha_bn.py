"""`alpha_bn`: both ends, the equations by hand, batches of one, and what `Core` learns and leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.adapt import AlphaBN, Core, class_confusion, mixed_statistics
from laconic.errors import BadInput
from laconic.testing import Case, Example


def classifier(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
        for _ in range(5):
            model(torch.randn(8, 2, 5, 5))
    return model.eval()


EXAMPLES = [
    Example(
        lambda: AlphaBN(4, source_weight=0.6, mixture=True),
        kind="Layer",
        traits=("gradient:exact",),
        inputs=[(3, 4, 3, 2)],
        wrong=[(3, 5, 3, 2)],
    ),
    Example(
        lambda: AlphaBN(4, unbiased=False, affine=False),
        kind="Layer",
        traits=("gradient:exact",),
        inputs=[(3, 4)],
        wrong=[(3, 5)],
    ),
    Example(
        lambda: Core(classifier(), lr=0.05, steps=2),
        kind="Protocol",
        traits=("order:dependent",),
        inputs=lambda g: [[(3 * torch.randn(4, 2, 5, 5, generator=g),) for _ in range(4)], torch.randn(3, 2, 5, 5)],
    ),
]


def run_vector(case: Case):
    args = case.args
    if "source_weight" not in args:
        return NotImplemented
    layer = AlphaBN(
        args["num_features"], args["eps"], source_weight=args["source_weight"], unbiased=args["test_var_unbiased"]
    )
    names = {"weight": "weight", "bias": "bias", "running_mean": "source_mean", "running_var": "source_var"}
    layer.load_state_dict({ours: case.array(theirs) for ours, theirs in names.items()})
    return {"output": [layer(x) for x in case.arrays("input")]}


def test_the_ends_are_the_source_and_the_batch():
    model, x = classifier(), 2 * torch.randn(6, 2, 5, 5) + 1
    want = model(x)
    with AlphaBN.attach(model, source_weight=1.0):
        torch.testing.assert_close(model(x), want)
    model[1].train()
    before = model[1].running_mean.clone()
    want = model(x)
    model[1].running_mean.copy_(before)
    model.eval()
    with AlphaBN.attach(model, source_weight=0.0, unbiased=False):
        torch.testing.assert_close(model(x), want)


def test_the_equation():
    g = torch.Generator().manual_seed(0)
    x, mean, var = torch.randn(2, 3, 4, generator=g), torch.randn(3, generator=g), torch.rand(3, generator=g) + 0.5
    for a, unbiased, mixture in ((0.3, True, False), (0.3, False, True)):
        got_mean, got_var = mixed_statistics(x, mean, var, a, unbiased=unbiased, mixture=mixture)
        for c in range(3):
            values = [v for row in x[:, c].tolist() for v in row]
            m = sum(values) / len(values)
            v = sum((u - m) ** 2 for u in values) / (len(values) - unbiased)
            between = a * (1 - a) * (mean[c].item() - m) ** 2 if mixture else 0.0
            assert got_mean[c].item() == pytest.approx(a * mean[c].item() + (1 - a) * m, rel=1e-5)
            assert got_var[c].item() == pytest.approx(a * var[c].item() + (1 - a) * v + between, rel=1e-5)


def test_one_value_a_channel_has_no_variance_of_its_own():
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    for unbiased in (True, False):
        with AlphaBN.attach(model, source_weight=0.5, unbiased=unbiased):
            got = model(torch.full((1, 3), 2.0))
        var = 1.0 if unbiased else 0.5
        torch.testing.assert_close(got, torch.full((1, 3), 1.0 / (var + 1e-5) ** 0.5))


def test_an_empty_batch_and_half_precision_with_a_large_mean():
    layer = AlphaBN(3, source_weight=0.0)
    assert layer(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    x = (torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0)) + 2000).half()
    got = layer.half()(x)
    assert got.dtype == torch.float16 and torch.isfinite(got).all()
    torch.testing.assert_close(got.float().mean((0, 2)), torch.zeros(3), atol=2e-3, rtol=0)
    assert torch.isfinite(AlphaBN(3, source_weight=0.0)(torch.ones(4, 3, 2))).all()  # constant features


def test_the_loss_is_that_of_the_equation():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    p = F.softmax(logits, 1)
    c = [[float((p[:, i] * p[:, j]).sum()) for j in range(3)] for i in range(3)]
    want = sum(c[i][j] / sum(c[i]) for i in range(3) for j in range(3) if i != j) / 3
    assert class_confusion(logits).item() == pytest.approx(want, rel=1e-5)
    assert class_confusion(1000 * torch.eye(3)).item() == pytest.approx(0.0, abs=1e-6)


def test_core_lowers_its_loss_and_leaves_the_model_as_it_was():
    model, x = classifier(), torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Core(model, lr=0.02, steps=20) as core:
        start = class_confusion(core.predict(x))
        core.update(x)
        assert class_confusion(core.predict(x)) < start
        core.reset()
        assert torch.equal(class_confusion(core.predict(x)), start)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_refusals():
    for a in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="source_weight is"):
            AlphaBN(3, source_weight=a)
    with pytest.raises(BadInput, match="at least one step"):
        Core(classifier(), steps=0)
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False)).eval()
    with pytest.raises(BadInput, match="gain that could be learned"):
        Core(model)
    assert type(model[0]) is nn.BatchNorm1d
