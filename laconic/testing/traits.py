"""The traits: what an object may declare about itself, and what the contract then asks more or less of it.

A card declares them per object (`Card.traits`), an `Example` per example. A trait that is not listed here is an error,
so that a misspelt one cannot switch a check off.

An object that declares nothing is held to the strictest reading: its gradient must pass `gradcheck`, for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from laconic.core.card import KINDS
from laconic.errors import BadInput

__all__ = ["TRAITS", "known_traits"]

_GRADIENT = {
    "gradient:exact": "the backward is the derivative of the forward: gradcheck in float64 (the default)",
    "gradient:surrogate": "the backward is another function's (a straight-through estimator): vectors or a test check it",
    "gradient:stateful": "the backward depends on what earlier steps left behind: vectors or a test check it",
}

TRAITS: Mapping[str, Mapping[str, str]] = {
    "Layer": {
        **_GRADIENT,
        "gradient:none": "the layer is not trained through (integer codes, look-ups)",
        "batch_independent_eval": "in evaluation mode an example's output does not depend on the others in its batch",
        "folds": "`as_affine() -> (scale, shift)` is what it does in evaluation mode, per channel",
    },
    "Weight": {
        **_GRADIENT,
        "right_inverse": "`right_inverse(w)` gives an original whose weight is w, for every w that it can make",
    },
    "Constraint": {"tangent": "`tangent(p, x)` is the part of x that keeps p on the constraint to first order"},
    "Init": {"deterministic": "draws no random numbers: every seed gives the same values"},
    "Optimizer": {
        "closure": "needs a closure and may call it more than once",
        "sparse": "takes sparse gradients; without it they are refused with a sentence",
    },
    "Schedule": {},
    "Loss": {
        **_GRADIENT,
        "regulariser": "is a function of parameters, not of a batch: it has no reduction",
        "pairwise": "needs two items at least: a single one is refused",
    },
    "Pass": {"exact": "the rewritten model computes what the model computed, up to rounding"},
    "Search": {},
    "Probe": {},
    "Model": {"causal": "the output at a position does not depend on the inputs after it"},
    "Decoder": {
        "augmented": "its scores are not the log-probabilities of its sequences alone",
        "sampling": "draws its sequences: agreement with brute force is in frequency",
    },
    "Protocol": {
        "order:independent": "the result does not depend on the order of the stream",
        "order:dependent": "the result depends on the order of the stream, and a test shows that it does",
    },
    "Data": {
        "sampler": "yields indices, and its length is how many",
        "transform": "maps an example to an example, with a generator",
    },
    "Codec": {"checksum": "every damaged byte is noticed, not just what no longer parses"},
}

_EXACTLY_ONE = {"Protocol": ("order:independent", "order:dependent"), "Data": ("sampler", "transform")}


def known_traits(kind: str, traits: Iterable[str], whose: str) -> tuple[str, ...]:
    """The traits as a tuple, once they are known to be ones that an object of this kind can have.

    Raises:
        BadInput: an unknown kind or trait, two that exclude each other, or none where one must be chosen.
    """
    if kind not in TRAITS:
        raise BadInput(f"{whose}: {kind!r} is no kind; the kinds are {', '.join(KINDS)}")
    given = tuple(traits)
    for trait in given:
        if trait not in TRAITS[kind]:
            known = ", ".join(TRAITS[kind]) or "none"
            raise BadInput(f"{whose}: {trait!r} is no trait of a {kind}; those are: {known}")
    for prefix in {trait.split(":")[0] for trait in given if ":" in trait}:
        several = [trait for trait in given if trait.startswith(f"{prefix}:")]
        if len(several) > 1:
            raise BadInput(f"{whose}: {' and '.join(several)} exclude each other: keep one")
    choice = _EXACTLY_ONE.get(kind, ())
    if choice and sum(trait in choice for trait in given) != 1:
        raise BadInput(f"{whose}: a {kind} declares exactly one of the traits {' and '.join(choice)}")
    return given
