"""The tasks that come with laconic: names, the models that they bring, and that each can be found."""

from __future__ import annotations

import importlib

import pytest

from laconic.errors import BadInput
from laconic.tasks import MODELS, TASKS, own_model


@pytest.mark.parametrize("name", TASKS)
def test_every_task_brings_a_model_that_can_be_fetched(name: str) -> None:
    assert own_model(name) == TASKS[name].model
    assert own_model(name) in MODELS
    assert callable(importlib.import_module(TASKS[name].module).load)


def test_every_model_belongs_to_a_task() -> None:
    assert {entry.model for entry in TASKS.values()} == set(MODELS)


@pytest.mark.parametrize("name", ["minilm", "", "minilm-bbc "])
def test_what_is_no_task_brings_no_model(name: str) -> None:
    assert name not in TASKS
    assert own_model(name) is None


def test_options_reach_the_tasks_own_load() -> None:
    with pytest.raises(BadInput, match="the task cifar-cnn reads images: there is no sequence length to set"):
        TASKS["cifar-cnn"].load(seed=1, seq=8)
