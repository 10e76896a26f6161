"""How the inputs of a packed linear layer are rounded to 8 bits when it runs, as a word that prints and parses.

    c = clamp(round(x / s), -128, 127)          x^ = s c

`INT8_TOKENS`: each row of x (a token) has its own s = 2 max|x| / 255, found when the row is seen. `int8_tensor(s)`: one s
for all, known before from calibration (a static scale, a tensor's). The first follows whatever comes; the second needs
no look at the row, so the layer before can store its results rounded, and what is larger than 127 s is cut off.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["INT8_TOKENS", "check_inputs", "int8_tensor", "round_inputs", "round_rows", "static_scale"]

INT8_TOKENS = "v1/int8/token/float32/minmax/znone/nearest"
_BEFORE, _AFTER = "v1/int8/tensor/float32/static", "/znone/nearest"


def int8_tensor(scale: float) -> str:
    """The word for one scale for all inputs, rounded to float32 first, which is what kernels take.

    Raises:
        ValueError: the scale is not positive and finite as float32.
    """
    try:
        single = struct.unpack("f", struct.pack("f", scale))[0]
    except OverflowError:
        single = math.inf
    if not 0 < single < math.inf:
        raise ValueError(f"a static scale of inputs is {scale!r}: a positive number of float32 is needed")
    return f"{_BEFORE}{single!r}{_AFTER}"


@lru_cache(maxsize=4096)
def static_scale(inputs: str) -> float:
    """The one scale of inputs; 0 where they are not rounded, or each row has its own.

    Raises:
        ValueError: the word is not known.
    """
    if inputs in ("", INT8_TOKENS):
        return 0.0
    if inputs.startswith(_BEFORE) and inputs.endswith(_AFTER):
        try:
            scale = float(inputs[len(_BEFORE) : -len(_AFTER)])
            if int8_tensor(scale) == inputs:
                return scale
        except ValueError:
            pass
    raise ValueError(f"inputs={inputs!r}: '' (as they are), {INT8_TOKENS!r} or {_BEFORE}SCALE{_AFTER}")


def check_inputs(inputs: str) -> str:
    """The word itself.

    Raises:
        ValueError: it is not known.
    """
    static_scale(inputs)
    return inputs


def round_inputs(x: Tensor, inputs: str) -> Tensor:
    """x as a packed linear layer sees it: itself, or x^ in the type of x.

    Raises:
        ValueError: the word is not known.
    """
    if not inputs:
        return x
    known = static_scale(inputs)
    if known:
        return ((x.float() / known).round().clamp(-128, 127) * known).to(x.dtype)
    codes, scale = round_rows(x.float())
    return (codes * scale).to(x.dtype)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of float32 rows x, whole numbers in -128..127 still as float32, and their scale (..., 1): 2 max|x| / 255, or 1."""
    scale = 2 * x.abs().amax(-1, keepdim=True) / 255 if x.shape[-1] else x
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round().clamp(-128, 127), scale
