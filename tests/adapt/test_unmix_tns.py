"""`unmix_tns`: the equations one instance at a time, K = 1, what moves and when, and the recorded vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.adapt import UnMixNorm, UnMixTNS, assignments, batch_momentum, first_components
from laconic.errors import BadInput
from laconic.testing import Case, Example


def classifier() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3)
        )
        for _ in range(5):
            model(torch.randn(8, 2, 5, 5))
    return model.eval()


EXAMPLES = [
    Example(
        lambda: UnMixTNS.attach(classifier(), batch_size=4, components=3),
        kind="Protocol",
        name="UnMixTNS",
        traits=("order:dependent",),
        inputs=lambda g: [[(3 * torch.randn(4, 2, 5, 5, generator=g),) for _ in range(4)], torch.randn(3, 2, 5, 5)],
    )
]


def run_vector(case: Case):
    args = case.args
    if "source_weight" in args:
        return NotImplemented
    if "noise" in args:
        var = case.array("source_var")
        _, variances = first_components(torch.zeros_like(var), var, args["components"], args["alpha"])
        return {"component_vars": variances}
    rate = batch_momentum(args["bn_momentum"], args["batch_size"], args["batch_size_max"])
    found = {"momentum": torch.tensor(rate, dtype=torch.float64)}
    if "input" not in case:
        return found
    layer = UnMixNorm(
        args["num_features"],
        args["eps"],
        batch_size=args["batch_size"],
        components=args["components"],
        batch_size_max=args["batch_size_max"],
        temperature=args["temperature"],
        momentum=args["bn_momentum"],
    )
    names = {
        "weight": "weight",
        "bias": "bias",
        "running_mean": "source_mean",
        "running_var": "source_var",
        "component_means": "component_means",
        "component_vars": "component_vars",
    }
    layer.load_state_dict({ours: case.array(theirs) for ours, theirs in names.items()})
    roles = ("output", "grad_input", "grad_weight", "grad_bias", "component_means_after", "component_vars_after")
    found |= {role: [] for role in roles}
    for x, grad in zip(case.arrays("input"), case.arrays("grad_output"), strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        values = (y, x.grad, layer.weight.grad, layer.bias.grad, state["component_means"], state["component_vars"])
        for role, value in zip(roles, values, strict=True):
            found[role].append(value)
    return found


def test_the_equation():
    """One instance, one channel, one component at a time, with numbers."""
    g = torch.Generator().manual_seed(0)
    layer = UnMixNorm(2, batch_size=3, components=4, temperature=0.5, generator=g, dtype=torch.float64)
    means, variances = layer.component_means.clone(), layer.component_vars.clone()
    x = torch.randn(3, 2, 2, 3, generator=g, dtype=torch.float64)
    y = layer(x)
    moved = [[0.0] * 2 for _ in range(4)]
    for b in range(3):
        own = [x[b, c].mean().item() for c in range(2)]
        spread = [x[b, c].var(correction=0).item() for c in range(2)]
        cosine = [
            sum(own[c] * means[k, c].item() for c in range(2)) / (math.hypot(*own) * math.hypot(*means[k].tolist()))
            for k in range(4)
        ]
        exps = [math.exp(value / 0.5) for value in cosine]
        p = [value / sum(exps) for value in exps]
        for c in range(2):
            m = [(1 - p[k]) * means[k, c].item() + p[k] * own[c] for k in range(4)]
            v = [(1 - p[k]) * variances[k, c].item() + p[k] * spread[c] for k in range(4)]
            middle = sum(m) / 4
            var = sum(v) / 4 + sum(u * u for u in m) / 4 - middle**2
            want = (x[b, c] - middle) / math.sqrt(var + layer.eps)
            torch.testing.assert_close(y[b, c], want)
            for k in range(4):
                moved[k][c] += layer.rate * p[k] * (own[c] - means[k, c].item()) / 3
    torch.testing.assert_close(layer.component_means - means, torch.tensor(moved, dtype=torch.float64))


def test_one_component_starts_as_the_source():
    norm = nn.BatchNorm2d(3)
    for _ in range(4):
        norm(2 * torch.randn(4, 3, 5, 5) + 1)
    layer = UnMixNorm.from_batchnorm(norm.eval(), components=1, batch_size=4)
    assert torch.equal(layer.component_means[0], norm.running_mean)
    assert torch.equal(layer.component_vars[0], norm.running_var)


def test_components_stand_around_the_source_with_its_variance():
    norm = nn.BatchNorm2d(2)
    norm.running_mean.copy_(torch.tensor([5.0, -3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    layer = UnMixNorm.from_batchnorm(
        norm, components=4000, batch_size=4, generator=torch.Generator().manual_seed(0), alpha=0.3
    )
    total = layer.component_vars.mean(0) + layer.component_means.var(0, correction=0)
    torch.testing.assert_close(total, norm.running_var, rtol=0.05, atol=0)
    torch.testing.assert_close(layer.component_means.mean(0), norm.running_mean, rtol=0.02, atol=0)


def test_an_instance_does_not_see_its_batch_in_the_same_call():
    layer = UnMixNorm(3, batch_size=4, generator=torch.Generator().manual_seed(0))
    x, other = torch.randn(1, 3, 4, 4), 100 + torch.randn(3, 3, 4, 4)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    alone = layer(x)
    layer.load_state_dict(start)
    torch.testing.assert_close(layer(torch.cat([x, other]))[:1], alone)


def test_the_seed_is_the_start_and_reset_returns_to_it():
    x = torch.randn(4, 2, 5, 5)
    outputs = []
    for seed in (0, 0, 1):
        with UnMixTNS.attach(classifier(), batch_size=4, seed=seed) as stream:
            first = stream.update(x)
            assert not torch.equal(stream.update(x), first)  # the components moved
            stream.reset()
            assert torch.equal(stream.update(x), first)
            outputs.append(first)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_without_places_the_source_stays():
    with UnMixTNS.attach(classifier(), batch_size=4) as stream:
        assert list(stream.layers) == ["1"] and "BatchNorm1d" in stream.left["5"]
    with pytest.raises(BadInput, match="no batch norm of the model"):
        UnMixTNS.attach(nn.Sequential(nn.BatchNorm1d(3)), batch_size=4)


def test_a_smaller_batch_moves_as_little_as_its_size():
    """Four batches of 16 leave as much of the old as one of 64."""
    assert (1 - batch_momentum(0.1, 16, 64)) ** 4 == pytest.approx(1 - 0.1)
    assert batch_momentum(0.1, 64, 64) == pytest.approx(0.1)


def test_an_instance_of_zeros_is_of_all_components():
    p = assignments(torch.zeros(1, 3), torch.randn(4, 3), 0.07)
    torch.testing.assert_close(p, torch.full((1, 4), 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha": 1.5}, "alpha=1.5"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        UnMixNorm(3, **{"batch_size": 4, **options})
