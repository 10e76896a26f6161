"""`fold_batchnorm`: a batch norm in evaluation mode is affine, so the layer before it can do its work.

For y = BN(conv(x)) with weight w, bias b, and the batch norm's mean, var, gamma, beta, eps, per output
channel:

    f = gamma / sqrt(var + eps)        w' = w f        b' = (b - mean) f + beta

The batch norm becomes `nn.Identity`; a layer without a bias gets one. Computed in float64 and cast once. In
transposed convolutions, whose weight is (in, out / groups, kernel), output channels lie on the second axis,
group by group.

Source: folklore; e.g. section 3.2 of "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", Jacob et al., 2017, arXiv 1712.05877. Cf. `torch.nn.utils.fusion`, which
needs modules and not a model, and computes in the weight's type.

Always use it before quantizing weights: the scale of a channel is then part of what is rounded, and the batch
norm costs neither bytes nor time. Not for models that will be trained further in training mode.

Example:
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    >>> x = torch.randn(2, 3, 8, 8)
    >>> before = model(x)
    >>> fold_batchnorm(model, "0", "1")
    >>> model[1], torch.allclose(model(x), before, atol=1e-6)
    (Identity(), True)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import FOLD, Record, apply_fold
from laconic.core.structure import Structure

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Fold(NamedTuple):
    """A layer, the batch norm that alone reads its output, and why they can't become one ("" if they can)."""

    conv: str
    bn: str
    reason: str


def foldable(structure: Structure, model: nn.Module) -> list[Fold]:
    """Every pair of `structure.batchnorm_pairs`, with the reason where it cannot be folded."""
    return [Fold(conv, bn, _refusal(model, conv, bn)) for conv, bn in structure.batchnorm_pairs]


def fold_batchnorm(model: nn.Module, conv: str, bn: str) -> None:
    """Fold the batch norm at path `bn` into the layer at path `conv`, in place. On `meta`, shapes change
    likewise.

    Raises:
        ValueError: the two cannot be folded, and why.
    """
    reason = _refusal(model, conv, bn)
    if reason:
        raise ValueError(f"{bn} cannot be folded into {conv}: {reason}")
    layer, norm = model.get_submodule(conv), model.get_submodule(bn)
    with torch.no_grad():
        weight, bias = folded(layer, norm)
        layer.weight.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(bias)
    model.set_submodule(bn, nn.Identity().train(norm.training))


class FoldBatchNorm:
    """The pass: every batch norm that alone reads a layer's output goes into that layer."""

    id: ClassVar = "fold_batchnorm"
    stage: ClassVar = "fold"
    scope: ClassVar = "module"
    needs: ClassVar = frozenset({"float"})

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Layer -> the norm that goes into it; norm -> why it cannot."""
        found = foldable(structure, model)
        return Decision(
            {fold.conv: {"norm": fold.bn} for fold in found if not fold.reason},
            {fold.bn: fold.reason for fold in found if fold.reason},
        )

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """w' and b' of the layer at `path`."""
        norm = decision.units[path]["norm"]
        weight, bias = folded(ctx.model.get_submodule(path), ctx.model.get_submodule(norm))
        return Record(FOLD, path, {"norm": norm}, {"weight": weight.detach(), "bias": bias.detach()})

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the layer its values and take the norm away."""
        apply_fold(model, record)


def fold_shapes(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """The same edit for all (conv, bn) of a skeleton on `meta`: new biases are empty, batch norms are gone.

    Raises:
        ValueError: two modules cannot be folded, and why.
    """
    for conv, bn in pairs:
        fold_batchnorm(model, conv, bn)


def folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """w' and b' in the weight's type, for a layer and its batch norm."""
    weight = layer.weight.double()
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = (
        -norm.running_mean.double()
        if layer.bias is None
        else layer.bias.double() - norm.running_mean.double()
    )
    bias = shift * factor
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    if isinstance(layer, TRANSPOSED):
        groups = layer.groups
        by_group = weight.view(groups, weight.shape[0] // groups, weight.shape[1], *weight.shape[2:])
        per_output = factor.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (by_group * per_output).view_as(weight)
    else:
        weight = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)


def _refusal(model: nn.Module, conv: str, bn: str) -> str:
    layer, norm = model.get_submodule(conv), model.get_submodule(bn)
    if not isinstance(layer, (nn.Linear, *CONVS, *TRANSPOSED)):
        return f"{type(layer).__name__} is not a linear layer or a convolution of torch"
    if type(norm) not in NORMS:
        return f"{type(norm).__name__} is not a batch norm of torch, and may do more than normalize"
    if norm.training:
        return "the batch norm is in training mode: call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm keeps no running statistics and depends on its batch"
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if outputs != norm.num_features:
        return f"{outputs} outputs do not match the {norm.num_features} features of the batch norm"
    if parametrize.is_parametrized(layer) or parametrize.is_parametrized(norm):
        return "a parametrization computes the weights: remove it first (torch.nn.utils.parametrize)"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm)):
        return "forward hooks look at what lies between the two: remove them first"
    return ""


CARD = Card(
    id="fold_batchnorm",
    title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    authors="Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko",
    year=2017,
    source="arXiv 1712.05877, section 3.2; the folding itself is folklore",
    family="norm",
    summary="Folds a batch norm into the convolution or linear layer before it, so that it costs nothing at inference.",
    objects={"FoldBatchNorm": "Pass"},
    traits={"FoldBatchNorm": ("exact",)},
    use="Always, before the weights of a trained convolutional network are quantized.",
    avoid="Models that go on training in training mode, where batch norm depends on its batch.",
    composes=("rtn", "gptq", "bias_correction"),
)
