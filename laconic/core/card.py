"""The card of a method: what it is, where it comes from, what it offers, and what its paper claims.

A method's file `laconic/<family>/_<id>.py` ends with `CARD = Card(...)`, written with literal keyword arguments only,
so that `laconic.catalog` can read it from the source without importing the method. Nothing here needs torch.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from laconic.errors import BadInput

__all__ = ["CLAIM_FIELDS", "DIRECTIONS", "FAMILIES", "KINDS", "LEAST_SEEDS", "BadCard", "Card", "is_id"]

KINDS = (
    "Layer", "Weight", "Constraint", "Init", "Optimizer", "Schedule", "Loss", "Pass", "Search", "Probe", "Model",
    "Decoder", "Protocol", "Data", "Codec",
)  # fmt: skip

FAMILIES = (
    "norm", "weight", "optim", "quant", "binary", "sparse", "dynamic", "distill", "search", "embed", "adapt", "graph",
    "generate", "zoo",
)  # fmt: skip

# What a claim must say, and of what type each part is. Its margin is fixed here, before anything is run.
CLAIM_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "text": str,
    "metric": str,
    "direction": str,
    "margin": (int, float),
    "arms": tuple,
    "seeds": int,
    "minutes": (int, float),
    "task": str,
}
DIRECTIONS = ("higher", "lower")
# Fewer paired seeds cannot give a verdict.
LEAST_SEEDS = 5


class BadCard(BadInput):
    """A card that says something impossible; `field` names the argument at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Card:
    """What is to be known of a method without running it.

    Attributes:
        id: a Python identifier; the file is `laconic/<family>/_<id>.py`.
        title: the paper's title, or a plain one where there is no paper.
        authors: family names, as "Zhang, Sennrich".
        year: of the paper's first version.
        source: where to read it, as "arXiv 1910.07467".
        family: the package of laconic that it belongs to.
        summary: one plain sentence: what it does.
        objects: public name to kind. Empty where the method offers functions alone. Other public functions stand in the
            family's stub only.
        traits: public name to the traits it declares, see `laconic.testing`.
        use: when to use it, one sentence.
        avoid: when something else is better, one sentence.
        composes: ids that it goes well with.
        vectors: names of the vector files that it must reproduce, without `.json`.
        code: the official code and its licence.
        claim: what the paper claims and how it is tested, with the keys of `CLAIM_FIELDS`; None where there is nothing
            to test. `arms` are (baseline, method), `direction` the one in which the metric is better, `minutes` the
            bound of the whole run.

    Raises:
        BadCard: an argument that cannot be right, by name.
    """

    id: str
    title: str
    authors: str
    year: int
    source: str
    family: str
    summary: str
    objects: Mapping[str, str]
    traits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    use: str = ""
    avoid: str = ""
    composes: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    code: str = ""
    claim: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("id", "title", "authors", "source", "family", "summary"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise BadCard(name, f"a text that is not empty is needed, found {getattr(self, name)!r}")
        for name in ("use", "avoid", "code"):
            if not isinstance(getattr(self, name), str):
                raise BadCard(name, f"a text is needed, found {getattr(self, name)!r}")
        if not is_id(self.id):
            raise BadCard("id", f"{self.id!r} is not a lower-case Python identifier")
        # No bound above: a card may be written for a paper of next year. bool is an int, and never a year.
        if not isinstance(self.year, int) or isinstance(self.year, bool) or self.year < 1700:
            raise BadCard("year", f"a year is needed, found {self.year!r}")
        if self.family not in FAMILIES:
            raise BadCard("family", f"{self.family!r} is none of {', '.join(FAMILIES)}")
        self._check_objects()
        _check_names("composes", self.composes)
        _check_names("vectors", self.vectors)
        if self.id in self.composes:
            raise BadCard("composes", f"{self.id} composes with itself")
        if self.claim is not None:
            _check_claim(self.claim)

    def _check_objects(self) -> None:
        if not isinstance(self.objects, Mapping):
            raise BadCard("objects", f"a dict of name to kind is needed, found {self.objects!r}")
        for name, kind in self.objects.items():
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
                raise BadCard("objects", f"{name!r} is not a public Python name")
            if kind not in KINDS:
                raise BadCard("objects", f"{name} is of kind {kind!r}, which is none of {', '.join(KINDS)}")
        if not isinstance(self.traits, Mapping):
            raise BadCard("traits", f"a dict of name to traits is needed, found {self.traits!r}")
        for name, traits in self.traits.items():
            if name not in self.objects:
                raise BadCard("traits", f"{name!r} is not among the objects {', '.join(self.objects) or '(none)'}")
            _check_names("traits", traits)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds it offers, each once, in the order of `KINDS`."""
        return tuple(kind for kind in KINDS if kind in self.objects.values())


def is_id(text: object) -> bool:
    """Whether this can be the id of a method: a lower-case identifier that can name a module and be imported.

    >>> is_id("adamp"), is_id("2dmse"), is_id("RMSNorm"), is_id("lambda"), is_id("_x")
    (True, False, False, False, False)
    """
    return (
        isinstance(text, str)
        and text.isidentifier()
        and text.isascii()
        and text == text.lower()
        and not text.startswith("_")
        and not keyword.iskeyword(text)
    )


def _check_names(field: str, names: object) -> None:
    # A lone string would pass as a tuple of letters.
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise BadCard(field, f'a tuple of names is needed, as ("a", "b"), found {names!r}')
    if len(set(names)) < len(names):
        raise BadCard(field, f"a name stands twice in {names!r}")


def _check_claim(claim: object) -> None:
    if not isinstance(claim, Mapping):
        raise BadCard("claim", f"a dict is needed, found {claim!r}")
    missing = [name for name in CLAIM_FIELDS if name not in claim]
    unknown = [str(name) for name in claim if name not in CLAIM_FIELDS]
    if missing or unknown:
        found = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(unknown)} unknown"] * bool(unknown)
        raise BadCard("claim", f"{'; '.join(found)}: it has the keys {', '.join(CLAIM_FIELDS)}")
    for name, kind in CLAIM_FIELDS.items():
        if not isinstance(claim[name], kind) or isinstance(claim[name], bool):
            raise BadCard("claim", f"{name} is {claim[name]!r}, which is of the wrong type")
    if claim["direction"] not in DIRECTIONS:
        raise BadCard("claim", f"direction is {claim['direction']!r}: write {' or '.join(DIRECTIONS)}")
    arms = claim["arms"]
    if len(arms) != 2 or not all(isinstance(arm, str) and arm for arm in arms) or arms[0] == arms[1]:
        raise BadCard("claim", f"arms are {arms!r}: write two names, (baseline, method)")
    # The margin is how much better, so it has no sign; an infinite one could never be reached.
    if not 0 <= claim["margin"] < float("inf"):
        raise BadCard("claim", f"margin is {claim['margin']!r}: write a finite number that is not negative")
    if claim["seeds"] < LEAST_SEEDS:
        raise BadCard("claim", f"seeds are {claim['seeds']}: a verdict needs at least {LEAST_SEEDS}")
    if not 0 < claim["minutes"] < float("inf"):
        raise BadCard("claim", f"minutes are {claim['minutes']!r}: write a finite, positive number")
