"""The residual block of all models here: one mechanism, of which the published placements of norms are settings.

For a branch F (attention, a perceptron, two convolutions) in block l of L, with norms that may each be absent:

    h = c_out * N_out(F(c_in * N_in(x)))            x (N, ..., d) or (N, C, H, W)
    y = N_add(c_skip * S(x) + h)                    S the shortcut, the identity where shapes agree

| scheme | norms | constants | source |
|---|---|---|---|
| `pre` | N_in | | Xiong et al., 2020, arXiv 2002.04745 |
| `post` | N_add | | Vaswani et al., 2017, arXiv 1706.03762 |
| `output` | N_out | | OLMo 2, 2025, arXiv 2501.00656; with batch norm it is the first residual network, arXiv 1512.03385 |
| `sandwich` | N_in, N_out | | Ding et al., 2021, arXiv 2105.13290 |
| `peri` | N_in, N_out, embedding | | Peri-LN, Kim et al., 2025, arXiv 2502.02732 |
| `mix` | N_add in the first quarter of the blocks, then N_in | | Mix-LN, Li et al., 2024, arXiv 2412.13795 |
| `lns` | N_in | c_in = 1 / sqrt(l) | LayerNorm Scaling, Sun et al., 2025, arXiv 2502.05795 |
| `deepnorm` | N_add | c_skip = (2 L)^(1/4), first weights times (8 L)^(-1/4) | Wang et al., 2022, arXiv 2203.00555 |
| `skipinit` | none | c_out = 0 at first, learned | De and Smith, 2020, arXiv 2002.10444 |
| `fixup` | none | c_out = 1 at first, learned; first weights times L^(-1/2), last ones 0 | Zhang et al., 2019, arXiv 1901.09321 |
| `depth` | N_in | c_out = 1 / sqrt(L) | Hayou et al., 2021, arXiv 2010.12859 |

`fixup` is that of branches of two layers, without its scalar biases.

Another one is a function `(l, L) -> Placement`. `laconic.core.placing` gives blocks of transformers a placement.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

__all__ = ["SCHEMES", "Placement", "Residual", "Scheme", "mix", "placements", "residual"]


@dataclass(frozen=True)
class Placement:
    """Where one block's norms stand, and what multiplies what.

    Attributes:
        norm_in: whether the branch reads N_in(x).
        norm_out: whether the branch's output is normalized before it is added.
        norm_after_add: whether the sum is normalized.
        input_scale: c_in.
        branch_scale: c_out.
        skip_scale: c_skip; 0 takes the shortcut away.
        learned: whether c_out is a parameter of the block, with `branch_scale` as its first value.
        init_gain: factor of the first weights of what carries the branch's values to the sum.
        zero_last: whether the first weights of the branch's last layer are 0.
    """

    norm_in: bool = False
    norm_out: bool = False
    norm_after_add: bool = False
    input_scale: float = 1.0
    branch_scale: float = 1.0
    skip_scale: float = 1.0
    learned: bool = False
    init_gain: float = 1.0
    zero_last: bool = False


Scheme = Callable[[int, int], Placement]


def mix(share: float = 0.25) -> Scheme:
    """`post` in the first floor(share L) of the blocks, `pre` in the others.

    Raises:
        BadInput: the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise BadInput(f"a share of {share} of the blocks cannot be: it is in [0, 1]")
    return lambda block, blocks: Placement(norm_after_add=True) if block <= share * blocks else Placement(norm_in=True)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "pre": lambda block, blocks: Placement(norm_in=True),
        "post": lambda block, blocks: Placement(norm_after_add=True),
        "output": lambda block, blocks: Placement(norm_out=True),
        "sandwich": lambda block, blocks: Placement(norm_in=True, norm_out=True),
        "peri": lambda block, blocks: Placement(norm_in=True, norm_out=True),
        "mix": mix(),
        "lns": lambda block, blocks: Placement(norm_in=True, input_scale=1 / math.sqrt(block)),
        "deepnorm": lambda block, blocks: Placement(
            norm_after_add=True, skip_scale=(2 * blocks) ** 0.25, init_gain=(8 * blocks) ** -0.25
        ),
        "skipinit": lambda block, blocks: Placement(branch_scale=0.0, learned=True),
        "fixup": lambda block, blocks: Placement(learned=True, init_gain=blocks**-0.5, zero_last=True),
        "depth": lambda block, blocks: Placement(norm_in=True, branch_scale=blocks**-0.5),
    }
)
"""The published schemes by name: functions of a block's number, from 1, and of how many there are."""


def placements(scheme: str | Scheme, blocks: int) -> list[Placement]:
    """The placement of every block.

    Args:
        scheme: a name of `SCHEMES`, or a function of (block, blocks), block counted from 1.
        blocks: how many there are.

    Raises:
        BadInput: no scheme is called so, or there are no blocks.
    """
    if blocks < 1:
        raise BadInput(f"a model has at least one block, not {blocks}")
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise BadInput(f"there is no placement {scheme!r}; there are {', '.join(SCHEMES)}")
        scheme = SCHEMES[scheme]
    return [scheme(block, blocks) for block in range(1, blocks + 1)]


def residual(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    place: Placement,
    norm_in: Callable[[Tensor], Tensor] | None = None,
    norm_out: Callable[[Tensor], Tensor] | None = None,
    norm_after_add: Callable[[Tensor], Tensor] | None = None,
    *,
    scale: Tensor | None = None,
    shortcut: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y of the equation above; a norm that is not given is not there.

    Args:
        x: the block's input.
        branch: F.
        place: the constants.
        norm_in, norm_out, norm_after_add: N_in, N_out, N_add.
        scale: c_out, where it is learned.
        shortcut: S; the identity by default.
    """
    h = x if norm_in is None else norm_in(x)
    h = branch(_times(place.input_scale, h))
    if norm_out is not None:
        h = norm_out(h)
    h = _times(place.branch_scale, h) if scale is None else scale * h
    if place.skip_scale:
        h = _times(place.skip_scale, x if shortcut is None else shortcut(x)) + h
    return h if norm_after_add is None else norm_after_add(h)


class Residual(nn.Module):
    """A branch, what stands around it, and the sum with its input.

    Args:
        branch: F; called with what follows x in a call, too.
        placement: of the norms.
        norm: makes a norm for the branch's input, if `placement` has one there.
        norm_of_output: makes the norms behind the branch and behind the sum; the same as `norm` by default.
        shortcut: S; the identity by default.
        activation: between `norm_in` and the branch, if there is a `norm_in`; after all else if there is none.
    """

    def __init__(
        self,
        branch: nn.Module,
        placement: Placement,
        norm: Callable[[], nn.Module],
        *,
        norm_of_output: Callable[[], nn.Module] | None = None,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        made = norm_of_output or norm
        self.placement = placement
        self.norm_in = norm() if placement.norm_in else None
        self.branch = branch
        self.norm_out = made() if placement.norm_out else None
        self.scale = nn.Parameter(torch.tensor(float(placement.branch_scale))) if placement.learned else None
        self.shortcut = shortcut
        self.norm_after_add = made() if placement.norm_after_add else None
        self.activation = activation

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """y, in the shape that the branch gives."""
        norm_in: Callable[[Tensor], Tensor] | None = self.norm_in
        if self.norm_in is not None and self.activation is not None:
            norm_in = functools.partial(_in_turn, self.norm_in, self.activation)
        h = residual(
            x,
            lambda h: self.branch(h, *context),
            self.placement,
            norm_in,
            self.norm_out,
            self.norm_after_add,
            scale=self.scale,
            shortcut=self.shortcut,
        )
        return self.activation(h) if self.activation is not None and self.norm_in is None else h

    def extra_repr(self) -> str:
        """What differs from a bare sum."""
        default = Placement()
        fields = ("input_scale", "branch_scale", "skip_scale", "learned")
        given = ((name, getattr(self.placement, name)) for name in fields)
        return ", ".join(f"{name}={value:.4g}" for name, value in given if value != getattr(default, name))


def _in_turn(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x))


def _times(scale: float, x: Tensor) -> Tensor:
    # No product by one: it would cost a pass over memory in every block.
    return x if scale == 1.0 else scale * x
