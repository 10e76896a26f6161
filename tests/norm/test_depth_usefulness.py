"""`depth_usefulness`: angles and rises by hand, blocks that do nothing, models of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.depth import Batch
from laconic.errors import BadInput
from laconic.norm import DepthUsefulness, angular_distance
from laconic.testing import Example
from tests.core.test_depth import make
from tests.norm.test_signal_propagation import batches, network

EXAMPLES = [Example(lambda: DepthUsefulness(), kind="Probe", inputs=lambda g: [network(), batches(g)])]


def test_the_equation():
    model, data = network().eval(), batches(torch.Generator().manual_seed(0))
    x = torch.cat([batch.args[0] for batch in data])
    target = torch.cat([batch.target for batch in data])
    with torch.no_grad():
        h = model[0](x)
        streams = [h]
        for block in model[1]:
            streams.append(block(streams[-1]))
        y = model[2](streams[-1])
        loss = F.cross_entropy(y, target, reduction="none")
        finding = DepthUsefulness()(model, data)
        for number, row in enumerate(finding.table):
            z = h
            for other, block in enumerate(model[1]):
                z = z if other == number else block(z)
            without = model[2](z)
            rise = F.cross_entropy(without, target, reduction="none") - loss
            cosine = F.cosine_similarity(streams[number], streams[number + 1])
            assert row["angle"] == pytest.approx(float(cosine.arccos().mean()) / math.pi, rel=1e-4)
            assert row["change"] == pytest.approx(float((without - y).norm() / y.norm()), rel=1e-4)
            assert row["loss_rise"] == pytest.approx(float(rise.mean()), rel=1e-3, abs=1e-6)
            assert row["rise_error"] == pytest.approx(float(rise.std()) / math.sqrt(12), rel=1e-3)
    assert finding.loss == pytest.approx(float(loss.mean()), rel=1e-5)
    assert finding.cost["forward passes"] == 1 + 2 * 4 and finding.cost["examples"] == 12


def test_a_block_that_does_nothing_is_useless():
    model = network()
    nn.init.zeros_(model[1][1].branch.weight)
    nn.init.zeros_(model[1][1].branch.bias)
    rows = DepthUsefulness()(model, batches(torch.Generator().manual_seed(0))).table
    assert rows[1]["angle"] == rows[1]["change"] == rows[1]["loss_rise"] == 0.0
    assert min(rows[0]["angle"], rows[0]["change"], abs(rows[0]["loss_rise"])) > 0


def test_angles_are_exact_where_they_are_small():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 1e-9], [0.0, 3.0], [-2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    want = [1e-9 / math.pi, 0.5, 1.0, 0.5]
    assert angular_distance(x, y).tolist() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet", "zoo resnet", "zoo llama", "t5"])
def test_the_models_that_people_have(name):
    model, batch = make(name)
    rows = DepthUsefulness()(model, [batch]).table
    kept = [row for row in rows if row["angle"] is not None]
    assert len(kept) == len(rows) - {"resnet": 1, "zoo resnet": 2}.get(name, 0)
    assert all(0 < row["angle"] < 1 and row["change"] > 0 and row["loss_rise"] is None for row in kept)
    angles = DepthUsefulness(skip=False)(model, [batch])
    assert angles.cost["forward passes"] == 2
    assert [row["angle"] for row in angles.table] == [row["angle"] for row in rows]
    assert all(row["change"] is None for row in angles.table) and "<svg" in angles.plot()


def test_refusals():
    with pytest.raises(BadInput, match="there is no example"):
        DepthUsefulness()(network(), [])
    with pytest.raises(BadInput, match="outputs of the model are not finite"):
        DepthUsefulness()(network(), [Batch((torch.full((2, 5), math.nan),))])
