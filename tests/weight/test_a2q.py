"""`a2q`: the bound against brute force, the equations row by row, gradients, packing, and the recorded vectors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from laconic.core.qat import FakeInput, convert, prepare, quantized_layers
from laconic.errors import BadInput
from laconic.testing import Case, Example
from laconic.weight import (
    A2Q,
    a2q_penalty,
    accumulator_aware_,
    accumulator_codes,
    check_accumulator,
    overflow_bound,
    simulated_accumulator,
    wrap_sums,
)

EXAMPLES = [
    Example(lambda weight: A2Q(weight, 4, 9, 4), kind="Weight", traits=("gradient:surrogate",)),
    Example(
        lambda weight: A2Q(weight, 5, 12, 4, True, True), kind="Weight", traits=("gradient:surrogate",),
        inputs=[(4, 3, 2, 2)],
    ),
]  # fmt: skip


def run_vector(case: Case):
    """Entries that the file lists as near an integer may be off by one code, as its note allows."""
    args, weight = case.args, case.array("weight")
    assert args["method"] in ("a2q", "a2q_plus") and args["per_channel"] and args["rounding"] == "toward_zero"
    assert args["parameters"] == "as initialised from weight"
    assert weight.shape == (args["out_features"], args["in_features"])
    made = A2Q(
        weight, args["weight_bits"], args["acc_bits"], args["input_bits"], args["input_signed"], args["zero_center"],
        narrow=args["narrow_range"],
    )  # fmt: skip
    codes, scale, _ = made.codes(weight)
    q = codes.float() - 2 ** (args["weight_bits"] - 1)
    recorded = case.peek("codes")[0].float()
    for row, column in args["near_integer_entries"]:
        if abs(q[row, column] - recorded[row, column]) <= 1:
            q[row, column] = recorded[row, column]
    with torch.no_grad():
        if not args["near_integer_entries"]:
            torch.testing.assert_close(made(weight), q * scale)
    return {
        "codes": q,
        "quantized_weight": q * scale,
        "scale": scale,
        "codes_l1": q.abs().sum(1),
        "log2_norm": made.log2_norm,
        "log2_scale": made.log2_scale,
        "log2_scale_in_prescaling": made.log2_scale,
    }


@pytest.mark.parametrize("signed", [False, True])
def test_the_bound_is_safe_and_tight(signed):
    """Every row of three integers within the bound, with the worst of all inputs, stays inside; one beyond does not."""
    acc, bits = 7, 3
    inputs = range(-4, 4) if signed else range(8)
    bound = overflow_bound(acc, bits, signed)
    worst = {True: 0, False: 0}
    for row in itertools.product(range(-16, 17), repeat=2):
        inside = abs(row[0]) + abs(row[1]) <= bound
        largest = max(
            abs(sum(q * x for q, x in zip(row, xs, strict=True)))
            for xs in itertools.product((min(inputs), max(inputs)), repeat=2)
        )
        worst[inside] = max(worst[inside], largest)
    assert worst[True] <= 2 ** (acc - 1) - 1 < worst[False]
    centred = overflow_bound(acc, bits, signed, zero_centred=True)
    half = int(centred / 2)
    assert half * (max(inputs) - min(inputs)) <= 2 ** (acc - 1) - 1 < (half + 1) * (max(inputs) - min(inputs))


@pytest.mark.parametrize("zero_center", [False, True])
def test_the_equations(zero_center):
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(3, 7, generator=generator, dtype=torch.float64) + 0.2
    made = A2Q(v, 4, 8, 4, zero_center=zero_center)
    bound = (2**8 - 2) / 15 if zero_center else 127 / 16
    got = made(v)
    for row, out in zip(v.tolist(), got.tolist(), strict=True):
        s, g = max(map(abs, row)) / 7, sum(map(abs, row))
        centred = [x - sum(row) / 7 * zero_center for x in row]
        norm = sum(map(abs, centred))
        q = [min(max(math.trunc(x * min(g / s, bound) / norm), -7), 7) for x in centred]
        assert out == pytest.approx([s * i for i in q])
        assert sum(map(abs, q)) <= bound


def test_gradients_are_those_of_the_weights_without_rounding():
    v = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    scale, norm = torch.rand(2, 4, 1, dtype=torch.float64).add(0.5).unbind(0)
    scale.requires_grad_(), norm.requires_grad_()
    g = torch.randn(4, 6, dtype=torch.float64)
    for bound in (100.0, 0.2):
        q = accumulator_codes(v, scale, norm, bound, 7)
        got = torch.autograd.grad(q, (v, scale, norm), g, allow_unused=True)
        plain = v * torch.clamp(norm / scale, max=bound) / v.abs().sum(1, keepdim=True)
        want = torch.autograd.grad(plain, (v, scale, norm), g)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert (got[2] == 0).all() == (bound == 0.2), "beyond the bound no gradient reaches the norm"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3)
    )


@pytest.mark.parametrize("zero_center", [False, True])
def test_trained_packed_and_checked(zero_center):
    model = network()
    assert accumulator_aware_(model, 4, 9, 4, input_signed=True, zero_center=zero_center) == ["0", "3", "5"]
    x, y = torch.randn(8, 4, 4, 4), torch.randint(0, 3, (8,))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(10):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + 1e-3 * a2q_penalty(model)).backward()
        optimizer.step()
    model.eval()
    found = check_accumulator(model, 9)
    for path, need in found.items():
        q = quantized_layers(model)[path][1].codes(model.get_submodule(path).parametrizations.weight.original)[0]
        q = q.long() - 8
        assert need.l1 == int(q.abs().sum(1).max()) <= overflow_bound(9, 4, True, zero_centred=zero_center)
        assert need.zeros == pytest.approx(float((q == 0).float().mean())) and need.fits == (need.bits <= 9)
        assert zero_center or need.fits
        assert 2 ** (need.bits - 2) - 1 < need.largest <= 2 ** (need.bits - 1)
    want = model(x)
    with simulated_accumulator(model, 32) as overflows:
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert not any(overflows.values())
    with simulated_accumulator(model, 9) as overflows:
        wrapped = model(x)
    assert zero_center or (not any(overflows.values()) and torch.equal(wrapped, model_in(32, model, x)))
    with simulated_accumulator(model, 4) as overflows:
        assert not torch.equal(model(x), want) and any(overflows.values())
    assert torch.equal(model(x), want), "outside, nothing wraps"
    convert(model, method="a2q")
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def model_in(bits: int, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with simulated_accumulator(model, bits):
        return model(x)


def test_without_the_bound_sums_overflow():
    model = nn.Sequential(nn.Linear(64, 8))
    prepare(model, "v1/int4/channel/float32/minmax/znone/nearest", inputs=lambda path, module: FakeInput(4, False))
    model(torch.rand(16, 64))
    assert not check_accumulator(model, 9)["0"].fits
    need = check_accumulator(model, 9)["0"].bits
    assert check_accumulator(model, need)["0"].fits and not check_accumulator(model, need - 1)["0"].fits
    wide = check_accumulator(model, 9, input_bits=8, input_signed=True)["0"]
    assert need + 2 <= wide.bits <= need + 5


def test_wrapping():
    assert wrap_sums(torch.tensor([-9, -8, 7, 8, 24]), 4).tolist() == [7, -8, 7, -8, -8]
    sums = torch.randint(-1000, 1000, (50, 2))
    assert torch.equal(wrap_sums(wrap_sums(sums[:, 0], 6) + sums[:, 1], 6), wrap_sums(sums.sum(1), 6))


def test_rows_of_zeros_and_penalty():
    weight = torch.zeros(2, 5)
    weight[1] = torch.linspace(-1, 1, 5)
    layer = nn.Linear(5, 2)
    layer.weight.data = weight
    model = nn.Sequential(layer)
    accumulator_aware_(model, 4, 6, 4)
    assert not model[0].weight[0].any() and torch.isfinite(model[0].weight).all()
    last = quantized_layers(model)["0"][1]
    with torch.no_grad():
        last.log2_norm.fill_(4.0), last.log2_scale.fill_(1.0)
    assert a2q_penalty(model).item() == pytest.approx(2 * (4 - math.log2(31 / 16) - 1))
    a2q_penalty(model).backward()
    assert (last.log2_norm.grad == 1).all() and (last.log2_scale.grad == -1).all()


def test_refusals():
    with pytest.raises(ValueError, match="an accumulator of 1 bits for inputs of 4"):
        overflow_bound(1, 4)
    with pytest.raises(BadInput, match=r"0: Int\(bits=9\)"):
        accumulator_aware_(nn.Sequential(nn.Linear(3, 2)), 9)
    with pytest.raises(BadInput, match="Linear has no layer with A2Q"):
        a2q_penalty(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="Linear has no layer that is trained in integers"):
        check_accumulator(nn.Linear(2, 2), 16)
    model = nn.Sequential(nn.Linear(8, 2))
    prepare(model, "v1/int4/channel/float32/minmax/znone/nearest")
    with pytest.raises(BadInput, match="0: nothing says how wide its inputs are"):
        check_accumulator(model, 16)
    with pytest.raises(BadInput, match="no layer that multiplies integers"), simulated_accumulator(model, 8):
        pass
    grouped = nn.Sequential(nn.Linear(8, 2))
    prepare(grouped, "v1/int4/group4/float32/minmax/znone/nearest")
    with pytest.raises(BadInput, match="0: v1/int4/group4.* one accumulator"):
        check_accumulator(grouped, 16, 8, False)
