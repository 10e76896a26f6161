"""`awq`: exact before rounding, the search against the same by hand, better than plain rounding where inputs differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.structure import Structure
from laconic.numerics import Int, Scale, Scheme, dequantize, fake_quantize, params_from_range, quantize
from laconic.quant import AWQ, Hessian, clipped_round, round_to_nearest, search_scale
from laconic.quant._awq import CLIPS, awq_scale
from laconic.testing import Example
from tests.zoo import ZOO, outputs

THREE = Scheme(Int(3), Scale("group", group=8), zero="int")


class Readers(nn.Module):
    """A norm and two layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 12), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.a(x) * self.b(x)


class Leaking(Readers):
    """Something else sees the norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm(x).sum()


def block(generator: torch.Generator) -> list:
    """A model whose norm has salient channels, and an input."""
    model = Readers()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    model.norm.weight.data[3] = 15.0
    return [model.eval(), torch.randn(40, 16, generator=generator)]


def moments(model: nn.Module, structure: Structure, arguments: tuple) -> dict:
    hessian = Hessian(16)
    with torch.no_grad():
        hessian.add(model.norm(*arguments))
    return {"hessians": {"a": hessian}}


EXAMPLES = [
    Example(
        lambda: AWQ(THREE),
        kind="Pass",
        traits=("exact",),
        inputs=block,
        stated={
            "context": moments,
            "refused": lambda: (Leaking().eval(), [torch.randn(4, 16)], "norm"),
        },
    )
]


def inputs(k: int = 24, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Inputs with two salient channels, and their second moment."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0))
    x[:, [2, 11]] *= 15
    return x, x.T @ x


def test_the_equation() -> None:
    x, H = inputs()
    W = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    found = search_scale([W[:6], W[6:]], H, THREE)
    a = x.square().sum(0).sqrt()
    losses = []
    for i in range(20):
        t = a ** (i / 20)
        t = t / (t.max() * t.min()).sqrt()
        torch.testing.assert_close(awq_scale(a, i / 20), t)
        losses.append(float((x @ (fake_quantize(W * t, THREE) / t - W).T).square().sum()))
    best = min(range(20), key=losses.__getitem__)
    assert found.ratio == best / 20 and best > 0
    assert found.after == pytest.approx(losses[best], rel=1e-3) and found.before == pytest.approx(losses[0], rel=1e-3)
    assert found.after < 0.7 * found.before


def test_channels_that_were_never_seen_keep_their_scale() -> None:
    t = awq_scale(torch.tensor([4.0, 0.0, 1.0]), 0.5)
    assert t.tolist() == pytest.approx([2**0.5, 1.0, 0.5**0.5])
    assert awq_scale(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]
    assert awq_scale(torch.tensor([4.0, 0.0, 1.0]), 0.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_whole_models_stay(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    example = entry.example(model)
    structure = Structure.build(model, example)
    generator = torch.Generator().manual_seed(2)
    hessians = {}
    for norm, readers in structure.norms.items():
        x = torch.randn(64, model.get_submodule(norm).weight.numel(), generator=generator)
        x[:, 3] *= 30
        hessians |= {module: x.T @ x for module in readers.modules}
    before = outputs(model, example)
    records, skipped = run(AWQ(THREE), Context(model, structure, hessians=hessians))
    for a, b in zip(outputs(model, example), before, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert len(records) >= (1 if name == "mixtral" else 4) and any(r.data["ratio"] > 0 for r in records)
    if name == "mixtral":
        assert any("is no matrix" in reason for reason in skipped.values())


def test_after_the_pass_rounding_costs_less() -> None:
    model, x = block(torch.Generator().manual_seed(3))
    want = model(x)

    def rounded() -> float:
        copies = [layer.weight.detach().clone() for layer in (model.a, model.b)]
        for layer in (model.a, model.b):
            layer.weight.data = fake_quantize(layer.weight.detach(), THREE)
        error = (model(x) - want).norm().item()
        model.a.weight.data, model.b.weight.data = copies
        return error

    plain = rounded()
    structure = Structure.build(model, ((x,), {}))
    run(AWQ(THREE), Context(model, structure, **moments(model, structure, (x,))))
    assert rounded() < 0.8 * plain


@pytest.mark.parametrize("scheme", [THREE, Scheme(Int(2), Scale("channel")), Scheme(Int(4), Scale("group", group=7))])
def test_clipping_is_the_best_of_its_grid(scheme: Scheme) -> None:
    x, H = inputs()
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(4)) ** 3
    solved = clipped_round(W, H, scheme, "w")
    assert solved.loss == pytest.approx(float((x @ (solved.dequantize(scheme) - W).T).square().sum()), rel=1e-3)
    g = scheme.scale.group_of(24)
    for row in range(5):
        for begin in range(0, 24, g):
            w = W[row : row + 1, begin : begin + g]
            own = scheme.with_(granularity="channel", group=None)
            errors = []
            for p in CLIPS:
                s, z = params_from_range(p * w.amin(1, keepdim=True), p * w.amax(1, keepdim=True), own)
                off = dequantize(quantize(w, s, z, own), s, z, own) - w
                errors.append(float((x[:, begin : begin + g] @ off.T).norm()))
            mine = solved.dequantize(scheme)[row, begin : begin + g] - w[0]
            assert float((x[:, begin : begin + g] @ mine).norm()) == pytest.approx(min(errors), rel=1e-3, abs=1e-5)


def test_clipping_helps_where_tails_are_heavy() -> None:
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(6))
    W = torch.randn(32, 24, generator=torch.Generator().manual_seed(5)) ** 3
    plain = round_to_nearest(W, THREE).dequantize(THREE) - W
    assert clipped_round(W, x.T @ x, THREE).loss < float((x @ plain.T).square().sum())


def test_refusals() -> None:
    x, H = inputs()
    with pytest.raises(ValueError, match="grid=0"):
        AWQ(grid=0)
    with pytest.raises(ValueError, match=r"readers of shapes \[\(2, 5\)\] do not fit inputs of 24 channels"):
        search_scale([torch.ones(2, 5)], H, THREE)
    with pytest.raises(ValueError, match="clipping needs a scale per row or group"):
        clipped_round(torch.ones(2, 24), H, Scheme(Int(4), Scale("tensor")))
    with pytest.raises(ValueError, match="w: "):
        clipped_round(torch.full((2, 24), torch.nan), H, THREE, "w")
    model, x = block(torch.Generator().manual_seed(3))
    structure = Structure.build(model, ((x,), {}))
    with pytest.raises(ValueError, match="norm: scaling needs the second moment"):
        run(AWQ(THREE), Context(model, structure))
