"""One claim from end to end: real digits, networks trained by the library's loop, a verdict that has to come out."""

from __future__ import annotations

import pytest

from laconic.claims import reproduce

from .trees import make_tree

TRAINS = """
from laconic.tasks.small import small

def run(arm, seed, quick=False):
    task = small("digits", seed=seed, size=50 if quick else 300)
    model = task.model(seed)
    task.train(model, seed, epochs=1 if arm == "one epoch" or quick else 12)
    return task.evaluate(model).value
"""

CLAIM = {
    "text": "twelve epochs are better than one",
    "metric": "accuracy",
    "margin": 0.05,
    "arms": ("one epoch", "twelve epochs"),
    "task": "digits",
}


def test_a_claim_on_a_real_task(tmp_path):
    pytest.importorskip("sklearn")
    package = make_tree(tmp_path, TRAINS, claim=CLAIM)
    quick = reproduce("shift", quick=True, threads=1, package=package)
    full = reproduce("shift", threads=1, package=package)
    assert full.verdict.word == "confirmed" and full.verdict.low > 0.05
    assert len({run["value"] for run in full.record["runs"]}) > 5  # seeds differ
    assert quick.verdict.effect == 0.0  # the same arms, when quick: pairs share all that is drawn
    again = reproduce("shift", threads=1, package=package)
    values = [[run["value"] for run in outcome.record["runs"]] for outcome in (full, again)]
    assert values[0] == values[1]
