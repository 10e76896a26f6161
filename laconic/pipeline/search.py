"""The joint search: which recipes are worth trying on a model beside the one at hand.

Bits of parameters are allocated within every recipe (`decide`); here is what else may change: rewrites of the float model
before (awq, rotate), the method that rounds (gptq, rsq, genie, adaquant), repair after (norm_tweak), and one width for all: at
2 bits the costs that the program adds up say little of what layers do together. Each candidate is solved whole and measured
on the select split, under the same ceiling of bytes: what a rewrite promises by itself, a method that weighs errors by the
inputs often does already.
"""

from __future__ import annotations

from torch import nn

from laconic.core.structure import Structure
from laconic.quant import NormTweak

from .recipe import AWQ, LEARNED, BiasCorrection, Recipe, Rotate
from .recipe import NormTweak as NormTweakStep
from .rewrite import pass_of

__all__ = ["candidates", "told"]

TRAINED = 20_000_000  # parameters of a model, at most, for a method that trains every layer
FILLED = 0.95  # of the ceiling, at least, for a plan of one width to be worth solving


def candidates(recipe: Recipe, structure: Structure, model: nn.Module, filled: float = 0.0) -> list[Recipe]:
    """Recipes that fit a model, each one step away from the one given.

    Args:
        recipe: with a quantize pass and no rewrites.
        structure, model: of the float model.
        filled: how much of the ceiling the best plan of one width takes.
    """
    found: list[Recipe] = []
    if pass_of(AWQ()).plan(structure, model).units:
        found.append(recipe.with_passes(AWQ()))
    if pass_of(Rotate()).plan(structure, model).units:
        found.append(recipe.with_passes(Rotate()))
        if structure.mixers:
            found.append(_without_correction(recipe).with_passes(Rotate(), method="rsq"))
    if NormTweak().plan(structure, model).units:
        found.append(recipe.with_passes(NormTweakStep()))
    if sum(p.numel() for p in model.parameters()) <= TRAINED:
        found += [_without_correction(recipe).with_passes(method=name) for name in LEARNED]
    if filled >= FILLED:
        found.append(recipe.with_passes(allocate="uniform"))
    return found


def _without_correction(recipe: Recipe) -> Recipe:
    return Recipe(passes=[step for step in recipe.passes if not isinstance(step, BiasCorrection)])


def told(recipe: Recipe) -> str:
    """A recipe in a few words: "rotate, gptq, norm_tweak"."""
    step = recipe.quantize
    names = [p.action for p in recipe.rewrites] + ([step.method] if step is not None else [])
    names += [step.allocate] if step is not None and step.allocate != "program" else []
    return ", ".join([*names, "norm_tweak"] if recipe.norm_tweak is not None else names)
