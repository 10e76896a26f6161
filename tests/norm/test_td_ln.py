"""`td_ln`: the equations by hand, the time of a model, what is not decayed, the recorded vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.norm import (
    TimeDependentLayerNorm,
    TimeDependentParameter,
    TimeDependentRMSNorm,
    at_time,
    decay_groups,
    set_time,
)
from laconic.testing import Case, Example

TRAITS = ("gradient:exact", "batch_independent_eval")
EXAMPLES = [
    Example(
        lambda: TimeDependentParameter((2, 3), 1.0),
        kind="Layer",
        traits=TRAITS,
        inputs=[(4,)],
        wrong=[(4, 1)],
        stated={"output": (4, 2, 3)},
    ),
    Example(
        lambda: TimeDependentLayerNorm(6),
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4, 6), (3,)],
        wrong=[(3, 4, 5), (3,)],
    ),
    Example(lambda: TimeDependentRMSNorm(6), kind="Layer", traits=TRAITS, inputs=[(3, 6), (3,)], wrong=[(3, 6), (2,)]),
]
NORMS = {"layer_norm": TimeDependentLayerNorm, "rms_norm": TimeDependentRMSNorm}


def run_vector(case: Case):
    args = case.args
    layer = NORMS[args["norm"]](args["dim"], args["eps"], divisor=args["log_snr_divisor"])
    layer.load_state_dict({name: case.array(name) for name in layer.state_dict()})
    x, log_snr = case.array("input").requires_grad_(), case.array("log_snr")
    with at_time(layer, log_snr):
        assert (len(layer.log_snr) == 1) is (args["log_snr_equal_in_batch"] or len(log_snr) == 1)
        y = layer(x)
    y.backward(case.array("grad_output"))
    grads = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y, "grad_input": x.grad, **grads}


def lively(norm: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return norm


def test_the_equation():
    theta = lively(TimeDependentParameter(3, 1.0).double())
    found = theta(torch.tensor([-3.0, 5.0]))
    for row, log_snr in zip(found.tolist(), (-3.0, 5.0), strict=True):
        for i, value in enumerate(row):
            p0, p1, w, b = (getattr(theta, name)[i].item() for name in ("p0", "p1", "w", "b"))
            s = 1 / (1 + math.exp(-(log_snr / 4 * (1 + w) + b)))
            assert value == pytest.approx(s * p0 + (1 - s) * p1)


@pytest.mark.parametrize("make", [TimeDependentLayerNorm, TimeDependentRMSNorm])
def test_at_a_fixed_time_it_is_an_ordinary_norm(make):
    norm, x, when = lively(make(5, dtype=torch.float64)), torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([1.5])
    gain = norm.gain(when)[0]
    if norm.shift is not None:
        want = nn.functional.layer_norm(x, (5,), gain, norm.shift(when)[0])
    else:
        want = nn.functional.rms_norm(x, (5,), gain, 0.0)
    torch.testing.assert_close(norm(x, when), want)
    torch.testing.assert_close(norm(x, when.expand(3)), want)


def test_nothing_depends_on_time_at_the_start():
    norm, x = TimeDependentLayerNorm(4), torch.randn(2, 4)
    torch.testing.assert_close(norm(x, torch.tensor([-9.0, 9.0])), nn.LayerNorm(4)(x))


def test_a_model_is_told_the_time():
    model, x = nn.Sequential(nn.Linear(4, 4), lively(TimeDependentLayerNorm(4))), torch.randn(2, 4)
    with pytest.raises(ValueError, match="at which time"):
        model(x)
    with at_time(model, torch.tensor([1.0, 1.0])):
        assert model[1].log_snr.tolist() == [1.0]
        same = model(x)
    assert model[1].log_snr is None
    assert set_time(model, torch.tensor([1.0, 2.0])) == 1
    assert torch.equal(model(x)[0], same[0]) and not torch.equal(model(x)[1], same[1])
    with pytest.raises(ValueError, match="2 times for a batch of 3"):
        model(torch.randn(3, 4))
    with pytest.raises(ValueError, match="Linear has no time-dependent norm"), at_time(model[0], torch.ones(1)):
        pass
    with pytest.raises(ValueError, match="eps is -1"):
        TimeDependentLayerNorm(4, -1.0)


def test_w_and_b_are_not_decayed():
    model = nn.Sequential(nn.Linear(4, 4), TimeDependentRMSNorm(4))
    decayed, free = decay_groups(model, 0.1)
    assert {id(p) for p in free["params"]} == {id(model[1].gain.w), id(model[1].gain.b)}
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    assert len(decayed["params"]) == 4
    assert "TimeDependentRMSNorm(\n  4, eps=1e-08" in repr(model[1])


def test_half_precision_is_computed_in_float32():
    x = (300 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).half()
    for make in NORMS.values():
        y = make(64, dtype=torch.float16)(x, torch.ones(1).half())
        assert y.dtype == torch.float16 and bool(y.isfinite().all())
