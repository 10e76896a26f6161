"""Pure functions on tensors: schemes, scales, rounding, packing, Hadamard. No modules, no state."""

from .affine import (
    ScaleOutOfRange,
    affine_params,
    dequantize,
    fake_quantize,
    grouped,
    params_from_range,
    quantize,
)
from .finite import NotFinite, NotFiniteCount, check_finite, count_not_finite
from .hadamard import hadamard
from .packing import DENSE, Layout, pack, unpack
from .scheme import Element, Int, Scale, Scheme, words_per_row

__all__ = [
    "DENSE",
    "Element",
    "Int",
    "Layout",
    "NotFinite",
    "NotFiniteCount",
    "Scale",
    "ScaleOutOfRange",
    "Scheme",
    "affine_params",
    "check_finite",
    "count_not_finite",
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
