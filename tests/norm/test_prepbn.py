"""`prepbn`: the equations by hand, the schedule on optimizer steps, padding, folding, and the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laconic.core.affine import as_affine, before_layer
from laconic.core.fit import fit
from laconic.errors import BadInput
from laconic.norm import (
    AdvanceNorms,
    ProgressiveNorm,
    RepBN,
    RMSNorm,
    advance,
    fading,
    model_is_pure,
    real_tokens,
    to_prepbn,
)
from laconic.testing import Case, Example
from tests.core.training import Points

TRAITS = ("gradient:exact", "batch_independent_eval")
EXAMPLES = [
    Example(
        lambda: RepBN(6, alpha_init=0.7),
        kind="Layer",
        traits=(*TRAITS, "folds"),
        inputs=[(3, 4, 6)],
        wrong=[(3, 4, 5)],
        stated={"channel": -1},
    ),
    Example(
        lambda: RepBN(4, channel_dim=1, momentum=None),
        kind="Layer",
        traits=(*TRAITS, "folds"),
        inputs=[(3, 4, 2, 2)],
        wrong=[(3, 5, 2, 2)],
    ),
    Example(
        lambda: ProgressiveNorm(nn.LayerNorm(6), RepBN(6), steps=8, start=0.6),
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4, 6)],
        wrong=[(3, 4, 5)],
    ),
]
OLD = {"layer_norm": nn.LayerNorm, "rms_norm": lambda d, eps: RMSNorm(d, eps, eps_inside=True)}


def run_vector(case: Case):
    args = case.args
    new = RepBN(args["num_features"], args["bn_eps"], args["bn_momentum"])
    new.stat.unbiased = args["running_var_unbiased"]
    names = [name for name in new.state_dict() if f"new.{name}" in case or name in case]
    new.load_state_dict({n: case.array(f"new.{n}" if f"new.{n}" in case else n) for n in names}, strict=False)
    if not args["training"]:
        return {"output": new.eval()(case.array("input"))}
    old = OLD[args["old_norm"]](args["num_features"], eps=args["old_norm_eps"])
    old.load_state_dict({name: case.array(f"old.{name}") for name in old.state_dict()})
    layer = ProgressiveNorm(old, new, args["warmup"], args["decay_steps"], args["start"], per_call=True)
    counters = {"warmup_counter": "warmup_left", "decay_counter": "left", "decay_total": "total"}
    for role, name in counters.items():
        getattr(layer, name).copy_(case.array(role))
    found = {role: [] for role in case.roles if role.startswith(("output", "grad_")) and role != "grad_output"}
    found |= {role: [] for role in case.roles if role.endswith("_after")}
    inner = {f"grad_{path}": p for path, p in layer.named_parameters()}
    for x, grad in zip(case.arrays("input"), case.arrays("grad_output"), strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        found["output"].append(y)
        found["grad_input"].append(x.grad)
        ran = {"old": True, "new": new.weight.grad is not None}
        for role, parameter in inner.items():
            if role in found and ran[role.split("_")[1].split(".")[0]]:
                # After the decay the old norm is not run; the recorded code runs it and multiplies by 0.
                found[role].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for role, name in counters.items():
            found[f"{role}_after"].append(getattr(layer, name).clone())
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            found[f"{name}_after"].append(getattr(new, name).clone())
    return found


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lively(norm: RepBN) -> RepBN:
    for seed, tensor in enumerate((norm.weight, norm.bias, norm.alpha, norm.running_mean)):
        nn.init.normal_(tensor, generator=torch.Generator().manual_seed(seed))
    nn.init.uniform_(norm.running_var, 0.5, 2, generator=torch.Generator().manual_seed(9))
    return norm


def test_the_equation_is_torchs_batch_norm_and_a_scaled_identity():
    norm, bn, x = lively(RepBN(3).double()), nn.BatchNorm1d(3).double(), drawn(4, 5, 3)
    bn.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "alpha"})
    for training in (True, False):
        norm.train(training), bn.train(training)
        want = bn(x.transpose(1, 2)).transpose(1, 2) + norm.alpha * x
        torch.testing.assert_close(norm(x), want)
    for name, buffer in bn.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)


def test_it_is_a_batch_norm_with_other_gains():
    """gamma' = gamma + alpha sigma, beta' = beta + alpha mu."""
    norm, x = lively(RepBN(3).double()).eval(), drawn(4, 3)
    sigma = (norm.running_var + norm.eps).sqrt()
    gain, shift = norm.weight + norm.alpha * sigma, norm.bias + norm.alpha * norm.running_mean
    torch.testing.assert_close(norm(x), gain * (x - norm.running_mean) / sigma + shift)


def test_padding_is_left_out():
    x, mask = drawn(2, 4, 3), torch.tensor([[True, True, False, False], [True, True, True, False]])
    x[~mask] = 100
    norm, alone = RepBN(3).double(), RepBN(3).double()
    y, want = norm(x, mask), alone(x[mask])
    torch.testing.assert_close(y[mask], want)
    torch.testing.assert_close(norm.running_var, alone.running_var)
    with real_tokens(norm, mask):
        assert torch.equal(norm(x), y)
    assert norm.token_mask is None
    before = norm.running_mean.clone()
    assert bool(norm(x, torch.zeros_like(mask)).isfinite().all())
    assert torch.equal(norm.running_mean, before)
    with pytest.raises(ValueError, match=r"a mask over tokens is \(2, 4\), and this is \(2, 3\)"):
        norm(x, mask[:, 1:])


def test_one_value_to_a_channel_cannot_be_normalized():
    with pytest.raises(ValueError, match=r"one value per channel in training mode, from an input of \(1, 3\)"):
        RepBN(3)(torch.ones(1, 3))


def test_half_precision_with_a_large_mean():
    x = (200 + drawn(64, 3)).half()
    y = RepBN(3, alpha_init=0, dtype=torch.float16)(x)
    want = RepBN(3, alpha_init=0)(x.float())
    torch.testing.assert_close(y.float(), want, atol=2e-3, rtol=2e-3)


def steps_of(norm: ProgressiveNorm) -> list[float | None]:
    found = []
    for _ in range(8):
        found.append(norm.mix)
        norm.advance()
    return found


def test_the_schedule():
    made = ProgressiveNorm(nn.LayerNorm(3), RepBN(3), warmup=2, steps=4, start=0.8)
    assert steps_of(made) == pytest.approx([None, None, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    assert ProgressiveNorm(nn.LayerNorm(3), RepBN(3), steps=0).mix == 0.0


def test_training_mixes_and_evaluation_does_not():
    norm, x = ProgressiveNorm(nn.LayerNorm(3), RepBN(3), warmup=1, steps=4).double(), drawn(4, 5, 3)
    torch.testing.assert_close(norm(x), norm.old(x))
    assert norm.new.num_batches_tracked == 0
    norm.advance(), norm.advance()
    torch.testing.assert_close(norm(x), 0.75 * norm.old(x) + 0.25 * norm.new(x))
    assert torch.equal(norm.eval()(x), norm.new(x))
    for _ in range(3):
        norm.advance()
    norm.train(), norm.zero_grad()
    norm(x).sum().backward()
    assert norm.old.weight.grad is None and norm.new.weight.grad is not None


def test_counters_are_saved():
    made = ProgressiveNorm(nn.LayerNorm(3), RepBN(3), warmup=1, steps=4)
    made.advance(), made.advance()
    other = ProgressiveNorm(nn.LayerNorm(3), RepBN(3))
    other.load_state_dict(made.state_dict())
    assert other.mix == made.mix == 0.75 and other.remaining == 3


def test_calls_count_when_asked_and_recomputed_ones_never():
    norm = ProgressiveNorm(nn.LayerNorm(3), RepBN(3), steps=4, per_call=True).double()
    plain = ProgressiveNorm(nn.LayerNorm(3), RepBN(3), steps=4, per_call=True).double()
    x, y = drawn(4, 3).requires_grad_(), drawn(4, 3).requires_grad_()
    checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    plain(y).square().sum().backward()
    assert norm.left == 3
    assert norm.new.num_batches_tracked == 1
    torch.testing.assert_close(x.grad, y.grad)
    assert advance(norm) == 0 and norm.left == 3


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_a_model_is_converted_and_trained_by_optimizer_steps():
    model = net()
    swapped = to_prepbn(model, steps=2, warmup=1)
    assert [change.paths for change in swapped.changed] == [("1",)]
    assert list(fading(model)) == ["1"] and not model_is_pure(model)
    task = Points()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fit(model, task, optimizer, steps=2, hooks=[AdvanceNorms()], accumulate=2, quiet=True)
    assert model[1].remaining == 1
    fit(model, task, optimizer, steps=1, hooks=[AdvanceNorms()], quiet=True)
    assert model_is_pure(model)
    with pytest.raises(BadInput, match="has no ProgressiveNorm: call to_prepbn first"):
        fit(net(), task, torch.optim.SGD, steps=1, hooks=[AdvanceNorms()], quiet=True)


def test_the_norm_keeps_its_weights_and_several_axes_are_left_alone():
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.Flatten(), nn.LayerNorm(6))
    inner = model[2]
    report = to_prepbn(model, steps=1, alpha=0.0, weight=0.0)
    assert model[2].old is inner and "0" in report.left
    assert not model[2].new.alpha.any() and not model[2].new.weight.any()


def test_folding_waits_for_the_schedule():
    norm = ProgressiveNorm(nn.LayerNorm(8), lively(RepBN(8)), warmup=1, steps=1).double().eval()
    with pytest.raises(ValueError, match=r"2 optimizer steps are left \(1 of warm-up\)"):
        as_affine(norm)
    norm.advance(), norm.advance()
    reader, x = nn.Linear(8, 2).double(), drawn(5, 8)
    weight, bias = before_layer(as_affine(norm), reader.weight, reader.bias)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), reader(norm(x)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="training mode"):
        as_affine(norm.train())
    assert as_affine(ProgressiveNorm(nn.LayerNorm(8), nn.LayerNorm(8), steps=0)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepBN(0), "num_features is 0"),
        (lambda: ProgressiveNorm(nn.Identity(), nn.Identity(), steps=-1), "neither may be negative"),
        (lambda: ProgressiveNorm(nn.Identity(), nn.Identity(), start=2.0), "start is 2.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_they_show_their_options():
    assert repr(RepBN(4)) == "RepBN(4, eps=1e-05, momentum=0.1, channel_dim=-1)"
    shown = repr(ProgressiveNorm(nn.Identity(), RepBN(4), warmup=1, steps=2, per_call=True))
    assert "remaining=3, start=1.0, per_call=True" in shown
