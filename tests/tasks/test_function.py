"""The user's own scoring function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.tasks import compare, load_task

SCORES = """
import torch

def number(model):
    return float(model.weight.sum())

def array(model, split):
    return [1.0, 0.0] if split == "verify" else [0.0], {"seconds": 3}

array.batches = lambda split: [torch.ones(2, 3)] * 4
array.higher_is_better = False
array.bounded = False

def wrong(model):
    return "good"

def matrix(model):
    return torch.ones(2, 2)

value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(SCORES)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    return "my_scores"


def test_a_number(module):
    task = load_task(f"{module}:number")
    model = nn.Linear(3, 1, bias=False)
    found = task.evaluate(model, "verify")
    assert found.value == pytest.approx(model.weight.sum().item())
    assert task.splits == ("verify",) and task.sizes == {"verify": 1}
    assert [note.split(" ", 1)[1][:18] for note in task.notes] == ["offers no batches ", "takes no split: it"]
    with pytest.raises(BadInput, match="has no inputs for 'calibrate'.*attribute batches"):
        task.batches("calibrate")
    with pytest.raises(BadInput, match="no 'select' split"):
        task.evaluate(model, "select")


def test_scores_splits_and_batches(module):
    task = load_task(f"{module}:array")
    assert task.splits == ("calibrate", "select", "verify") and task.notes == []
    found = task.evaluate(nn.Linear(3, 1), "verify")
    assert (found.value, found.also, found.per_example.tolist()) == (0.5, {"seconds": 3.0}, [1.0, 0.0])
    assert task.evaluate(nn.Linear(3, 1), "select").value == 0.0
    batches = task.batches("calibrate", limit=3)
    assert len(batches) == 3 and task.forward(nn.Linear(3, 1), batches[0]).shape == (2, 1)
    assert not task.metric.higher_is_better and not task.metric.bounded
    assert compare(found, found, task.metric).drop == 0


def test_a_function_object():
    def score(model):
        return np.ones(4)

    assert load_task(score).evaluate(nn.Identity(), "verify").value == 1.0
    assert load_task(load_task(score)).id == "score"


def test_gradients_are_off_and_the_model_in_eval_mode():
    seen = []

    def score(model):
        seen.append((torch.is_grad_enabled(), model.training))
        return 1.0

    load_task(score).evaluate(nn.Identity().train(), "verify")
    assert seen == [(False, False)]


@pytest.mark.parametrize(
    "target, said",
    [
        ("my_scores:gone", "the module my_scores has no function gone"),
        ("my_scores:value", "is not a function but a int"),
        ("my_gone:f", r"the module my_gone cannot be imported \(ModuleNotFoundError"),
        ("my_broken:f", r"cannot be imported \(ZeroDivisionError"),
    ],
)
def test_no_such_function(module, target, said):
    with pytest.raises(BadInput, match=said):
        load_task(target)


@pytest.mark.parametrize("name, said", [("wrong", "returned str"), ("matrix", r"an array of shape \(2, 2\)")])
def test_what_is_no_score(module, name, said):
    with pytest.raises(BadInput, match=said):
        load_task(f"{module}:{name}").evaluate(nn.Identity(), "verify")
