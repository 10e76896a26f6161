"""Layers whose inputs are rotated by a Hadamard matrix as they come: `rotate_inputs`.

Where a weight holds W' = W R, R orthogonal, the layer computes W x from W' and x R, since W R (x R)^T = W x^T. R acts on
runs of `size` channels that lie `stride` apart:  x (..., n) is seen as (..., n / (size stride), size, stride), and R is
`laconic.numerics.hadamard` along the middle axis. stride 1 and size n rotate all channels, stride D and size n / D rotate
across heads of D channels.

The rotation is a forward pre-hook, so the layer may become packed afterwards.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from laconic.numerics import base_order, hadamard

__all__ = ["RotateInput", "rotate_inputs", "rotated_inputs"]


class RotateInput:
    """The hook: rotates a layer's first argument.

    Args:
        size: channels that are mixed.
        stride: how far apart they lie.

    Raises:
        ValueError: no Hadamard matrix of this order is known.
    """

    def __init__(self, size: int, stride: int = 1):
        base_order(size)
        self.size, self.stride = size, stride

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.rotated(args[0]), *args[1:]

    def rotated(self, x: Tensor) -> Tensor:
        """x R.

        Raises:
            ValueError: the runs do not fill the last axis.
        """
        if x.shape[-1] % (self.size * self.stride):
            raise ValueError(
                f"inputs of {x.shape[-1]} channels are not runs of {self.size} that lie {self.stride} apart"
            )
        if self.stride == 1:
            return hadamard(x.unflatten(-1, (-1, self.size))).flatten(-2)
        parts = x.unflatten(-1, (-1, self.size, self.stride)).mT
        return hadamard(parts).mT.flatten(-3)


def rotate_inputs(module: nn.Module, size: int, stride: int = 1) -> None:
    """Let a layer rotate its inputs from now on; rotations add up, the first one is done first."""
    module.register_forward_pre_hook(RotateInput(size, stride))


def rotated_inputs(module: nn.Module) -> list[RotateInput]:
    """The rotations that a layer does, in order."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, RotateInput)]
