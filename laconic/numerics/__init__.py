"""Pure functions on tensors: schemes, scales, rounding, packing, Hadamard. No modules, no state."""

from .affine import (
    NotFinite,
    ScaleOutOfRange,
    affine_params,
    check_finite,
    dequantize,
    fake_quantize,
    grouped,
    params_from_range,
    quantize,
)
from .hadamard import hadamard
from .packing import DENSE, Layout, pack, unpack
from .scheme import Element, Int, Scale, Scheme, words_per_row

__all__ = [
    "DENSE",
    "Element",
    "Int",
    "Layout",
    "NotFinite",
    "Scale",
    "ScaleOutOfRange",
    "Scheme",
    "affine_params",
    "check_finite",
    "dequantize",
    "fake_quantize",
    "grouped",
    "hadamard",
    "pack",
    "params_from_range",
    "quantize",
    "unpack",
    "words_per_row",
]
