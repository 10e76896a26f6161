"""`zero_init`: start a network from zeros and ones alone, the same every time.

For the weight W (m, n) of a linear layer, n inputs to m outputs:

    m <= n:   W = I                        the partial identity: ones on the diagonal, zeros elsewhere
    m > n:    W = 2^(-c/2) H_p[:m, :n]     c = ceil(log2 m), p = 2^c, H_p Sylvester's Hadamard matrix of +1 and -1

A convolution has that matrix at the centre of its kernel (place floor(k / 2) along each axis) and zeros around it,
group by group. Biases are 0. Where a layer widens, a partial identity would leave the added outputs at zero: then the
update of the layers behind has a rank of at most n for ever (the paper's Theorem 1). The Hadamard matrix reaches all of
them.

Source: "ZerO Initialization: Initializing Neural Networks with only Zeros and Ones", Zhao, Schaefer, Anandkumar, 2021,
arXiv 2110.12661. Official code: jiaweizzhao/ZerO-initialization, Apache-2.0, whose scale 2^(-c/2) is kept. We add
groups, transposed convolutions and kernels of any number of dimensions.

Nothing is left of it at inference. Use it where runs must be the same without a seed, and for deep residual networks,
with `zero` naming the last layer of each branch so that every block starts as the identity. A plain network of equal
widths and no norms starts as the identity too: there, random weights train faster.

Example:
    >>> from torch import nn
    >>> from laconic.weight import zero_init_
    >>> zero_init_(nn.Linear(2, 4)).weight.tolist()
    [[0.5, 0.5], [0.5, -0.5], [0.5, 0.5], [0.5, -0.5]]
    >>> zero_init_(nn.Linear(3, 2)).weight.tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.errors import BadInput

from ._layers import TRANSPOSED, matrix_layers

M = TypeVar("M", bound=nn.Module)


def zero_matrix(
    outputs: int, inputs: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """W (outputs, inputs).

    Args:
        outputs: m, at least 1.
        inputs: n, at least 1.
        device, dtype: of the result.

    Raises:
        ValueError: there are no outputs or no inputs.
    """
    if outputs < 1 or inputs < 1:
        raise ValueError(f"zero_init: a matrix ({outputs}, {inputs}) has nothing to start from")
    if outputs <= inputs:
        return torch.eye(outputs, inputs, device=device, dtype=dtype)
    # H_p[i, j] is -1 where i and j have an odd number of binary ones in common.
    common = torch.arange(outputs, device=device)[:, None] & torch.arange(inputs, device=device)
    c = (outputs - 1).bit_length()
    odd = sum((common >> bit) & 1 for bit in range(c)) % 2
    return (1 - 2 * odd).to(dtype or torch.get_default_dtype()) * 2.0 ** (-c / 2)


@torch.no_grad()
def zero_init_(module: M, *, zero: Sequence[str] = ()) -> M:
    """Fill every linear layer and convolution of a module, in place, and return it; the rest is left alone.

    Args:
        module: a layer, or a module that holds some.
        zero: paths of layers to fill with zeros, `*` standing for anything: the last layer of each residual branch, as
            "blocks.*.conv2", or a classifier.

    Raises:
        BadInput: there is no such layer, a path of `zero` fits none, or a parametrization computes a weight.
    """
    layers = dict(matrix_layers(module))
    if not layers:
        raise BadInput(f"zero_init: {type(module).__name__} has no linear layer and no convolution")
    for pattern in zero:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise BadInput(f"zero_init: no layer's path fits {pattern!r}; there are {', '.join(layers)}")
    for path, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise BadInput(f"zero_init: a parametrization computes the weight of {path or 'the module'}: fill it first")
    for path, layer in layers.items():
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
        if not any(fnmatchcase(path, pattern) for pattern in zero):
            _fill(layer)
    return module


def _fill(layer: nn.Module) -> None:
    """Write the matrix of each group where the kernel, if there is one, has its centre."""
    weight: Tensor = layer.weight
    centre = weight[(slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))]
    for block in centre.chunk(getattr(layer, "groups", 1)):  # views: groups lie on the first axis in both layouts
        matrix = block.t() if isinstance(layer, TRANSPOSED) else block
        matrix.copy_(zero_matrix(*matrix.shape, device=weight.device, dtype=weight.dtype))


CARD = Card(
    id="zero_init",
    title="ZerO Initialization: Initializing Neural Networks with only Zeros and Ones",
    authors="Zhao, Schaefer, Anandkumar",
    year=2021,
    source="arXiv 2110.12661",
    family="weight",
    summary="Starts a network from identity and Hadamard matrices, without random numbers: every run is the same.",
    objects={"zero_init_": "Init"},
    traits={"zero_init_": ("deterministic",)},
    use="Networks that must start the same without a seed; deep residual networks, each block starting as "
    "the identity.",
    avoid="Plain networks of equal widths, which start as the identity and train slower than from random weights.",
    composes=("weight_standardization",),
    vectors=("zero_init",),
    code="github.com/jiaweizzhao/ZerO-initialization, Apache-2.0",
    claim={
        "text": "Where a network widens, Hadamard matrices let the layer behind learn an update of higher rank than "
        "partial identities do, by more than ten of its 256 dimensions.",
        "metric": "rank of the learned update",
        "direction": "higher",
        "margin": 10.0,
        "arms": ("partial_identity", "zero_init"),
        "seeds": 5,
        "minutes": 4,
        "task": "digits",
    },
)
