"""A package with one dummy method and its experiment, for tests of claims: nothing is trained, values are made."""

from __future__ import annotations

import textwrap
from pathlib import Path

CARD = '''
"""Shift: adds a number."""

from laconic.core.card import Card


class Shift:
    """Adds a number."""


CARD = Card(
    id="{id}",
    title="On shifting",
    authors="Nobody",
    year=2020,
    source="none",
    family="norm",
    summary="Adds a number.",
    objects={{"Shift": "Layer"}},
    claim={claim!r},
)
'''

CLAIM = {
    "text": "shifting gives a higher score",
    "metric": "score",
    "direction": "higher",
    "margin": 0.1,
    "arms": ("plain", "shift"),
    "seeds": 5,
    "minutes": 1,
    "task": "none",
}

# Differences of 0.4, 0.5 and 0.6 between the arms, on top of what the seed gives both.
HELPS = """
def run(arm, seed, quick=False):
    return 0.3 * seed + (0.5 + 0.1 * (seed % 3 - 1) if arm == "shift" else 0.0)
"""


def make_tree(root: Path, experiment: str | None = HELPS, id: str = "shift", claim: dict | None = None) -> Path:
    """Write the source tree under `root`; return the folder of its package."""
    package = root / "laconic"
    family = package / "norm"
    family.mkdir(parents=True, exist_ok=True)
    (family / f"_{id}.py").write_text(CARD.format(id=id, claim={**CLAIM, **(claim or {})}).lstrip())
    (family / "__init__.pyi").write_text(f"from ._{id} import Shift as Shift\n")
    if experiment is not None:
        folder = root / "experiments" / "norm"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{id}.py").write_text('"""The claim of a dummy."""\n' + textwrap.dedent(experiment))
    return package
