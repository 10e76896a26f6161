"""What the methods of this family share: which layers have a weight matrix, and what its rows are.

A row holds all that one output is a product with: W (out, in) for a linear layer, W (out, in / groups, kernel)
flattened for a convolution. In transposed convolutions, whose weight is (in, out / groups, kernel), outputs lie on the
second axis, group by group.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

CARD = None

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATRIX_LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def matrix_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer and convolution with its path, those that share a weight once, in the model's order."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, MATRIX_LAYERS):
            continue
        # A parametrized weight is computed at each access: it has no identity, and its layer stands for it.
        held = id(module._parameters.get("weight", module))
        if held not in seen:
            seen.add(held)
            yield path, module


def output_dim(module: nn.Module) -> int:
    """The axis of the weight that outputs lie on."""
    return 1 if isinstance(module, TRANSPOSED) else 0


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of the layer's shape as rows (outputs, entries)."""
    if not isinstance(module, TRANSPOSED):
        return weight.flatten(1)
    groups = module.groups
    by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, out / groups, in / groups, kernel)
    return by_group.flatten(2).flatten(0, 1)


def per_output(module: nn.Module, values: Tensor) -> Tensor:
    """One value for each row of `rows_of` (outputs,), in a shape that broadcasts over the layer's weight."""
    weight = module.weight
    tail = [1] * (weight.ndim - 2)
    if not isinstance(module, TRANSPOSED):
        return values.view(-1, 1, *tail)
    inputs = weight.shape[0]
    by_group = values.view(module.groups, 1, -1).expand(-1, inputs // module.groups, -1)
    return by_group.reshape(inputs, -1, *tail)
