"""The fold contract: a norm that is affine at inference says so, and its scale and shift move into other layers.

    y = s x + t                       per channel, s and t (C,): what `as_affine` of such a norm returns

A reader of y, z = W y + b, takes it in as W' = W diag(s), b' = b + W t. The layer before, x = W u + b, takes it in as
W' = diag(s) W, b' = s b + t. A convolution's b' = b + sum over the kernel of W t holds where no zeros are padded, since
padding comes after the shift.

A norm follows the contract by a method

    def as_affine(self) -> Affine | None

which returns scale and shift per channel, None where the norm stays a function of its input, and raises `ValueError`
where it is not affine yet (a schedule is still running, the norm is in training mode), saying when it will be. One
that is a function of its input followed by scale and shift, as LayerNorm, may have `split_affine() -> (module, Affine)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "BATCH_NORMS", "Affine", "affine_of", "after_layer", "as_affine", "before_layer", "channel_axis", "rounding_bound", "split_affine",
]  # fmt: skip

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Affine(NamedTuple):
    """y = scale x + shift, per channel; in float64, to be rounded once where it ends."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        """y for x whose channels lie on the axis `dim`, in x's type."""
        shape = [1] * x.ndim
        shape[dim] = -1
        return (x.to(self.scale.dtype) * self.scale.view(shape) + self.shift.view(shape)).to(x.dtype)

    def then(self, other: Affine) -> Affine:
        """This map, and the other after it, as one."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)


def affine_of(
    spread: Tensor, eps: float, mean: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Affine:
    """Scale and shift of `weight (x - mean) / sqrt(spread + eps) + bias`, in float64."""
    scale = torch.rsqrt(spread.detach().double() + eps)
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = torch.zeros_like(scale) if mean is None else -mean.detach().double() * scale
    return Affine(scale, shift if bias is None else shift + bias.detach().double())


def as_affine(module: nn.Module) -> Affine | None:
    """What a module is at inference, per channel: by its own `as_affine`, or as a batch norm of torch.

    Returns:
        Scale and shift in float64; None where the module says that it is not affine, or does not know the contract.

    Raises:
        ValueError: it is not affine yet: it is in training mode, or its schedule is still running.
    """
    own = getattr(module, "as_affine", None)
    if own is not None:
        found = own()
        return None if found is None else Affine(*(part.detach().double() for part in found))
    if isinstance(module, _BatchNorm) and type(module) in BATCH_NORMS:
        if module.running_mean is None or module.running_var is None:
            return None
        if module.training:
            raise ValueError("the batch norm is in training mode: call model.eval() first")
        return affine_of(module.running_var, module.eps, module.running_mean, module.weight, module.bias)
    return None


def split_affine(module: nn.Module) -> tuple[nn.Module, Affine] | None:
    """A module as another one and an affine map after it: `nn.Identity` and `as_affine`, or a norm without its gain.

    Returns:
        The two, new modules; None where there is no scale to be had.

    Raises:
        ValueError: as `as_affine`.
    """
    own = getattr(module, "split_affine", None)
    if own is not None:
        rest, found = own()
        return rest, Affine(*(part.detach().double() for part in found))
    whole = as_affine(module)
    if whole is not None:
        return nn.Identity().train(module.training), whole
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module) not in (nn.LayerNorm, nn.RMSNorm):
        return None
    if len(module.normalized_shape) != 1 or module.weight is None:
        return None
    scale, bias = module.weight.detach().double(), getattr(module, "bias", None)
    bare: nn.Module = (
        nn.LayerNorm(module.normalized_shape, module.eps, elementwise_affine=False)
        if isinstance(module, nn.LayerNorm)
        else nn.RMSNorm(module.normalized_shape, module.eps, elementwise_affine=False)
    )
    shift = torch.zeros_like(scale) if bias is None else bias.detach().double()
    return bare.train(module.training), Affine(scale, shift)


def channel_axis(module: nn.Module) -> int | None:
    """The axis of the channels that a module may scale and shift, None for one that is no such module."""
    if hasattr(module, "as_affine") or hasattr(module, "split_affine"):
        return int(getattr(module, "channel_dim", -1))
    if type(module) in BATCH_NORMS:
        return 1
    return -1 if type(module) in (nn.LayerNorm, nn.RMSNorm) else None


def before_layer(affine: Affine, weight: Tensor, bias: Tensor | None, groups: int = 1) -> tuple[Tensor, Tensor]:
    """W' and b' in float64 of a layer that reads s x + t, where it is to read x.

    Args:
        affine: s and t (in,).
        weight: W (out, in / groups, *kernel).
        bias: b (out,), 0 by default.
        groups: of a convolution.

    Raises:
        ValueError: the widths do not match.
    """
    wide = weight.detach().double()
    inputs = wide.shape[1] * groups
    if affine.scale.numel() != inputs:
        raise ValueError(f"{affine.scale.numel()} channels do not match a layer that reads {inputs}")
    by_group = wide.view(groups, wide.shape[0] // groups, wide.shape[1], -1)
    scale, shift = (part.to(wide.device).view(groups, 1, -1, 1) for part in affine)
    moved = (by_group * shift).sum((2, 3)).view(-1)
    return (by_group * scale).view_as(wide), moved if bias is None else bias.detach().double() + moved


def after_layer(
    affine: Affine, weight: Tensor, bias: Tensor | None, groups: int = 1, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """W' and b' in float64 of a layer that is to make s x + t, where it makes x.

    Args:
        affine: s and t (out,).
        weight: W (out, in / groups, *kernel); of a transposed convolution (in, out / groups, *kernel).
        bias: b (out,), 0 by default.
        groups: of a convolution.
        transposed: the convolution is a transposed one.

    Raises:
        ValueError: the widths do not match.
    """
    wide = weight.detach().double()
    outputs = wide.shape[1] * groups if transposed else wide.shape[0]
    if affine.scale.numel() != outputs:
        raise ValueError(f"{affine.scale.numel()} channels do not match a layer that makes {outputs}")
    scale, shift = (part.to(wide.device) for part in affine)
    if transposed:
        by_group = wide.view(groups, wide.shape[0] // groups, wide.shape[1], -1)
        wide = (by_group * scale.view(groups, 1, -1, 1)).view_as(wide)
    else:
        wide = wide * scale.view(-1, *[1] * (wide.ndim - 1))
    return wide, shift if bias is None else bias.detach().double() * scale + shift


def rounding_bound(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """How far a layer whose W' and b' were rounded once may be from the exact affine norm and layer: per output.

    With u the unit roundoff of the weight's type, K products to an output, and gamma_n = n u / (1 - n u):

        |computed - exact| <= gamma_(K + 2) (|W'| |x| + |b'|)

    One rounding is that of W' and b', K of the products and their sum in any order, one of the addition of b'. No
    product may overflow or underflow.

    Args:
        weight: W' (out, K), as stored; a convolution's flattened to (out, K).
        bias: b' (out,).
        x: (..., K), what the layer reads.

    Returns:
        The bound (..., out) in float64.
    """
    unit = torch.finfo(weight.dtype).eps / 2
    n = weight.shape[1] + 2
    size = x.detach().double().abs() @ weight.detach().double().abs().mT
    if bias is not None:
        size = size + bias.detach().double().abs()
    # |W'| and |b'| as stored are themselves off by one rounding of the exact ones.
    return size * (n * unit / (1 - n * unit)) * (1 + 2 * unit)
