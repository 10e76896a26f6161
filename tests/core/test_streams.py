"""The streams that layer norms read: who writes, who else reads, and what cannot be followed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.core.structure import Structure
from tests.core.test_placing import make


def streams(model, *args, how=None):
    return Structure.build(model.eval(), (args, {}), how=how).streams


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(9, 6), nn.Parameter(torch.randn(1, 4, 6))
        self.norm, self.write = nn.LayerNorm(6), nn.Linear(6, 6, bias=False)

    def start(self, ids):
        return self.table(ids) + self.place

    def forward(self, ids):
        x = self.start(ids)
        return self.norm(x + self.write(self.norm(x)))


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_writers_and_norms_of_a_small_model(how):
    (found,) = streams(Stream(), torch.zeros(2, 4, dtype=torch.long), how=how)
    assert found.norms == ("norm",) and found.width == 6 and found.reason == ""
    assert {(w.name, w.axis) for w in found.writers} == {("table.weight", 1), ("place", 2), ("write.weight", 0)}


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_models_of_transformers_have_one_stream(name):
    model, inputs = make(name)
    (found,) = Structure.build(model, ((), inputs)).streams
    assert len(found.norms) == 9 and found.reason == ""
    assert len(found.writers) == {"gpt2": 2 + 4 * 4, "vit": 4 + 4 * 4}[name]


class Made(Stream):
    def start(self, ids):
        return torch.zeros(2, 4, 6) + self.place


class Nonlinear(Stream):
    def start(self, ids):
        return super().start(ids).relu()


class Given(Stream):
    def start(self, ids):
        return ids


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (Nonlinear, torch.zeros(2, 4, dtype=torch.long), "relu in the model writes to it"),
        (Given, torch.zeros(2, 4, 6), "an input of the model goes into it"),
    ],
)
def test_what_cannot_be_followed_is_named(kind, given, says):
    assert says in streams(kind(), given)[0].reason


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_values_from_nowhere_do_no_harm(how):
    (found,) = streams(Made(), torch.zeros(2, 4, dtype=torch.long), how=how)
    assert found.reason
