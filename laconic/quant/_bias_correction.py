"""`bias_correction`: gives back the mean that rounding the weights took from a layer's output.

Rounding W (rows, K) to W^ shifts the mean output by (W^ - W) E[x], a constant that the bias can absorb:

    b' = b + (W - W^) E[x]        E[x] (K,) over calibration inputs of the layer

For convolutions x are the unfolded windows, so that zero padding is counted (`Hessian.add_conv` collects
their mean).

Source: "Data-Free Quantization Through Weight Equalization and Bias Correction", Nagel, van Baalen,
Blankevoort, Welling, 2019, arXiv 1906.04721 (section 4.2; the empirical form, from data). Official code:
Qualcomm AIMET, BSD-3-Clause. We differ from it: E[x] is measured at the layer itself and not estimated from
batch-norm statistics.

Folds into the bias: free at inference, if the layer has one. Use it after plain rounding at 4 bits and below,
most of all in convolutional networks, whose inputs (after ReLU) have large means. GPTQ already accounts for
means, through H: expect less.

Example:
    >>> W, x = torch.tensor([[0.6, -0.2]]), torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    >>> rounded = W.round()
    >>> b = bias_correction(x.mean(0), W, rounded, None)
    >>> torch.allclose((x @ rounded.T + b).mean(0), (x @ W.T).mean(0))
    True
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import REWRITE, Record
from laconic.core.structure import Structure


def bias_correction(mean_x: Tensor, W: Tensor, W_hat: Tensor, bias: Tensor | None) -> Tensor:
    """b + (W - W^) E[x], computed in float64.

    Args:
        mean_x: (K,), or (groups, K) of a grouped convolution whose rows come in as many equal runs.
        W: (rows, K).
        W_hat: (rows, K).
        bias: (rows,) or None for zeros.

    Returns:
        (rows,) in the bias's dtype, or W's.

    Raises:
        ValueError: shapes that do not belong together.
    """
    mean = mean_x.reshape(-1, W.shape[1]) if W.shape[1] and mean_x.numel() % W.shape[1] == 0 else None
    if mean is None or W.shape != W_hat.shape or mean.shape[0] == 0 or W.shape[0] % mean.shape[0]:
        raise ValueError(
            f"bias_correction: weights {tuple(W.shape)} and {tuple(W_hat.shape)} do not fit means of shape "
            f"{tuple(mean_x.shape)}"
        )
    groups = mean.shape[0]
    shift = (W.double() - W_hat.double()).view(groups, -1, W.shape[1]) @ mean.double()[:, :, None]
    old = torch.zeros(W.shape[0], dtype=W.dtype, device=W.device) if bias is None else bias.detach()
    return (old.double() + shift.reshape(-1)).to(old.dtype)


class BiasCorrection:
    """The pass: corrects the bias of every linear layer and convolution that has one, after its weight was rounded."""

    id: ClassVar = "bias_correction"
    stage: ClassVar = "repair"
    scope: ClassVar = "module"
    needs: ClassVar = frozenset({"data"})

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Layer -> its weight; layer -> why it is left alone."""
        units, skipped = {}, {}
        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                if module.bias is None:
                    skipped[path] = "it has no bias to correct"
                else:
                    units[path] = {"weight": structure.name_of(f"{path}.weight")}
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """b' of the layer at `path`, from `ctx.hessians` and `ctx.values`."""
        weight = decision.units[path]["weight"]
        if path not in ctx.hessians or weight not in ctx.values:
            raise ValueError(f"{path}: correcting its bias needs the mean of its inputs, and its weight before and after")
        before, after = (value.flatten(1) for value in ctx.values[weight])
        bias = bias_correction(ctx.hessians[path].mean, before, after, ctx.model.get_submodule(path).bias)
        return Record(REWRITE, path, {"pass": self.id, "weight": weight}, {"bias": bias})

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the layer its bias."""
        bias = model.get_submodule(record.path).bias
        with torch.no_grad():
            bias.copy_(record.tensors["bias"])


CARD = Card(
    id="bias_correction",
    title="Data-Free Quantization Through Weight Equalization and Bias Correction",
    authors="Nagel, van Baalen, Blankevoort, Welling",
    year=2019,
    source="arXiv 1906.04721, section 4.2",
    family="quant",
    summary="Gives back to a layer's bias the mean output that rounding its weights took away.",
    objects={"BiasCorrection": "Pass"},
    use="After plain rounding at 4 bits and below, most of all in convolutional networks.",
    avoid="After gptq, which has accounted for means already: expect little.",
    composes=("rtn", "fold_batchnorm"),
    code="Qualcomm AIMET, BSD-3-Clause",
)
