"""`Space`: what is drawn is allowed and uniform, and all neighbours are reached."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from laconic.errors import BadInput
from laconic.search import Space


def space(allowed=None) -> Space:
    return Space({"depth": (2, 4, 8), "norm": ("batch", "layer"), "wide": (False, True)}, allowed)


def shallow(values) -> bool:
    return not (values["depth"] == 8 and values["wide"])


def draws(function, count: int = 3000) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(function(generator) for _ in range(count))


def test_values_and_back() -> None:
    made = space()
    assert made.values((2, 0, 1)) == {"depth": 8, "norm": "batch", "wide": True}
    assert made.candidate(wide=True, norm="batch", depth=8) == (2, 0, 1)
    assert len(made) == 12 and made.sizes == (3, 2, 2)
    assert repr(made) == "Space(depth: 3, norm: 2, wide: 2; 12 combinations)"


@pytest.mark.parametrize("candidate", [(3, 0, 0), (-1, 0, 0), (0, 0), [0, 0, 0], (0, 0, True), (0.0, 0, 0), None])
def test_what_is_no_candidate(candidate: object) -> None:
    assert candidate not in space()
    assert (2, 1, 1) in space() and (2, 1, 1) not in space(shallow)


def test_samples_are_uniform_among_the_allowed() -> None:
    found = draws(space(shallow).sample)
    assert len(found) == 10 and set(found) == {c for c in draws(space().sample) if c in space(shallow)}
    assert max(found.values()) < 1.3 * 300 and min(found.values()) > 0.7 * 300


def test_a_mutation_changes_one_decision_and_reaches_every_neighbour() -> None:
    made = space(shallow)
    found = draws(lambda generator: made.mutate((0, 0, 1), generator))
    assert set(found) == set(made.neighbours((0, 0, 1))) == {(1, 0, 1), (0, 1, 1), (0, 0, 0)}
    free = draws(lambda generator: space().mutate((0, 0, 1), generator))
    # Each of three decisions a third, of which depth has two other values.
    assert free[(1, 0, 1)] / 3000 == pytest.approx(1 / 6, abs=0.03)
    assert free[(0, 1, 1)] / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_crossover_takes_each_decision_from_either() -> None:
    made = space()
    found = draws(lambda generator: made.crossover((0, 0, 1), (2, 1, 1), generator))
    assert set(found) == {(a, b, 1) for a in (0, 2) for b in (0, 1)}


def test_onehot() -> None:
    assert space().onehot((1, 0, 1)).tolist() == [0, 1, 0, 1, 0, 0, 1]


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="at least one decision"):
        Space({})
    with pytest.raises(BadInput, match="'a' needs a sequence of values"):
        Space({"a": ()})
    with pytest.raises(BadInput, match="'a' needs a sequence of values, not 'xyz'"):
        Space({"a": "xyz"})
    with pytest.raises(BadInput, match="'a' has a value twice"):
        Space({"a": (1, 2, 1)})
    with pytest.raises(BadInput, match="refused 1000 draws"):
        space(lambda values: False).sample(torch.Generator())
    with pytest.raises(BadInput, match="nothing to search"):
        Space({"a": (1,)}).mutate((0,), torch.Generator())
    with pytest.raises(BadInput, match="depth is one of .*, not 3"):
        space().candidate(depth=3, norm="batch", wide=True)
    with pytest.raises(BadInput, match="the decisions are depth, norm, wide, not depth"):
        space().candidate(depth=2)
    with pytest.raises(BadInput, match="does not allow"):
        space(shallow).candidate(depth=8, norm="batch", wide=True)
