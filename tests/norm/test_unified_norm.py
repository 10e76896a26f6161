"""`unified_norm`: the equations by hand, the exact gradient of a window of one, checkpointing, the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.norm import UnifiedNorm
from laconic.testing import Case, Example
from tests.norm.quadratic import drawn, same_under_checkpointing, steps

TRAITS = ("gradient:stateful", "batch_independent_eval", "folds")
EXAMPLES = [
    Example(
        lambda: UnifiedNorm(6, warmup_iters=1, window=2),
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4, 6)],
        wrong=[(3, 4, 5)],
        stated={"channel": -1},
    ),
    Example(
        lambda: UnifiedNorm(4, outlier_filtration=True, channel_dim=1),
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4, 2, 2)],
        wrong=[(3, 5, 2, 2)],
    ),
]
# The names of the recorded code, and ours.
STATE = {
    "running_var": "running_var",
    "ema_gz": "ema_gz",
    "buffer_x2": "buffer_x2",
    "buffer_gz": "buffer_gz",
    "skip_counter": "skip_counter",
    "iters": "num_batches_tracked",
}


def run_vector(case: Case):
    args = case.args
    options = {name: args[name] for name in ("ratio_one_until", "ratio_clamp") if name in args}
    layer = UnifiedNorm(
        args["num_features"],
        args["window"],
        args["warmup_iters"],
        args["outlier_filtration"],
        args["eps"],
        args["momentum_torch"],
        filter_while_filling=True,
        affine="weight" in case,
        **options,
    )
    with torch.no_grad():
        for role, name in {"weight": "weight", "bias": "bias", **STATE}.items():
            if role in case:
                tensor = getattr(layer, name)
                tensor.copy_(case.array(role).reshape(tensor.shape))
    if not args.get("training", True):
        return {"output": layer.eval()(case.array("input"))}
    found: dict[str, list] = {role: [] for role in case.roles if role == "output" or role.endswith("_after")}
    found |= {role: [] for role in case.roles if role.startswith("grad_") and role != "grad_output"}
    for x, grad in zip(case.arrays("input"), case.arrays("grad_output"), strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        found["output"].append(y)
        for name, tensor in (("input", x), ("weight", layer.weight), ("bias", layer.bias)):
            if f"grad_{name}" in found:
                found[f"grad_{name}"].append(tensor.grad)
        for role, name in STATE.items():
            if f"{role}_after" in found:
                now = getattr(layer, name).clone()
                found[f"{role}_after"].append(now.reshape(1) if now.ndim == 0 else now)
    return found


def naive(inputs, grads, gain, *, window, warmup, filtration, m, eps, one_until):
    """The equations, step by step, for (tokens, channels)."""
    channels = gain.numel()
    bx, bg = torch.zeros(window, channels).double(), torch.zeros(window, channels).double()
    rv, e, skips, found = torch.ones(channels).double(), torch.zeros(channels).double(), 0, []
    for t, (x, dy) in enumerate(zip(inputs, grads, strict=True), 1):
        x2 = (x**2).mean(0)
        v = bx.sqrt().var()
        bx[t % window] = x2
        skip = window == 1
        geometric = bx.log().mean(0).exp()
        if filtration and t >= max(warmup, window) and bool((bx.mean(0) - geometric > v * window).any()):
            skip, skips = True, skips + 1
            bx[t % window] = rv
        early = t <= window or t < warmup or skip
        var = x2 if early else geometric
        z = x / (var + eps).sqrt()
        r = (var + eps).sqrt() / (rv + eps).sqrt()
        r = torch.ones(channels).double() if t <= max(one_until, warmup) or skip else r.clamp(1 / 5, 5)
        rv = (1 - m) * rv + m * var
        g = gain * dy * r
        gz = (g * z).mean(0)
        bg[t % window] = e if skip else gz
        mg = gz if early else bg.mean(0)
        e = (1 - m) * e + m * mg
        found += [gain * z, (g - (mg if skip else e) * z) / (var + eps).sqrt()]
    return found, rv, e, skips


@pytest.mark.parametrize("filtration", [False, True])
@pytest.mark.parametrize(("window", "warmup", "one_until"), [(3, 0, 1000), (3, 6, 4), (2, 1, 0), (4, 2, 0), (1, 0, 0)])
def test_the_equations(filtration, window, warmup, one_until):
    options = {"momentum": 0.2, "eps": 1e-3, "ratio_one_until": one_until, "dtype": torch.float64}
    norm = UnifiedNorm(3, window, warmup, filtration, **options)
    nn.init.uniform_(norm.weight, 0.5, 2)
    inputs, grads = ([drawn(9, 3, seed=s + k) for s in range(12)] for k in (0, 50))
    inputs[6] = 20 * inputs[6]
    named = {
        "window": window,
        "warmup": warmup,
        "filtration": filtration,
        "m": 0.2,
        "eps": 1e-3,
        "one_until": one_until,
    }
    want, rv, e, skips = naive(inputs, grads, norm.weight.detach(), **named)
    torch.testing.assert_close(steps(norm, inputs, grads), want)
    torch.testing.assert_close((norm.running_var, norm.ema_gz), (rv, e))
    assert norm.skip_counter == skips
    if filtration and window == 3:
        assert skips > 0


def test_a_window_of_one_has_the_exact_gradient():
    norm = UnifiedNorm(3, window=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, (drawn(5, 3).requires_grad_(),))


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("filtration", [False, True])
def test_checkpointing_changes_nothing(how, filtration):
    made = UnifiedNorm(3, 3, 2, filtration, ratio_one_until=0, dtype=torch.float64)
    same_under_checkpointing(made, how, 3)


def test_micro_batches_make_one_step():
    norm = UnifiedNorm(3, window=2, warmup_iters=0, accumulate=2, dtype=torch.float64)
    parts = [drawn(4, 3, seed=s) for s in range(6)]
    steps(norm, parts[:1], [drawn(4, 3)])
    assert norm.num_batches_tracked == 0 and not norm.buffer_x2.any() and not norm.buffer_gz.any()
    steps(norm, parts[1:2], [drawn(4, 3)])
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.buffer_x2[1], torch.cat(parts[:2]).square().mean(0))
    steps(norm, parts[2:], [drawn(4, 3)] * 4)
    assert norm.num_batches_tracked == 3 and bool((norm.buffer_gz != 0).all())


def test_an_empty_window_is_not_filtered_by():
    """The released code takes the logarithm of the zeros in a window that is not full: everything is an outlier."""
    inputs, grads = [drawn(9, 3, seed=s) for s in range(3)], [drawn(9, 3)] * 3
    inputs[2] = 3 * inputs[2]
    for filling, skips in ((False, 0), (True, 1)):
        norm = UnifiedNorm(3, 4, 3, True, filter_while_filling=filling, dtype=torch.float64)
        steps(norm, inputs, grads)
        assert norm.skip_counter == skips
        assert bool(norm.buffer_x2.isfinite().all())


def test_constant_and_zero_features():
    norm = UnifiedNorm(2, window=2, warmup_iters=0)
    for _ in range(5):
        x = torch.tensor([[0.0, 3.0]] * 4, requires_grad=True)
        y = norm(x)
        y.square().sum().backward()
        assert bool(y.isfinite().all()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window=0"), ({"momentum": 1.5}, "momentum=1.5"), ({"accumulate": 0}, "is 0")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        UnifiedNorm(6, **options)


def test_folding_wants_evaluation_mode():
    with pytest.raises(ValueError, match="training mode"):
        UnifiedNorm(3).as_affine()
