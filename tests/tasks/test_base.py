"""What all tasks share: splits, batches, the output that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from laconic.errors import BadInput
from laconic.tasks.base import call, cut, disjoint, main_output
from laconic.tasks.labels import AccuracyTask


def test_splits_are_disjoint_seeded_and_of_the_size_asked():
    sizes = {"calibrate": 20, "select": 30, "verify": -1}
    splits = disjoint(100, sizes, seed=1)
    assert [len(indices) for indices in splits.values()] == [20, 30, 50]
    assert sorted(np.concatenate(list(splits.values()))) == list(range(100))
    for name, indices in disjoint(100, sizes, seed=1).items():
        np.testing.assert_array_equal(indices, splits[name])
    assert not np.array_equal(disjoint(100, sizes, seed=2)["verify"], splits["verify"])


def test_classes_take_turns():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    splits = disjoint(100, {"calibrate": 15, "select": 15, "verify": -1}, 0, labels)
    assert np.bincount(labels[splits["calibrate"]]).tolist() == [5, 5, 5]
    assert np.bincount(labels[splits["select"]]).tolist() == [5, 5, 5]
    assert sorted(np.concatenate(list(splits.values()))) == list(range(100))


def accuracy_task(n=7, classes=3):
    inputs = {
        split: (torch.eye(classes)[torch.arange(n) % classes],) for split in ("calibrate", "select", "verify")
    }
    return AccuracyTask("toy", inputs, {split: np.arange(n) % classes for split in inputs}, batch=3)


def test_batches_cover_a_split_in_order():
    task = accuracy_task()
    assert [len(batch[0]) for batch in task.batches("verify")] == [3, 3, 1]
    assert [len(batch[0]) for batch in task.batches("verify", batch=2, limit=5)] == [2, 2, 1]
    torch.testing.assert_close(
        torch.cat([b[0] for b in task.batches("verify", batch=2)]), task.rows("verify")[0]
    )


def test_unknown_split_is_refused():
    with pytest.raises(BadInput, match="no 'test' split; it has calibrate, select, verify"):
        accuracy_task().batches("test")


def test_evaluate_measures_and_puts_the_mode_back():
    task, seen = accuracy_task(), []
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    model[0].eval()
    found = task.evaluate(model, "verify", progress=lambda done, total: seen.append((done, total)))
    assert found.value == 1.0 and found.answers == [0, 1, 2, 0, 1, 2, 0]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert model.training and model[1].training and not model[0].training


def test_label_beyond_the_outputs_is_refused():
    inputs = {"verify": (torch.eye(3),)}
    with pytest.raises(BadInput, match=r"label 3 of toy is beyond the model's 3 classes \(0 to 2\)"):
        AccuracyTask("toy", inputs, {"verify": np.array([0, 1, 3])}).evaluate(nn.Identity(), "verify")


def test_forward_has_a_gradient():
    task, model = accuracy_task(), nn.Linear(3, 3)
    task.forward(model, task.batches("calibrate")[0]).sum().backward()
    assert model.weight.grad is not None


def test_main_output():
    x, y = torch.ones(2, 3), torch.zeros(2, 4)
    assert main_output(x) is x
    assert main_output(CausalLMOutput(loss=torch.tensor(1.0), logits=x)) is x
    assert main_output(BaseModelOutput(last_hidden_state=y, hidden_states=(x,))) is y
    assert main_output((torch.arange(3), y, x)) is y
    with pytest.raises(BadInput, match="without a floating tensor"):
        main_output((torch.arange(3),))


def test_call_leaves_out_a_mask_that_the_forward_does_not_know():
    class Plain(nn.Module):
        def forward(self, input_ids):
            return input_ids

    class Any(nn.Module):
        def forward(self, **inputs):
            return sorted(inputs)

    batch = {"input_ids": torch.arange(3), "attention_mask": torch.ones(3)}
    assert torch.equal(call(Plain(), batch), torch.arange(3))
    assert call(Any(), batch) == ["attention_mask", "input_ids"]


def test_cut_shortens_tokens_only():
    rows = {
        "input_ids": torch.ones(2, 8),
        "attention_mask": torch.ones(2, 8),
        "pixel_values": torch.ones(2, 8),
    }
    assert [tuple(value.shape) for value in cut(rows, 3).values()] == [(2, 3), (2, 3), (2, 8)]
    assert cut(rows, None) is rows
