"""State that is kept and comes back as it was, and checkpoints that are whole at any moment."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from laconic.core import checkpoint
from laconic.core.checkpoint import decode, encode, load_checkpoint, save_checkpoint, save_weights
from laconic.errors import BadInput


def there_and_back(value):
    text, tensors = encode(value)
    return decode(json.loads(json.dumps(text)), tensors)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -0.0, 0.1, 1e-310, math.inf, 2**80, "text", b"\x00\xff", [], (), {}, [1, (2, [3.5])],
        {"a": {"b": None}}, {1: "int key", (2, 3): "tuple key", "1": "text key"}, {"$": "not a tag"}, {1, 2},
        Counter({3: 2}), OrderedDict(a=1, b=2), deque([1, 2], maxlen=2), torch.bfloat16, torch.device("cpu"),
        np.float64(0.3), np.int32(4), np.bool_(True),
    ],
)  # fmt: skip
def test_values_come_back(value):
    again = there_and_back(value)
    assert again == value and type(again) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, again) == math.copysign(1, value)
    if isinstance(value, deque):
        assert again.maxlen == value.maxlen


def test_nan_comes_back():
    assert math.isnan(there_and_back([math.nan])[0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(8)[2:5], torch.zeros(0, 3), torch.tensor(3.0),
        torch.randn(2, 2).bfloat16(), torch.randn(2, dtype=torch.complex64), torch.randn(2, dtype=torch.cfloat).conj(),
        torch.tensor([True, False]), torch.arange(3, dtype=torch.uint8), nn.Parameter(torch.ones(2)),
    ],
)  # fmt: skip
def test_tensors_come_back(tensor):
    again = there_and_back({"x": tensor})["x"]
    assert again.dtype == tensor.dtype and torch.equal(again, tensor.detach())


def test_arrays_come_back():
    array = np.arange(6, dtype=np.uint32).reshape(2, 3)
    again = there_and_back([array])[0]
    assert again.dtype == array.dtype and np.array_equal(again, array)


def test_the_same_memory_is_kept_once_and_views_apart():
    x = torch.randn(4, 4)
    _, tensors = encode({"a": x, "b": x, "c": x[:2], "d": x.T})
    assert len(tensors) == 3
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 3


@pytest.mark.parametrize("value", [object(), torch.ones(2).to_sparse(), torch.ones(2, device="meta"), lambda: 0])
def test_what_cannot_be_kept_is_named(value):
    with pytest.raises(BadInput, match=r"^state\.a\.1 "):
        encode({"a": [0, value]})


def test_a_checkpoint_replaces_the_one_before(tmp_path):
    for step in (1, 2, 2, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((3,), float(step))})
        assert torch.equal(load_checkpoint(tmp_path)["x"], torch.full((3,), float(step)))
        assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dies_at", [0, 1])
def test_dying_while_writing_leaves_the_one_before(dies_at, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})
    write, done = checkpoint.write_whole, []

    def die(path, data):
        if len(done) == dies_at:
            path.with_name(path.name + ".tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        done.append(path)
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_whole", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(tmp_path)["x"], torch.ones(3))
    monkeypatch.undo()
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(tmp_path)["x"], torch.zeros(3))


def test_weights_of_a_tied_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    save_weights(tmp_path / "w.safetensors", model)
    assert "2.weight" not in load_file(tmp_path / "w.safetensors")
    again = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    again[2].weight = again[0].weight
    load_model(again, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_disk_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match="cannot be written"):
        save_checkpoint(tmp_path / "missing", 1, {"x": 1})
