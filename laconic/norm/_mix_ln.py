"""`mix_ln`: Post-LN in the first quarter of a transformer's layers, Pre-LN in the others.

For layer l of L with k = floor(alpha L), attention A, perceptron M, norms N_1, N_2, and x (N, T, d):

    l <= k:   h = N_1(x + A(x))         y = N_2(h + M(h))
    l > k:    h = x + A(N_1(x))         y = h + M(N_2(h))

and one norm behind the last layer, as in every Pre-LN model. There is none between the two parts: what the last Post-LN
layer gives is normalized. In a Pre-LN model the sum grows with depth, so deep layers hardly change it and may be removed
without much loss; in a Post-LN model gradients vanish in the first layers. Post-LN where layers are few and near the input,
and Pre-LN behind them, is to keep both ends useful.

Source: "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN", Li, Yin, Liu, 2024,
arXiv 2412.13795. Official code: pixeli99/MixLN, without a licence. There the number of Post-LN layers is given and not
alpha: 3 of 12 and 6 of 24, which alpha = 0.25 gives too. The placement is a setting of `laconic.core.placement`, whatever
the norm is; the paper's is RMSNorm.

At inference gains of norms before linear layers fold as in any Pre-LN layer; those behind the sums do not. Train with a
warm-up of the learning rate (the paper: a tenth of the steps), which the Post-LN part needs. Take `peri_ln` or `lns` where
training must not depend on a warm-up.

Example:
    >>> import torch
    >>> from laconic.norm import place
    >>> from laconic.zoo import LlamaLM, LlamaLMConfig
    >>> model = LlamaLM(place(LlamaLMConfig(vocabulary=100, width=32, layers=8), mix_ln(0.25)))
    >>> [layer.attention.norm_after_add is not None for layer in model.layers]
    [True, True, False, False, False, False, False, False]
"""

from __future__ import annotations

from laconic.core.card import Card
from laconic.core.placement import Placement, Scheme, mix
from laconic.core.placing import Placed, place
from laconic.errors import BadInput

__all__ = ["Placed", "mix_ln", "place"]


def mix_ln(alpha: float = 0.25, *, post: int | None = None) -> Scheme:
    """The scheme: a function of (layer, layers), for `place` or a config of `laconic.zoo`.

    Args:
        alpha: share of the layers that are Post-LN, rounded down.
        post: how many they are, instead of a share.

    Raises:
        BadInput: alpha is not in [0, 1], or the number is negative or larger than the number of layers.
    """
    if post is None:
        return mix(alpha)
    if post < 0:
        raise BadInput(f"mix_ln: {post} layers cannot be Post-LN: give 0 or more")

    def scheme(layer: int, layers: int) -> Placement:
        if post > layers:
            raise BadInput(f"mix_ln: {post} Post-LN layers are asked for, and the model has {layers}")
        return Placement(norm_after_add=True) if layer <= post else Placement(norm_in=True)

    return scheme


CARD = Card(
    id="mix_ln",
    title="Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN",
    authors="Li, Yin, Liu",
    year=2024,
    source="arXiv 2412.13795",
    family="norm",
    summary="Puts the norms of a transformer's first layers behind the sums and those of all others before the branches, "
    "so that deep layers keep contributing.",
    objects={},
    use="Training deep decoder-only transformers from scratch, with a warm-up of the learning rate.",
    avoid="Training without a warm-up, and models that are trained already.",
    composes=("rmsnorm", "llama_lm"),
    code="github.com/pixeli99/MixLN, no licence",
    claim={
        "text": "With norms behind the sums in a quarter of the layers, a transformer predicts better than one with all "
        "norms before the branches: here eight layers, by more than 0.005 bits per character.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.005,
        "arms": ("pre", "mix"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
