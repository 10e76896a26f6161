"""What running a model on calibration data costs: no more of the forward than is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.core.structure import Structure
from laconic.pipeline.observe import positions, rows_within
from laconic.pipeline.residency import InMemory
from laconic.pipeline.walk import Chain, call_order


class Counted(nn.Module):
    """Three equal blocks and a head, which count their calls."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.calls: list[str] = []
        for name, module in [*self.blocks.named_children(), ("head", self.head)]:
            module.register_forward_hook(lambda m, args, out, name=name: self.calls.append(name))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Rows:
    """A task of vectors or of token ids."""

    splits = ("calibrate",)

    def __init__(self, rows: Tensor):
        self.rows = rows

    def forward(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(*batch)

    def batches(self, split: str, *, batch: int | None = None, seq: int | None = None, limit: int | None = None):
        return [(part,) for part in self.rows[:limit].split(batch or len(self.rows))]


def test_the_order_of_calls_ends_with_the_last_module_that_is_asked_for():
    model, task = Counted().eval(), Rows(torch.zeros(1, 8))
    order = call_order(model, task, (task.rows,), ["blocks.1.0", "blocks.0.0"])
    assert sorted(order, key=lambda path: order[path]) == ["blocks.0.0", "blocks.1.0"]
    assert model.calls == ["0"]
    assert call_order(model, task, (task.rows,), ["head"]) == {"head": 0}


def test_activations_do_not_move_past_the_last_block():
    model, task = Counted().eval(), Rows(torch.randn(4, 8))
    batches = task.batches("calibrate", batch=2)
    chain = Chain.find(model, Structure.build(model, ((task.rows,), {})), task, batches, InMemory())
    assert isinstance(chain, Chain)
    chain.start()
    model.calls.clear()
    for block in chain.blocks:
        with chain.block(block):
            pass
    assert model.calls == ["0", "0", "1", "1"]
    assert torch.allclose(torch.cat([chain.hidden[0], chain.hidden[1]]), model.blocks[1](model.blocks[0](task.rows)))


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        (torch.zeros(100, 512, dtype=torch.long), 2),
        (torch.zeros(100, 4096, dtype=torch.long), 1),
        (torch.zeros(100, 3, dtype=torch.long), 8),
        (torch.zeros(100, 3, 32, 32), 64),
        (torch.zeros(100, 3, 224, 224), 1),
    ],
)
def test_examples_of_a_batch_follow_their_length(rows, want):
    task = Rows(rows)
    found = rows_within(task, "calibrate", 1024)
    assert found == want
    assert found == 1 or positions(task.batches("calibrate", batch=found)[0]) <= 1024


def test_a_task_without_inputs_has_batches_of_one():
    assert rows_within(None, "calibrate", 1024) == 1
