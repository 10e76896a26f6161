"""`peri_ln`: a norm before each branch and another behind it, before the sum.

For a branch F (attention or perceptron), norms N_in, N_out of its own, and x (N, T, d):

    y = x + N_out(F(N_in(x)))           and, before the first layer, x_0 = N_emb(x_0) (optional)

A branch then adds a variance that its gain g_out fixes, mean(g_out^2), so that the variance of the sum grows linearly with
depth; with N_in alone it may grow exponentially. The output of F, and with it the size of its last weight, cancels in
N_out: the gradient of that weight is orthogonal to it, and weight decay on it only sets its effective learning rate.

Source: "Peri-LN: Revisiting Layer Normalization in the Transformer Architecture", Kim, Lee, Park, Oh, Kim, Yoo, Shin, Han,
Shin, Yoo, 2025, arXiv 2502.02732. No official code is public; Gemma 2 and 3 are built so, and OLMo 2 with N_out alone
("output" in `laconic.core.placement`). "sandwich" there is the same without N_emb.

At inference the gain of N_in folds into its readers. That of N_out does not fold: the sum stands behind it, and the
division before it. Factors that make the first weights of branch outputs smaller have no effect here.

Example:
    >>> import torch
    >>> from laconic.norm import place, peri_ln
    >>> from laconic.zoo import LlamaLM, LlamaLMConfig
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaLM(place(LlamaLMConfig(vocabulary=100, width=256, layers=2), "peri"))
    >>> [round(v) for v in stream_variances(model, model.layers, torch.randint(100, (4, 16)))]  # 1 + two branches a layer
    [1, 3]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.modes import evaluating
from laconic.core.placement import SCHEMES, Scheme
from laconic.errors import BadInput

__all__ = ["peri_ln", "stream_variances"]


def peri_ln() -> Scheme:
    """The scheme, for `place` or a config of `laconic.zoo`; these normalize the embeddings too for the name "peri"."""
    return SCHEMES["peri"]


def stream_variances(model: nn.Module, layers: Iterable[nn.Module], *args: Any, **kwargs: Any) -> list[float]:
    """Variance over all entries of what each layer reads, in one call of the model: how the sum grows with depth.

    The first layer's norm of embeddings, which `place` puts into it, is seen through.

    Args:
        model: is called with what follows `layers`, in evaluation mode.
        layers: its layers, in order.

    Raises:
        BadInput: a layer was not called with a tensor first.
    """
    found: dict[nn.Module, float] = {}

    def note(module: Any, given: tuple[Any, ...]) -> None:
        if not given or not isinstance(given[0], Tensor):
            raise BadInput(f"{type(module).__name__} is no layer of a transformer: its first argument is no tensor")
        x = given[0] if getattr(module, "norm_embedding", None) is None else module.norm_embedding(given[0])
        found[module] = float(x.double().var(correction=0))

    chosen = list(layers)
    handles = [layer.register_forward_pre_hook(note) for layer in chosen]
    try:
        with torch.no_grad(), evaluating(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [number for number, layer in enumerate(chosen) if layer not in found]
    if missing:
        raise BadInput(f"layer {missing[0]} of those given was not called by {type(model).__name__}")
    return [found[layer] for layer in chosen]


CARD = Card(
    id="peri_ln",
    title="Peri-LN: Revisiting Layer Normalization in the Transformer Architecture",
    authors="Kim, Lee, Park, Oh, Kim, Yoo, Shin, Han, Shin, Yoo",
    year=2025,
    source="arXiv 2502.02732",
    family="norm",
    summary="Normalizes what each branch of a transformer reads and what it adds, so that activations grow linearly with "
    "depth.",
    objects={},
    use="Training transformers from scratch at high learning rates or in low precision, where activations must stay "
    "bounded.",
    avoid="Where the two more norms of a layer cost too much time: their division does not fold.",
    composes=("rmsnorm", "llama_lm"),
    code="none is public",
    claim={
        "text": "At a learning rate ten times the usual one, a transformer with norms around its branches predicts better "
        "than one with norms before them alone: here eight layers at 0.03, by more than 0.05 bits per character.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("pre", "peri"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
