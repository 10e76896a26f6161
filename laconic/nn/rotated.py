"""Layers whose inputs are rotated by a Hadamard matrix as they come, or whose outputs are rotated back.

Where a weight holds W' = W R, R orthogonal, the layer computes W x from W' and x R, since W R (x R)^T = W x^T. R acts
on runs of `size` channels that lie `stride` apart:  x (..., n) is seen as (..., n / (size stride), size, stride), and R
is `laconic.numerics.hadamard` along the middle axis. stride 1 and size n rotate all channels, stride D and size n / D
rotate across heads of D channels.

Where a weight holds W' = P R W, with a permutation P of its outputs, the layer makes what a cache should hold, and
`restore_outputs` gives back W x to whoever reads it: y R^T after P was undone.

Both are forward hooks, so the layer may become packed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.numerics import base_order, hadamard

__all__ = ["RestoreOutput", "RotateInput", "restore_outputs", "rotate_inputs", "rotated_inputs"]


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


class RestoreOutput:
    """The hook: puts a layer's outputs in order and rotates them back.

    Args:
        size: channels that were mixed.
        order: which rotated channel each output is, all of them once.

    Attributes:
        stored: what becomes of the outputs in between, as a cache that rounds them; None: nothing.

    Raises:
        ValueError: the order is no permutation, or no Hadamard matrix of this size is known.
    """

    def __init__(self, size: int, order: Sequence[int]):
        base_order(size)
        if sorted(order) != list(range(len(order))) or len(order) % size:
            raise ValueError(f"the order of {len(order)} outputs is no permutation of runs of {size}")
        self.size, self.order = size, tuple(order)
        self.inverse = torch.argsort(torch.tensor(self.order))
        self.stored: Callable[[Tensor], Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.restored(output if self.stored is None else self.stored(output))

    def restored(self, y: Tensor) -> Tensor:
        """y (..., n) with P and R undone."""
        y = y.index_select(-1, self.inverse.to(y.device))
        return hadamard(y.unflatten(-1, (-1, self.size)), transpose=True).flatten(-2)


def restore_outputs(module: nn.Module, size: int, order: Sequence[int]) -> RestoreOutput:
    """Let a layer's outputs be restored from now on."""
    hook = RestoreOutput(size, order)
    module.register_forward_hook(hook)
    return hook
