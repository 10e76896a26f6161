"""`hqq`: the equations written out, never worse than the range's zero point, the same by chunks, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.numerics import Int, NotFinite, Scale, Scheme, affine_params, fake_quantize, half_quadratic
from laconic.quant import HQQ, hqq, round_to_nearest
from laconic.testing import Example


def two_layers(generator: torch.Generator) -> list:
    model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16)).eval()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return [model, torch.randint(0, 40, (3, 5), generator=generator)]


def refused() -> tuple:
    return nn.Sequential(nn.Linear(4, 4)).eval(), [torch.randn(2, 4)], "0.weight"


EXAMPLES = [
    Example(
        lambda: HQQ("v1/int6/group16/float16/hqq/zreal/nearest"),
        kind="Pass",
        inputs=two_layers,
        stated={"bound": 0.06, "refused": refused},
    )
]


def of(bits: int, rule: str = "hqq", share: str = "group64", dtype: str = "float16") -> Scheme:
    return Scheme.parse(f"v1/int{bits}/{share}/{dtype}/{rule}/zreal/nearest")


def drawn(rows: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_turn_is_the_equation(axis: int) -> None:
    x = drawn(5, 6)
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    inverse = 7 / (high - low)
    zero = -low * inverse
    _, found = half_quadratic(x, inverse, zero, (0, 7), axis=axis, norm=0.5, beta=3.0, turns=1)
    for group in range(x.shape[1 - axis]):
        column = x.select(1 - axis, group).tolist()
        s, z, total = 1 / float(inverse.flatten()[group]), float(zero.flatten()[group]), 0.0
        for w in column:
            q = min(max(round(w / s + z), 0), 7)
            e = w - s * (q - z)
            u = max(0.0, abs(e) - abs(e) ** -0.5 / 3.0) * (1 if e > 0 else -1) if e else 0.0
            total += q - (w - u) / s
        assert float(found.flatten()[group]) == pytest.approx(total / len(column), abs=1e-4)


def test_it_stops_where_the_error_no_longer_falls() -> None:
    x = drawn(8, 64, 1)
    inverse = 15 / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
    zero, errors = -x.amin(1, keepdim=True) * inverse, []
    for turns in range(1, 21):
        _, z = half_quadratic(x, inverse, zero, (0, 15), turns=turns)
        before = half_quadratic(x, inverse, zero, (0, 15), turns=turns - 1)[1] if turns > 1 else zero
        q = (x * inverse + before).round().clamp(0, 15)
        errors.append(float((x - (q - before) / inverse).abs().mean()))
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            break
    assert 2 < len(errors) < 20
    assert torch.equal(z, half_quadratic(x, inverse, zero, (0, 15))[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("share", ["group64", "group24", "channel", "tensor"])
def test_no_group_is_worse_than_by_its_range(bits: int, share: str) -> None:
    x = drawn(16, 160, bits)
    errors = {}
    for rule in ("minmax", "hqq"):
        error = (fake_quantize(x, of(bits, rule, share)) - x).abs()
        parts = error.split(int(share[5:]), 1) if share.startswith("group") else [error]
        errors[rule] = torch.stack([p.mean(1) if share != "tensor" else p.mean() for p in parts])
    assert bool((errors["hqq"] <= errors["minmax"] * (1 + 1e-4)).all())
    if share != "tensor" and bits < 8:  # where one zero point stands for few weights and long steps
        assert float(errors["hqq"].mean()) < float(errors["minmax"].mean()) * 0.995


def test_a_group_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    W, scheme = drawn(11, 70, 2), of(3)
    whole = hqq(W, scheme)
    for row in range(len(W)):
        assert torch.equal(hqq(W[row : row + 1], scheme).zero, whole.zero[row : row + 1])
    monkeypatch.setattr("laconic.quant._rtn.CHUNK", 100)
    monkeypatch.setattr("laconic.numerics.affine.SEARCH", 100)
    parts = hqq(W, scheme)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.zero, whole.zero)


def test_constant_and_empty_groups() -> None:
    x = torch.tensor([[0.0] * 8, [0.25] * 8, [-3.0] * 8])
    torch.testing.assert_close(fake_quantize(x, of(4, share="group4")), x, rtol=1e-3, atol=0)
    assert hqq(torch.empty(0, 8), of(4)).codes.shape == (0, 8) and hqq(torch.empty(3, 0), of(4)).codes.shape == (3, 0)


def test_half_precision_weights() -> None:
    W = drawn(8, 64, 3)
    assert torch.equal(hqq(W.half(), of(4)).codes, hqq(W.half().float(), of(4)).codes)


def test_refusals() -> None:
    with pytest.raises(BadInput, match="chooses scales by minmax"):
        hqq(drawn(2, 8), "v1/int4/group64/float16/minmax/zreal/nearest")
    with pytest.raises(BadInput, match="HQQ: .* by mse"):
        HQQ(Scheme(Int(4), Scale(rule="mse"), "int"))
    with pytest.raises(ValueError, match="zero='real'"):
        Scheme.parse("v1/int4/group64/float16/hqq/zint/nearest")
    with pytest.raises(NotFinite, match=r"h\.w"):
        hqq(torch.full((2, 8), torch.nan), of(4), "h.w")
    for wrong in ({"norm": 0.0}, {"norm": 1.5}, {"beta": 0.0}, {"codes": (3, 3)}):
        with pytest.raises(ValueError, match="half_quadratic"):
            half_quadratic(drawn(2, 4), torch.ones(2, 1), torch.zeros(2, 1), **{"codes": (0, 15), **wrong})


def test_gptq_takes_the_rule() -> None:
    from laconic.quant import Hessian, gptq_matrix

    W, hessian = drawn(12, 64, 4), Hessian(64)
    x = drawn(256, 64, 5) @ drawn(64, 64, 6)
    hessian.add(x)
    scheme = of(3, share="group32")
    solved = gptq_matrix(W, hessian.matrix, scheme)
    lost = [float((x @ (v.dequantize(scheme) - W).T).square().sum()) for v in (solved, round_to_nearest(W, scheme))]
    assert lost[0] < 0.7 * lost[1]
    assert torch.equal(affine_params(W, scheme)[0], affine_params(W, of(3, "minmax", "group32"))[0])
