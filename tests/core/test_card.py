"""The card: what it refuses, and by which argument; that it needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from laconic.core.card import KINDS, BadCard, Card, is_id
from laconic.errors import BadInput

GIVEN = {
    "id": "halve",
    "title": "On Halves",
    "authors": "Doe",
    "year": 2020,
    "source": "arXiv 0000.00000",
    "family": "norm",
    "summary": "Halves what comes in.",
    "objects": {"Halve": "Layer", "HalveLoss": "Loss", "Halves": "Layer"},
}
CLAIM = {
    "text": "It is better.",
    "metric": "accuracy",
    "direction": "higher",
    "margin": 0.01,
    "arms": ("baseline", "method"),
    "seeds": 5,
    "minutes": 3,
    "task": "digits",
}


def test_a_good_card_is_kept_as_it_is():
    card = Card(**GIVEN, claim=CLAIM, traits={"Halve": ("folds",)}, composes=("rmsnorm",), vectors=("halve",))
    assert (card.id, card.year, card.claim["margin"]) == ("halve", 2020, 0.01)
    assert card.kinds == ("Layer", "Loss")  # each once, in the order of KINDS
    assert Card(**GIVEN).traits == {} and Card(**GIVEN).claim is None


def test_every_kind_is_a_kind():
    assert len(KINDS) == 15 == len(set(KINDS))
    for kind in KINDS:
        assert Card(**GIVEN | {"objects": {"Halve": kind}}).kinds == (kind,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "2dmse"}, "id: '2dmse' is not a lower-case Python identifier"),
        ({"id": "Halve"}, "id: 'Halve' is not"),
        ({"id": "lambda"}, "id: 'lambda' is not"),
        ({"id": ""}, "id: a text that is not empty is needed"),
        ({"title": "  "}, "title: a text that is not empty is needed"),
        ({"summary": 3}, "summary: a text that is not empty is needed, found 3"),
        ({"use": None}, "use: a text is needed, found None"),
        ({"year": "2020"}, "year: a year is needed, found '2020'"),
        ({"year": True}, "year: a year is needed"),
        ({"year": 20}, "year: a year is needed, found 20"),
        ({"family": "norms"}, "family: 'norms' is none of norm, weight,"),
        ({"objects": ("Halve",)}, "objects: a dict of name to kind is needed"),
        ({"objects": {"Halve": "layer"}}, "objects: Halve is of kind 'layer', which is none of Layer, Weight"),
        ({"objects": {"_Halve": "Layer"}}, "objects: '_Halve' is not a public Python name"),
        ({"objects": {"Ha lve": "Layer"}}, "objects: 'Ha lve' is not a public Python name"),
        ({"traits": {"Other": ()}}, "traits: 'Other' is not among the objects Halve, HalveLoss, Halves"),
        ({"traits": {"Halve": "folds"}}, "traits: a tuple of names is needed"),
        ({"composes": "rmsnorm"}, "composes: a tuple of names is needed"),
        ({"composes": ("halve",)}, "composes: halve composes with itself"),
        ({"vectors": ("a", "a")}, "vectors: a name stands twice"),
        ({"claim": "it is better"}, "claim: a dict is needed"),
        ({"claim": {k: v for k, v in CLAIM.items() if k != "margin"}}, "claim: margin missing: it has the keys text,"),
        ({"claim": CLAIM | {"marjin": 1}}, "claim: marjin unknown"),
        ({"claim": CLAIM | {"margin": "1"}}, "claim: margin is '1', which is of the wrong type"),
        ({"claim": CLAIM | {"margin": -0.1}}, "claim: margin is -0.1: write a finite number that is not negative"),
        ({"claim": CLAIM | {"margin": float("nan")}}, "claim: margin is nan"),
        ({"claim": CLAIM | {"direction": "up"}}, "claim: direction is 'up': write higher or lower"),
        ({"claim": CLAIM | {"arms": ("a", "a")}}, "claim: arms are"),
        ({"claim": CLAIM | {"arms": ("a", "b", "c")}}, "claim: arms are"),
        ({"claim": CLAIM | {"seeds": 4}}, "claim: seeds are 4: a verdict needs at least 5"),
        ({"claim": CLAIM | {"seeds": True}}, "claim: seeds is True, which is of the wrong type"),
        ({"claim": CLAIM | {"minutes": 0}}, "claim: minutes are 0"),
        ({"claim": CLAIM | {"minutes": float("inf")}}, "claim: minutes are inf"),
    ],
)
def test_what_cannot_be_is_refused_by_argument(change, says):
    with pytest.raises(BadCard) as error:
        Card(**GIVEN | change)
    assert str(error.value).startswith(says) and isinstance(error.value, BadInput)
    assert error.value.field == next(iter(change))


@pytest.mark.parametrize("bad", ["", "a b", "ä", "_x", "Rms", "class", None, 3])
def test_ids(bad):
    assert is_id("kd_toolbox") and is_id("mse2d")
    assert not is_id(bad)


def test_the_card_needs_no_torch():
    code = "import sys, laconic.core.card, laconic.catalog; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
