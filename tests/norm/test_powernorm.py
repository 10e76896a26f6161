"""`powernorm`: the equations by hand, its state under checkpointing and accumulation, folding, the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.core.affine import as_affine
from laconic.norm import LayerScale, PowerNorm, layer_scale, real_tokens
from laconic.testing import Case, Example
from tests.norm.quadratic import drawn, same_under_checkpointing, steps

TRAITS = ("gradient:stateful", "batch_independent_eval")
EXAMPLES = [
    Example(lambda: PowerNorm(6, layer_scale_groups=2), kind="Layer", traits=TRAITS, inputs=[(3, 4, 6)], wrong=[(3, 4, 5)]),
    Example(
        lambda: PowerNorm(4, warmup_iters=1, layer_scale_groups=None, channel_dim=1, grad_scale="running"),
        kind="Layer",
        traits=TRAITS,
        inputs=[(3, 4, 2, 2)],
        wrong=[(3, 5, 2, 2)],
    ),
    Example(lambda: PowerNorm(6, variant="pn-v"), kind="Layer", traits=TRAITS, inputs=[(3, 6)], wrong=[(3, 5)]),
]  # fmt: skip
STATE = {"running_phi": "running_phi", "running_nu": "running_nu"}


def run_vector(case: Case):
    args = case.args
    layer = PowerNorm(
        args["num_features"],
        args["eps"],
        args["alpha_fwd"],
        args["alpha_bwd"],
        args["warmup_iters"],
        args["layer_scale_groups"] or None,
        grad_scale=args["grad_scale"],
        affine=args["affine"],
        variant=args.get("variant", "pn"),
    )
    for name in ("weight", "bias", *STATE):
        if name in case:
            with torch.no_grad():
                getattr(layer, name).copy_(case.array(name).flatten())
    layer.running_phi.fill_(args["phi_init"]) if "running_phi" not in case else None
    layer.running_nu.fill_(args["nu_init"])
    if not args["training"]:
        return {"output": layer.eval()(case.array("input"))}
    found: dict[str, list] = {role: [] for role in case.roles if role == "output" or role.endswith("_after")}
    found |= {role: [] for role in case.roles if role.startswith("grad_") and role != "grad_output"}
    masks = case.arrays("padding_mask") if "padding_mask" in case else []
    for i, (x, grad) in enumerate(zip(case.arrays("input"), case.arrays("grad_output"), strict=True)):
        layer.zero_grad()
        x.requires_grad_()
        mask = None
        if args["padding_mask"]:
            assert (args["layout"], args["padding_mask_layout"]) == ("(T,B,C)", "(B,T), true = pad")
            mask = ~masks[i if len(masks) > 1 else 0].bool().T
        y = layer(x, mask)
        y.backward(grad)
        found["output"].append(y)
        for name, tensor in (("input", x), ("weight", layer.weight), ("bias", layer.bias)):
            if f"grad_{name}" in found:
                found[f"grad_{name}"].append(tensor.grad)
        shape = [
            args["num_features"] if size == "C" else int(size) for size in args["state_shape"].strip("()").split(",")
        ]
        for name in STATE:
            found[f"{name}_after"].append(getattr(layer, name).clone().reshape(shape))
    return found


def naive(inputs, grads, gain, shift, *, a_f, a_b, warmup, eps, grad_scale):
    """The equations, step by step, for (tokens, channels) without layer scale."""
    phi, nu = torch.ones_like(gain), torch.zeros_like(gain)
    found = []
    for t, (x, dy) in enumerate(zip(inputs, grads, strict=True), 1):
        psi = (x * x).mean(0)
        squared = psi if t <= warmup else phi
        z = x / (squared + eps) ** 0.5
        if t < warmup:
            phi = phi * (t - 1) / t + psi / t
        phi = a_f * phi + (1 - a_f) * psi
        h = gain * dy - (1 - a_b) * nu * z
        nu = nu + (h * z).mean(0)
        found += [gain * z + shift, h / ((psi if grad_scale == "batch" else squared) + eps) ** 0.5]
    return found, phi, nu


@pytest.mark.parametrize("grad_scale", ["batch", "running"])
@pytest.mark.parametrize("warmup", [0, 3, 100])
def test_the_equations(grad_scale, warmup):
    norm = PowerNorm(3, 1e-3, 0.8, 0.7, warmup, None, grad_scale=grad_scale, dtype=torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.normal_(norm.bias)
    inputs, grads = ([drawn(7, 3, seed=s + k) for s in range(6)] for k in (0, 50))
    options = {"a_f": 0.8, "a_b": 0.7, "warmup": warmup, "eps": 1e-3, "grad_scale": grad_scale}
    want, phi, nu = naive(inputs, grads, norm.weight.detach(), norm.bias.detach(), **options)
    torch.testing.assert_close(steps(norm, inputs, grads), want)
    torch.testing.assert_close((norm.running_phi, norm.running_nu), (phi, nu))


def test_layer_scale_is_an_rms_norm_of_each_group():
    x = drawn(5, 6)
    want = torch.cat([nn.RMSNorm(3, eps=1e-5, dtype=torch.float64)(part) for part in x.split(3, -1)], -1)
    torch.testing.assert_close(layer_scale(x, 2, 1e-5), want)
    torch.testing.assert_close(LayerScale(2, channel_dim=1)(x[..., None]), want[..., None])


def test_pn_v_is_differentiated_exactly():
    norm = PowerNorm(3, variant="pn-v", dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, (drawn(5, 3).requires_grad_(),))
    norm = PowerNorm(3, variant="pn-v", layer_scale_groups=None, dtype=torch.float64)
    y = norm(drawn(5, 3))
    torch.testing.assert_close(y.square().mean(0), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("warmup", [2, 100])
def test_checkpointing_changes_nothing(how, warmup):
    same_under_checkpointing(PowerNorm(3, warmup_iters=warmup, dtype=torch.float64), how, 3)


def test_a_second_backward_changes_nothing():
    norm, x = PowerNorm(3, dtype=torch.float64), drawn(5, 3).requires_grad_()
    total = norm(x).square().sum()
    first = torch.autograd.grad(total, x, retain_graph=True)
    nu = norm.running_nu.clone()
    torch.testing.assert_close(torch.autograd.grad(total, x), first)
    assert torch.equal(norm.running_nu, nu)


def test_micro_batches_make_one_step():
    """Two halves with the same psi as the whole: the state is that of one step."""
    whole, halves = (PowerNorm(3, layer_scale_groups=None, accumulate=n, dtype=torch.float64) for n in (1, 2))
    x, grad = drawn(4, 3), drawn(4, 3, seed=1)
    steps(whole, [x], [grad])
    steps(halves, [x[:2]], [grad[:2]])
    assert halves.num_batches_tracked == 0
    steps(halves, [x[2:]], [grad[2:]])
    assert halves.num_batches_tracked == 1
    torch.testing.assert_close(halves.running_phi, whole.running_phi)
    assert halves.running_nu.any()


def test_padding_is_left_out_of_psi():
    x, mask = drawn(2, 3, 4), torch.tensor([[True, False, False], [True, True, True]])
    x[~mask] = 1e6
    one, other = (PowerNorm(4, layer_scale_groups=None, dtype=torch.float64) for _ in range(2))
    with real_tokens(one, mask):
        y = one(x)
    torch.testing.assert_close(y[mask], other(x[mask]))
    torch.testing.assert_close(one.running_phi, other.running_phi)
    before = one.running_phi.clone()
    one(x, torch.zeros_like(mask)).sum().backward()
    assert torch.equal(one.running_phi, before) and one.num_batches_tracked == 1


def test_it_folds_without_layer_scale_and_splits_with_it():
    x = drawn(5, 6)
    for groups in (None, 2):
        norm = PowerNorm(6, layer_scale_groups=groups, dtype=torch.float64)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        steps(norm, [drawn(8, 6, seed=s) for s in range(3)], [drawn(8, 6)] * 3)
        with pytest.raises(ValueError, match="training mode"):
            norm.split_affine()
        rest, affine = norm.eval().split_affine()
        torch.testing.assert_close(affine(rest(x), -1), norm(x))
        assert (as_affine(norm) is None) is (groups is not None)


def test_without_gain():
    norm = PowerNorm(3, affine=False, layer_scale_groups=None, dtype=torch.float64)
    want = PowerNorm(3, layer_scale_groups=None, dtype=torch.float64)
    inputs, grads = [drawn(5, 3), drawn(5, 3, seed=1)], [drawn(5, 3, seed=2)] * 2
    torch.testing.assert_close(steps(norm, inputs, grads), steps(want, inputs, grads))
    torch.testing.assert_close(norm.eval()(inputs[0]), want.eval()(inputs[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_fwd": 1.5}, "alpha_fwd is 1.5"),
        ({"layer_scale_groups": 4}, "6 channels do not make 4 groups"),
        ({"variant": "pnv"}, "variant is one of"),
        ({"grad_scale": "both"}, "grad_scale of"),
        ({"accumulate": 0}, "accumulate is 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PowerNorm(6, **options)


def test_they_show_their_options():
    assert repr(PowerNorm(6, affine=False)) == "PowerNorm(6, eps=1e-05, channel_dim=-1, affine=False)"
    assert repr(LayerScale(2)) == "LayerScale(groups=2, eps=1e-05, channel_dim=-1)"
