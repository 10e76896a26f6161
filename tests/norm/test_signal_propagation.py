"""`signal_propagation`: the columns by hand on every kind of model, batches joined, and what it says of placements."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.depth import Batch
from laconic.core.placement import Placement, Residual
from laconic.errors import BadInput
from laconic.norm import SignalPropagation
from laconic.testing import Example
from tests.core.test_depth import make


def network(place: Placement | None = None, blocks: int = 3, width: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [
            Residual(nn.Linear(width, width), place or Placement(norm_in=True), lambda: nn.LayerNorm(width))
            for _ in range(blocks)
        ]
        return nn.Sequential(nn.Linear(5, width), nn.Sequential(*made), nn.Linear(width, 3))


def batches(g: torch.Generator) -> list[Batch]:
    x = torch.randn(12, 5, generator=g)
    return [Batch((x[:8],), {}, torch.arange(8) % 3), Batch((x[8:],), {}, torch.arange(4) % 3)]


EXAMPLES = [Example(lambda: SignalPropagation(), kind="Probe", inputs=lambda g: [network(), batches(g)])]


def test_the_equation():
    """Every column from tensors kept by hand, over two batches."""
    model, data = network().eval(), batches(torch.Generator().manual_seed(0))
    streams = [[], [], [], []]
    squares, grads, ratio = [0.0] * 4, [torch.zeros(0)] * 3, [[0.0, 0.0] for _ in range(3)]
    total = 0.0
    for batch in data:
        x = model[0](batch.args[0])
        x.retain_grad()
        kept = [x]
        for number, block in enumerate(model[1]):
            branch = block.branch(block.norm_in(x))
            ratio[number][0] += float(x.detach().square().mean())
            ratio[number][1] += float(branch.detach().square().mean())
            x = x + branch
            x.retain_grad()
            kept.append(x)
        loss = F.cross_entropy(model[2](x), batch.target, reduction="sum")
        total = total + loss
        loss.backward(retain_graph=True)
        for number, stream in enumerate(kept):
            streams[number].append(stream.detach())
            squares[number] += float(stream.grad.square().sum())
    model.zero_grad()
    (total / 12).backward()
    grads = [math.sqrt(sum(float(p.grad.square().sum()) for p in block.parameters())) for block in model[1]]
    model.zero_grad(set_to_none=True)
    table = SignalPropagation()(model, data).table
    assert [row["block"] for row in table] == ["input", "1.0", "1.1", "1.2"]
    for depth, row in enumerate(table):
        x = torch.cat(streams[depth])
        assert row["variance"] == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-4)
        assert row["squared_mean"] == pytest.approx(float(x.mean(0).square().mean()), rel=1e-4)
        assert row["gradient"] == pytest.approx(math.sqrt(squares[depth] / 12), rel=1e-4)
        if depth:
            before, branch = ratio[depth - 1]
            assert row["branch_over_stream"] == pytest.approx(math.sqrt(branch / before), rel=1e-4)
            assert row["weight_gradient"] == pytest.approx(grads[depth - 1], rel=1e-4)
        else:
            assert row["branch_over_stream"] is None and row["weight_gradient"] is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet", "zoo resnet", "zoo llama", "t5"])
def test_the_models_that_people_have(name):
    model, batch = make(name)
    finding = SignalPropagation()(model, [batch])
    assert all(row["variance"] > 0 and row["gradient"] > 0 for row in finding.table)
    assert all(row["weight_gradient"] > 0 for row in finding.table[1:])
    if name not in ("resnet", "zoo resnet"):  # whose stages begin with a shortcut that is a convolution
        assert all(row["branch_over_stream"] > 0 for row in finding.table[1:])
    assert "a random projection of the output" in finding.notes[0] and "<svg" in finding.plot()


def test_a_frozen_model_has_gradients_of_its_stream_alone():
    model, data = network().requires_grad_(False), batches(torch.Generator().manual_seed(0))
    free = SignalPropagation()(network(), data).table
    for row, other in zip(SignalPropagation()(model, data).table, free, strict=True):
        assert row["weight_gradient"] is None and row["gradient"] == pytest.approx(other["gradient"])
    table = SignalPropagation(gradients=False)(network(), data).table
    assert all(row["gradient"] is None for row in table) and table[1]["variance"] == free[1]["variance"]


def test_what_it_says_of_placements():
    """A stream without norms grows by powers, one whose branches are normalized by sums, one normalized itself not."""
    data = [Batch((torch.randn(64, 5, generator=torch.Generator().manual_seed(1)),))]

    def growth(place: Placement) -> float:
        model = network(place, blocks=12)
        with torch.no_grad():
            for block in model[1]:
                nn.init.orthogonal_(block.branch.weight)
        table = SignalPropagation()(model, data).table
        power = [row["variance"] + row["squared_mean"] for row in table]
        return power[-1] / power[0]

    plain = growth(Placement())
    peri = growth(Placement(norm_in=True, norm_out=True))
    post = growth(Placement(norm_after_add=True))
    assert plain > 20 * peri and peri > 3 * post


def test_padding_is_left_out():
    model, batch = make("bert")
    ids = batch.kwargs["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    other = torch.where(mask.bool(), ids, (ids + 1) % 23)
    one, two = (
        SignalPropagation(gradients=False)(model, [Batch((), {"input_ids": given, "attention_mask": mask})]).table
        for given in (ids, other)
    )
    for row, same in zip(one, two, strict=True):
        assert row["variance"] == pytest.approx(same["variance"], rel=1e-5)
        if row["depth"]:
            assert row["branch_over_stream"] == pytest.approx(same["branch_over_stream"], rel=1e-5)


def test_refusals():
    with pytest.raises(BadInput, match="there is no example"):
        SignalPropagation()(network(), [])
    with pytest.raises(BadInput, match="the stream behind input is not finite"):
        SignalPropagation()(network(), [Batch((torch.full((2, 5), math.nan),))])
