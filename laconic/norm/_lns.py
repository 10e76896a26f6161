"""`lns`: LayerNorm Scaling, Pre-LN with what the norms of layer l give multiplied by 1 / sqrt(l).

For layer l, counted from 1, a branch F (attention or perceptron, the same factor for both) and x (N, T, d):

    y = x + F(N(x) / sqrt(l))

and the norm behind the last layer as it is. In a Pre-LN model the variance of the sum grows with depth, up to
exponentially; the derivative of deep layers tends to the identity, and they contribute little. The factor bounds the
growth by a polynomial of l.

Source: "The Curse of Depth in Large Language Models", Sun, Song, Li, Yin, Zheng, Liu, 2025, arXiv 2502.05795. Official
code: lmsdss/LayerNorm-Scaling, Apache-2.0. As published there its scheme cannot be reached: a string in lower case is
compared with one in upper case, and layers get no norms. Do not add first weights that shrink with depth (1 / sqrt(2 L) on
output layers): the authors found that they cancel the gain.

At inference the factor folds into the norm's gain, g <- g / sqrt(l), `fold_lns`: what is left is an ordinary Pre-LN
checkpoint. While training it differs from one with such first gains, for the gradient of g has the factor too.

Example:
    >>> import torch
    >>> from laconic.norm import lns, place
    >>> from laconic.zoo import LlamaLM, LlamaLMConfig
    >>> model = LlamaLM(place(LlamaLMConfig(vocabulary=100, width=32, layers=4), lns()))
    >>> model.layers[3].attention.placement.input_scale
    0.5
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from laconic.core.card import Card
from laconic.core.placement import SCHEMES, Residual, Scheme
from laconic.core.placing import placements_of, unscale_
from laconic.errors import BadInput

__all__ = ["fold_lns", "lns"]


def lns() -> Scheme:
    """The scheme, for `place` or a config of `laconic.zoo`."""
    return SCHEMES["lns"]


def fold_lns(model: nn.Module) -> tuple[str, ...]:
    """Fold the factors into the gains (and biases) of the norms, in place; the function of the model stays.

    Args:
        model: one that `place` has changed, or one of `laconic.core.placement.Residual` blocks.

    Returns:
        Paths of the norms that took a factor.

    Raises:
        BadInput: no norm's output is scaled, or a scaled one has no gain.
    """
    if placements_of(model):
        return unscale_(model)
    blocks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Residual) and module.placement.input_scale != 1.0
    ]
    for path, block in blocks:
        if getattr(block.norm_in, "weight", None) is None or block.activation is not None:
            raise BadInput(f"{path}: no norm with a gain stands right before the factor that is to be folded")
    for _, block in blocks:
        scale: float = block.placement.input_scale
        norm: Any = block.norm_in
        with torch.no_grad():
            for parameter in (norm.weight, getattr(norm, "bias", None)):
                if parameter is not None:
                    parameter.mul_(scale)
        block.placement = replace(block.placement, input_scale=1.0)
    if not blocks:
        raise BadInput(f"no block of {type(model).__name__} scales what a norm gives: there is nothing to fold")
    return tuple(f"{path}.norm_in" for path, _ in blocks)


CARD = Card(
    id="lns",
    title="The Curse of Depth in Large Language Models",
    authors="Sun, Song, Li, Yin, Zheng, Liu",
    year=2025,
    source="arXiv 2502.05795",
    family="norm",
    summary="Divides what the norms of a Pre-LN transformer's layer l give by the root of l, so that deep layers keep "
    "contributing.",
    objects={},
    use="Training deep Pre-LN transformers from scratch; it costs nothing and folds into the gains.",
    avoid="Together with first weights that shrink with depth, which cancel the gain.",
    composes=("rmsnorm", "llama_lm"),
    code="github.com/lmsdss/LayerNorm-Scaling, Apache-2.0",
    claim={
        "text": "A transformer whose norms are scaled by the root of the depth predicts better than a Pre-LN one: here "
        "twelve layers, by more than 0.01 bits per character.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.01,
        "arms": ("pre", "lns"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
