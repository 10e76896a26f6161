"""`genie`: roundings by hand, what learning them gains, what is packed, data without data, the recorded vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.reconstruct import linear_decay
from laconic.core.structure import Structure
from laconic.core.synthesis import statistics_loss
from laconic.errors import BadInput
from laconic.quant import (
    AdaRound,
    GenieRates,
    InputQuantizer,
    distilled_images,
    genie_reconstruct,
    pack_learned,
    rectified_sigmoid,
    rounding_penalty,
    searched_range,
)  # fmt: skip
from laconic.quant._genie import inverse_sigmoid
from laconic.testing import Example
from laconic.testing.vectors import Case

EXAMPLES = [
    Example(lambda weight: AdaRound(weight, 3), name="AdaRound", kind="Weight", traits=("gradient:surrogate",)),
]


def run_vector(case: Case) -> dict[str, Tensor]:
    """First scales; soft and hard roundings with gradients; inputs; temperature; penalty; statistics."""
    args = case.args
    if case.what == "schedule":
        options = {"warmup": args["warmup"], "start": args["start"], "end": args["end"]}
        found = [linear_decay(t, args["t_max"], **options) for t in args["at_steps"]]
        return {"beta": torch.tensor(found, dtype=torch.float64)}
    if case.name.startswith("rounding_loss"):
        V = case.array("logit")
        penalties = [rounding_penalty(V, float(b), args["zeta"], args["gamma"]) for b in case.array("exponents")]
        found = torch.stack(penalties)
        return {"loss": found if args["reduction"] == "sum" else found / V.numel()}
    if "running_mean" in case:
        x = case.array("input").requires_grad_()
        per = "batch" if 0 in args["axes"] else "image"
        loss = statistics_loss(
            x, case.array("running_mean"), case.array("running_var"), per=per, eps=args["eps"],
            unbiased=args["unbiased"], divide_by=args["divide_by"],
        )  # fmt: skip
        loss.backward()
        return {"loss": loss, "grad_input": x.grad}
    if "signed" in args:
        x = case.array("input").requires_grad_()
        layer = InputQuantizer(
            x.detach(), args["bits"], signed=args["signed"], drop=args["drop"], grad_scale=args["scale_grad_factor"]
        ).train(args["training"])
        output = layer(x)
        output.backward(case.array("grad_output"))
        return {"scale": layer.scale, "output": output, "grad_input": x.grad, "grad_scale": layer.scale.grad}
    weight = case.array("weight")
    dim = {"out_channel": 0, "tensor": None}[args["granularity"]]
    search = {key: args[key] for key in ("norm", "reduction") if key in args}
    one = AdaRound(weight, args["bits"], dim=dim, zeta=args["zeta"], gamma=args["gamma"], **search)
    state = {"zero": one.zero, "weight_floor": one.base}
    if case.what == "quantize":
        return {"scale": one.scale, "logit": one.logit, **state}
    with torch.no_grad():
        one.scale.copy_(case.array("scale"))
        one.logit.copy_(case.array("logit"))
    output = one.train(args["mode"] == "soft")(weight)
    if case.what == "forward":
        return {"output": output, **state}
    output.backward(case.array("grad_output"))
    return {"output": output, "grad_scale": one.scale.grad, "grad_logit": one.logit.grad, **state}


def network(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    """Two convolutions and a linear layer, and pictures."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 16)]
    return nn.Sequential(*layers).eval(), torch.randn(48, 1, 8, 8)


def test_the_equation() -> None:
    torch.manual_seed(1)
    w = torch.randn(3, 7)
    one = AdaRound(w, 3)
    s, z = one.scale.detach(), one.zero
    soft, hard = one.train()(w), one.eval()(w)
    for i in range(3):
        for j in range(7):
            v = float(w[i, j] / s[i, 0])
            base = torch.tensor(v).floor().item()
            code = min(max(base + (v - base) + float(z[i, 0]), 0), 7)
            assert float(soft[i, j]) == pytest.approx(float(s[i, 0]) * (code - float(z[i, 0])), abs=1e-5)
            code = min(max(base + float(v - base >= 0.5) + float(z[i, 0]), 0), 7)
            assert float(hard[i, j]) == pytest.approx(float(s[i, 0]) * (code - float(z[i, 0])), abs=1e-5)


def test_the_sigmoid_and_its_inverse() -> None:
    h = torch.linspace(0, 1, 11)
    torch.testing.assert_close(rectified_sigmoid(inverse_sigmoid(h)), h)
    assert float(rounding_penalty(torch.tensor([-20.0, 20.0]), 2.0)) == 0
    assert float(rounding_penalty(torch.zeros(4), 2.0)) == pytest.approx(4.0)


def test_the_search_tries_every_range() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 40)
    x[0, 0] = 9.0
    scale, zero = searched_range(x, 2, dims=(1,))
    for row in range(2):
        found = []
        low, high = float(x[row].min()), float(x[row].max())
        for i in range(100):
            s = (1 - i / 100) * (high - low) / 3
            z = round(-(1 - i / 100) * low / s)
            off = [abs(s * (min(max(round(v / s) + z, 0), 3) - z) - v) ** 2.4 for v in x[row].tolist()]
            found.append((sum(off), s, z))
        assert float(scale[row]) == pytest.approx(min(found)[1], rel=1e-5) and float(zero[row]) == min(found)[2]
    scale, zero = searched_range(torch.zeros(3), 4)
    assert float(scale) == 1 and float(zero) == 0


def test_the_floor_does_not_move_with_the_scale() -> None:
    w = torch.randn(3, 7)
    one = AdaRound(w, 4).eval()
    before = one(w)
    with torch.no_grad():
        one.scale.mul_(1.3)
    torch.testing.assert_close(one(w), 1.3 * before)


def test_scales_and_roundings_are_learned() -> None:
    model, x = network(3)
    done = {}
    rates = GenieRates(rounding=0.02, weight_scale=2e-3)
    for learn_scale in (True, False):
        mine = copy.deepcopy(model)
        done[learn_scale] = genie_reconstruct(mine, [x], 2, steps=60, learn_scale=learn_scale, rates=rates, mix=0.0)
    for found in done.values():
        assert all(one.after <= one.before for one in found.values())
        assert found["5"].after < found["5"].before
    frozen = AdaRound(torch.randn(2, 3), 4, learn_scale=False)
    assert not frozen.scale.requires_grad


def test_blocks_inputs_and_what_is_packed() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)) for _ in range(2))).eval()
    x = torch.randn(40, 24)
    structure = Structure.build(model, ((x[:2],), {}))
    done = genie_reconstruct(
        model, [x], 3, input_bits={"0.0": 8, "0.2": 4, "1.0": 4}, units=["0", "1"], steps=20, rates=GenieRates(0.02)
    )
    assert list(done) == ["0", "1"]
    assert model[0][0].input_quantizer.signed and not model[0][2].input_quantizer.signed
    assert not hasattr(model[1][2], "input_quantizer")
    want = model(x)
    assert torch.equal(want, model(x))  # nothing is dropped at inference
    records = pack_learned(model, structure)
    assert [r.path for r in records] == ["0.0.weight", "0.2.weight", "1.0.weight", "1.2.weight"]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_inputs_are_dropped_in_training_alone() -> None:
    x = torch.rand(4000)
    layer = InputQuantizer(x, 2, drop=0.25).train()
    part = float((layer(x) == x).float().mean())
    assert 0.2 < part < 0.3
    layer.eval()
    assert len(layer(x).unique()) <= 4 and torch.equal(layer(x), layer(x))
    assert bool(torch.isfinite(InputQuantizer(torch.zeros(5), 4)(torch.ones(5))).all())


def test_pictures_without_data() -> None:
    torch.manual_seed(5)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
    ]
    model = nn.Sequential(*layers).train()
    real = torch.randn(64, 1, 8, 8) * 0.5 + 1
    for _ in range(30):
        model(real)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    options = {"batch": 16, "steps": 40, "latent": 32, "include_input": False}
    found = distilled_images(model, (1, 8, 8), 20, **options)
    assert found.inputs.shape == (20, 1, 8, 8) and found.losses[39] < 0.5 * found.losses[0]
    again = distilled_images(model, (1, 8, 8), 20, **options)
    assert torch.equal(found.inputs, again.inputs)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_refusals() -> None:
    model, x = network(6)
    with pytest.raises(BadInput, match="no batch norms"):
        distilled_images(model, (1, 8, 8), 4, steps=1)
    with pytest.raises(BadInput, match="4 divides"):
        distilled_images(nn.Sequential(nn.BatchNorm2d(1)).eval(), (1, 7, 8), 4, steps=1)
    with pytest.raises(BadInput, match="'9' is no linear"):
        genie_reconstruct(model, [x], {"9": 4})
    with pytest.raises(BadInput, match="1 has no layer"):
        genie_reconstruct(model, [x], 4, units=["1"])
    with pytest.raises(BadInput, match="2 to 8"):
        AdaRound(torch.ones(2, 2), 9)
    with pytest.raises(ValueError, match="median"):
        searched_range(torch.ones(3), 4, reduction="median")
    model[0].weight.data[0] = torch.inf
    with pytest.raises(BadInput, match="^0: its outputs"):
        genie_reconstruct(model, [x], 4)
