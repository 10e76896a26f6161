"""Strategies: methods of the catalogue by name, each as the recipe that it stands for.

    laconic compress MODEL --task TASK --strategy awq

`auto`, the default, is gptq with the joint search (`search`) where the drop of a budget is missed; `search` always searches.
Bits of every parameter are allocated under the budget whatever the strategy is, among those that its method can round to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from laconic.errors import BadInput

from .recipe import (
    AWQ,
    BiasCorrection,
    FoldBatchNorm,
    FuseBlocks,
    Method,
    NormTweak,
    Quantize,
    Recipe,
    Rotate,
    SmoothQuant,
    Step,
)

__all__ = ["STRATEGIES", "Searching", "Strategy", "strategy"]

Searching = Literal["never", "missed", "always"]


@dataclass(frozen=True)
class Strategy:
    """A way of compressing.

    Attributes:
        summary: what it does, in a line.
        recipe: its passes.
        search: whether other recipes are tried beside it: where the drop of the budget is "missed", "always" or "never".
    """

    summary: str
    recipe: Recipe
    search: Searching = "never"

    @property
    def data(self) -> bool:
        """Whether without data it would be another method, so that it is refused."""
        step = self.recipe.quantize
        by_data = bool(self.recipe.rewrites) or (step is not None and step.method != "rtn")
        return self.search == "never" and by_data


def _recipe(quantize: Quantize, *further: Step) -> Recipe:
    return Recipe(passes=[FoldBatchNorm(), quantize, FuseBlocks()]).with_passes(*further)


def _by(method: Method, *further: Step) -> Recipe:
    return _recipe(Quantize(method=method), *further)


HQQ = [
    "v1/int8/channel/float16/minmax/znone/nearest",
    "v1/int6/group128/float16/minmax/zint/nearest",
    *(f"v1/int{bits}/group{g}/float16/hqq/zreal/nearest" for bits in (4, 3, 2) for g in (32, 128)),
]
NF4 = "v1/levelsnf4/group64/float16/minmax/znone/nearest"

STRATEGIES: dict[str, Strategy] = {
    "auto": Strategy("gptq, and the search where the drop of the budget is missed", Recipe(), "missed"),
    "search": Strategy(
        "gptq, awq, rotate, rsq, norm_tweak, genie and adaquant, whichever loses least here", Recipe(), "always"
    ),
    "rtn": Strategy("to nearest; needs no data", _by("rtn")),
    "gptq": Strategy("column by column, later columns absorbing errors; biases corrected", Recipe()),
    "awq": Strategy("columns that meet large inputs scaled up, ranges clipped", _by("awq", AWQ())),
    "smoothquant": Strategy(
        "outliers moved from activations into weights, both in integers",
        _recipe(Quantize(method="rtn", inputs="int8"), SmoothQuant()),
    ),
    "rotate": Strategy("activations turned by Hadamard matrices, then gptq", _by("gptq", Rotate(), BiasCorrection())),
    "rsq": Strategy("turned, then gptq with tokens counted by the attention they get", _by("rsq", Rotate())),
    "norm_tweak": Strategy("gptq, then each block's norms trained", _by("gptq", NormTweak())),
    "adaquant": Strategy("ranges, weights and biases of each layer trained on its outputs", _by("adaquant")),
    "genie": Strategy("the way that each weight rounds trained, layer by layer (AdaRound)", _by("genie")),
    "hqq": Strategy(
        "to nearest, zero points at 4 bits and below solved for; needs no data", _recipe(Quantize(method="rtn", schemes=HQQ))
    ),
    "nf4": Strategy("4-bit NormalFloat, as qlora; needs no data", _recipe(Quantize(method="rtn", schemes=[NF4]))),
    "uniform": Strategy("gptq with the same bits for all", _recipe(Quantize(allocate="uniform"), BiasCorrection())),
    "layer_bits": Strategy(
        "gptq with whole blocks of fewer bits, the least important first",
        _recipe(Quantize(allocate="blocks"), BiasCorrection()),
    ),
    "hessian_interlayer": Strategy(
        "gptq with bits bisected along an order of sensitivity; needs a drop",
        _recipe(Quantize(allocate="bisect"), BiasCorrection()),
    ),
}


def strategy(name: str, has_data: bool = True) -> Strategy:
    """The strategy of this name, for a run with data or without.

    Raises:
        BadInput: there is none; the message lists them. Or it needs data, and there are none.
    """
    if name not in STRATEGIES:
        raise BadInput(f"{name!r} is no strategy: there are {', '.join(STRATEGIES)}")
    found = STRATEGIES[name]
    if found.data and not has_data:
        *others, last = [other for other, one in STRATEGIES.items() if not one.data and one.search == "never"]
        raise BadInput(
            f"the strategy {name} needs data: pass --data, --task or --data self, or take {', '.join(others)} or {last}, "
            "which need none"
        )
    return found
