"""`hqq`: real zero points that are solved for, group by group, from the weights alone.

A group of weights x keeps the step s of its range, and its zero point z moves to where the sum of |x - x^|^p, p = 0.7, is small:

    q = clamp(round(x / s + z), 0, 2^b - 1)        x^ = s (q - z)        e = x - x^
    u = sign(e) max(0, |e| - |e|^(p-1) / beta)     z = mean of q - (x - u) / s

in turns, 20 at most. z is stored as a real number beside s. `laconic.numerics.half_quadratic` has the equations as code, and the
rule `hqq` of a `Scheme` uses them: recipes, `RTN` and `GPTQ` take it like any other rule.

Source: "Half-Quadratic Quantization of Large Machine Learning Models", Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog.
Official code: mobiusml/hqq, Apache-2.0. We differ from it: each group stops by itself and keeps the best zero point that it had;
zero points start at that of the range, also at 4 bits, where theirs is rounded first; z is tried as it is stored; and steps below
5e-5 are kept. `half_quadratic` is their loop.

Use it for convolutions where there are no data: it loses far less there than rounding to nearest at 3 and 2 bits. What is a
large error in a few weights counts for little by it, and language models with outliers lose more at 3 bits than to nearest
(`benchmarks/records` has both).

Example:
    >>> import torch
    >>> W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    >>> found = hqq(W, "v1/int4/group64/float16/hqq/zreal/nearest")
    >>> plain = round_to_nearest(W, Scheme.parse("v1/int4/group64/float16/minmax/zreal/nearest"))
    >>> found.loss < plain.loss
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from laconic.core.card import Card
from laconic.errors import BadInput
from laconic.numerics import Scheme, half_quadratic

from ._rtn import RTN, Solved, round_to_nearest

__all__ = ["HQQ", "half_quadratic", "hqq"]

SCHEME = "v1/int4/group64/float16/hqq/zreal/nearest"


def hqq(W: Tensor, scheme: Scheme | str = SCHEME, name: str = "tensor") -> Solved:
    """Scales, zero points and codes of a matrix.

    Args:
        W: (rows, K) of any floating type.
        scheme: how to store it, with the rule `hqq`.
        name: the parameter's path, for messages.

    Raises:
        BadInput: the scheme has another rule.
        NotFinite: inf or nan in `W`.
        ScaleOutOfRange: a scale or a zero point does not fit in the scheme's scale dtype.
    """
    return round_to_nearest(W, _checked(scheme, name), name)


@dataclass(frozen=True)
class HQQ(RTN):
    """The pass: every parameter that can be packed, under zero points that are solved for.

    Args:
        scheme: how to store them, with the rule `hqq`.

    Raises:
        BadInput: the scheme has another rule.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from laconic.core import passes
        >>> from laconic.core.structure import Structure
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> structure = Structure.build(model, ((torch.randn(2, 64),), {}))
        >>> records, left = passes.run(HQQ(), passes.Context(model, structure))
        >>> [record.path for record in records], sorted(left)
        (['0.weight', '2.weight'], ['0.bias', '2.bias'])
    """

    scheme: Scheme | str = SCHEME

    id: ClassVar = "hqq"

    def __post_init__(self) -> None:
        _checked(self.scheme, "HQQ")


def _checked(scheme: Scheme | str, name: str) -> Scheme:
    found = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if found.scale.rule != "hqq":
        raise BadInput(f"{name}: {found} chooses scales by {found.scale.rule}: take the rule hqq, as in {SCHEME}")
    return found


CARD = Card(
    id="hqq",
    title="Half-Quadratic Quantization of Large Machine Learning Models",
    authors="Badri, Shaji",
    year=2023,
    source="https://mobiusml.github.io/hqq_blog",
    family="quant",
    summary="Gives each group of weights a real zero point under which few large errors are left; needs no data.",
    objects={"HQQ": "Pass"},
    use="For convolutions at 4 bits and below, without calibration data.",
    avoid="Where data are at hand: gptq loses less; for language models with outliers below 4 bits, which lose more by it.",
    composes=("fold_batchnorm", "smoothquant", "bias_correction"),
    code="mobiusml/hqq, Apache-2.0",
    claim={
        "text": "At 3 bits in groups of 64, zero points that are solved for lose less of a language model than those of the "
        "ranges, without data.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.005,
        "arms": ("rtn", "hqq"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
