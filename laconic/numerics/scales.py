"""How scales lie in a file, and back: as they are, in a byte each, or in few bits under scales of their own.

    float32, float16, bfloat16    the numbers
    e8m0                          2^E as the byte E + 127 (OCP Microscaling Formats 1.0)
    e4m3                          t = e4m3(g s), one byte, 1/8 where that would be 0, and once for the matrix
                                  g = 448 f / max(f s) in float32, f the largest number of the element: s^ = t / g. This is
                                  what compressed-tensors does for NVFP4; others store 1 / g
    nested                        codes, sizes of runs and an offset, see `nested.py`

What solvers and `quantize` are given are scales s (rows, G) as they were found. What a file gives back, s^, follows from
all of them at once in the last two: `settled`. Where s^ is what the kernels read, weights are rounded under it, too; only
QLoRA's rounds them first, and then the scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .elements import Float
from .finite import ScaleOutOfRange
from .floats import float_codes, float_values, mini_float, round_float
from .scheme import CODED_DTYPES, Scheme

__all__ = ["read_scales", "rounding_scales", "settled", "store_scales"]

TOP = 448.0  # the largest e4m3
NONE = 0.125  # what an e4m3 scale of 0 becomes
NAN = 255  # the e8m0 that is no number


def store_scales(
    scale: Tensor, scheme: Scheme, name: str = "tensor", *, largest: float | None = None
) -> dict[str, Tensor]:
    """What is stored for scales (rows, G), by suffix, as `Scale.tensors` says.

    Args:
        scale: of the whole matrix.
        scheme: how.
        name: the parameter's path, for messages.
        largest: max |x| over what shares g, of e4m3 scales; that of the matrix by default (q, k and v fused share one).

    Raises:
        NotFinite: inf or nan among nested ones.
        ScaleOutOfRange: g is too large for float32.
    """
    if scheme.scale.outer is not None:
        return scheme.scale.outer.encode(scale, name)
    if scheme.scale.dtype == "e8m0":
        return {"scale": (torch.frexp(scale.double()).exponent + 126).to(torch.uint8)}
    if scheme.scale.dtype == "e4m3":
        shared = _shared(scale, scheme, name, largest)
        coded = round_float(shared * scale.float(), mini_float("e4m3"))
        coded = torch.where(coded == 0, NONE, coded)
        return {"scale": float_codes(coded, mini_float("e4m3")), "global_scale": shared}
    return {"scale": scale.contiguous()}


def read_scales(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """The scales s^ (rows, G) of what is stored: float32, or plain ones as they lie."""
    if scheme.scale.outer is not None:
        return scheme.scale.outer.decode(stored, math.prod(shape)).view(shape)
    scale = stored["scale"]
    if scheme.scale.plain:
        return scale
    numbers = _BYTES[scheme.scale.dtype].to(scale.device)[scale.int()]
    return numbers if scheme.scale.dtype == "e8m0" else numbers / stored["global_scale"]


def settled(scale: Tensor, scheme: Scheme) -> Tensor:
    """s^ (rows, G) float32 of scales s of the whole matrix: what a reader of the file gets."""
    if scheme.scale.plain or scheme.scale.dtype == "e8m0":
        return scale.float()
    rows, groups = scale.shape
    return read_scales(store_scales(scale, scheme), scheme, (rows, groups))


def rounding_scales(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scales (rows, G) float32, none of them 0, under which weights are rounded."""
    outer = scheme.scale.outer
    if outer is None:
        return settled(scale, scheme)
    under = scale.float() if outer.levels == "dynamic" else settled(scale, scheme)
    return torch.where(under == 0, 1.0, under)


def _shared(scale: Tensor, scheme: Scheme, name: str, largest: float | None) -> Tensor:
    """g (1,) float32."""
    assert isinstance(scheme.element, Float)
    # Dividing by 6 = 4 + 2 and multiplying again gives the float back (Goldberg 1991, theorem 7): g is that of max |x|.
    top = scheme.element.numbers.largest
    found = scale.float().max() * top if scale.numel() else torch.zeros((), device=scale.device)
    most = found if largest is None else torch.tensor(largest, dtype=torch.float32)
    shared = torch.where(most > 0, TOP * top / most, 1.0).view(1)
    if not bool(torch.isfinite(shared)):
        raise ScaleOutOfRange(f"{name}: its largest magnitude {float(most):.3g} is too small for a global scale")
    return shared


def _numbers(dtype: str) -> Tensor:
    """The number (256,) float32 of each byte."""
    every = torch.arange(256, dtype=torch.uint8)
    if dtype == "e4m3":
        return float_values(every, mini_float("e4m3"))
    powers = torch.ldexp(torch.ones(256, dtype=torch.float64), every.int() - 127).float()
    powers[NAN] = torch.nan
    return powers


# Made now and not when first used: that may be while a model is traced, where tensors have no values.
with torch.inference_mode(False):
    _BYTES = {dtype: _numbers(dtype) for dtype in CODED_DTYPES}
