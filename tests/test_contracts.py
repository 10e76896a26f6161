"""Every object of every landed method, held to the contract of its kind.

A method's tests give `EXAMPLES`; here they are found through the catalog, so that none can be forgotten.
"""

from __future__ import annotations

import pytest
import torch

from laconic.testing import check
from tests.testing.landed import cards, examples_of, module_of

SECONDS = 2.0  # on a core of one's own; what is refused takes several times that, since no core in a test run is
SHARED = 3.0
# What these kinds compute cannot be checked by differences: the recorded vectors or a test by one of these names must.
BY_HAND = ("test_gradient", "test_equation", "test_the_equation", "test_backward", "test_steps")


WITH_OBJECTS = [card.id for card in cards().values() if card.objects]
OBJECTS = [(id, name) for id in WITH_OBJECTS for name in cards()[id].objects]


@pytest.fixture(scope="module", autouse=True)
def warm():
    """One thread, and what torch loads when it first exports, so that times are those of the objects."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.export.export(torch.nn.Identity(), (torch.zeros(1),), strict=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("id", WITH_OBJECTS)
def test_every_object_has_an_example(id):
    card = cards()[id]
    found = {example.name: example for example in examples_of(card)}
    missing = sorted(set(card.objects) - set(found))
    assert not missing, f"tests/{card.family}/test_{id}.py: EXAMPLES has none for {', '.join(missing)}"
    strange = sorted(set(found) - set(card.objects))
    assert not strange, f"tests/{card.family}/test_{id}.py: EXAMPLES has {', '.join(strange)}, which the card does not"
    for name, example in found.items():
        assert example.kind == card.objects[name], (
            f"{name} is a {card.objects[name]} in the card, a {example.kind} here"
        )
        declared = set(card.traits.get(name, ()))
        assert set(example.traits) == declared, f"{name}: traits {sorted(declared)} in the card, {example.traits} here"


@pytest.mark.parametrize(("id", "name"), OBJECTS, ids=[f"{id}-{name}" for id, name in OBJECTS])
def test_contract(id, name):
    examples = [example for example in examples_of(cards()[id]) if example.name == name]
    assert examples, f"{id} gives no example of {name}"
    for example in examples:
        report = check(example)
        assert report.ok, str(report)
        if report.seconds > SHARED * SECONDS:  # the first to use some part of torch pays for loading it
            report = check(example)
        assert report.seconds <= SHARED * SECONDS, f"{report}\nmore than {SECONDS} s alone: give {name} smaller inputs"


@pytest.mark.parametrize("id", WITH_OBJECTS)
def test_what_no_contract_can_check_is_checked_by_hand(id):
    card = cards()[id]
    by_hand = [name for name in vars(module_of(card)) if name.startswith(BY_HAND)]
    for example in examples_of(card):
        other = {"gradient:surrogate", "gradient:stateful"} & set(example.traits)
        bare = example.kind == "Optimizer" and example.reference is None
        if other or bare:
            why = f"declares {' '.join(sorted(other))}" if other else "has no reference"
            assert card.vectors or by_hand, f"{example.name} {why}: give vectors, or a test {', '.join(BY_HAND)}..."
