"""The contracts themselves: sound objects pass, and for every check there is an object that it finds broken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from laconic.core.card import KINDS
from laconic.errors import BadInput
from laconic.testing import TRAITS, Example, Ints, check, checks_for
from tests.testing import methods, modules, training

SOUND = [*modules.SOUND, *training.SOUND, *methods.SOUND]
BROKEN = [*modules.BROKEN, *training.BROKEN, *methods.BROKEN]
CHECKS = {function.__name__: function for kind in KINDS for function in checks_for(kind)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_check_has_a_broken_object():
    assert set(CHECKS) == {name for name, _, _ in BROKEN}


def test_every_kind_has_checks_and_a_sound_object():
    assert set(KINDS) == set(TRAITS) == {example.kind for example in SOUND}
    assert all(len(checks_for(kind)) >= 4 for kind in KINDS)


def test_every_check_passes_for_some_sound_object():
    assert set(CHECKS) == {name for example in SOUND for name in check(example).passed}


@pytest.mark.parametrize("example", SOUND, ids=lambda e: f"{e.kind}-{e.title()}-{'-'.join(e.traits)}")
def test_sound_objects_pass(example):
    report = check(example)
    assert report.ok, str(report)
    assert report.passed


@pytest.mark.parametrize(
    ("name", "example", "says"), BROKEN, ids=[f"{name}-{example.title()}" for name, example, _ in BROKEN]
)
def test_broken_objects_fail(name, example, says):
    only = dataclasses.replace(example, name="broken")
    with pytest.MonkeyPatch.context() as patch:  # the one check alone: a broken object may break others too
        patch.setattr("laconic.testing.contract.checks_for", lambda kind: (CHECKS[name],))
        report = check(only)
    assert list(report.failed) == [name], str(report)
    assert says in report.failed[name]


def layer(**changes) -> Example:
    example = Example(lambda: torch.nn.LayerNorm(4), kind="Layer", inputs=[(3, 4)], wrong=[(3, 5)])
    return dataclasses.replace(example, **changes)


def test_an_expected_failure_is_shown_with_its_reason():
    reason = "it centres its batch by design"
    report = check(
        dataclasses.replace(
            modules.layer(modules.Centred, "batch_independent_eval"),
            expected_failures={"check_layer_batch_independent_eval": reason},
        )
    )
    assert report.ok and report.expected == {"check_layer_batch_independent_eval": reason}
    assert reason in str(report)


def test_an_expected_failure_that_passes_is_a_failure():
    report = check(layer(expected_failures={"check_layer_shape": "an old fault"}))
    assert "remove it from expected_failures" in report.failed["check_layer_shape"]
    with pytest.raises(AssertionError, match="an old fault"):
        report.raise_if_failed()


def test_an_expected_failure_that_does_not_apply_is_a_failure():
    report = check(layer(expected_failures={"check_layer_folds": "an old fault"}))
    assert "does not apply" in report.failed["check_layer_folds"]


def test_what_is_left_out_says_why():
    assert check(layer()).left_out["check_layer_folds"] == "it does not declare 'folds'"


def test_a_check_leaves_global_random_numbers_alone():
    before = torch.get_rng_state()
    check(layer())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layer(traits=("batch_independent",)), "'batch_independent' is no trait of a Layer"),
        (lambda: layer(traits=("gradient:exact", "gradient:none")), "exclude each other"),
        (lambda: layer(kind="Leyer"), "'Leyer' is no kind"),
        (lambda: layer(expected_failures={"check_layer_shape": " "}), "has no reason"),
        (lambda: check(layer(expected_failures={"check_layer_shpe": "?"})), "check_layer_shpe is no check of a Layer"),
        (lambda: checks_for("Leyer"), "'Leyer' is no kind"),
        (lambda: Example(object, kind="Protocol"), "exactly one of the traits order:independent and order:dependent"),
        (lambda: Example(object, kind="Data", traits=("sampler", "transform")), "exactly one"),
    ],
)
def test_bad_examples_are_refused(make, says):
    with pytest.raises(BadInput, match=says):
        make()


def test_missing_inputs_are_said():
    assert "give Example(inputs=...)" in check(layer(inputs=None)).failed["check_layer_shape"]
    assert "give Example(wrong=...)" in check(layer(wrong=None)).failed["check_layer_refuses_wrong_shape"]


def test_inputs_are_fresh_and_seeded():
    given = torch.zeros(2)
    example = layer(inputs=[(2, 3), Ints((5,), 4, low=2), given, None])
    first, second = example.arguments(), example.arguments()
    assert torch.equal(first[0], second[0]) and first[0] is not second[0]
    assert not torch.equal(first[0], example.arguments(seed=1)[0])
    assert set(first[1].tolist()) <= {2, 3} and first[3] is None
    first[2].add_(1)
    assert not given.any() and not second[2].any()
    wide = example.arguments(dtype=torch.float64)
    assert wide[0].dtype == torch.float64 and wide[1].dtype == torch.int64
