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
from .base3 import pack_base3, unpack_base3
from .elements import Binary, Element, Int, Levels, Rule, Ternary, parse_element, words_per_row
from .finite import NotFinite, NotFiniteCount, check_finite, count_not_finite
from .hadamard import hadamard
from .levels import TABLES
from .packing import BASE3, DENSE, Layout, layout_of, pack, pack_codes, unpack, unpack_codes
from .scheme import Scale, Scheme
from .sparse import BlockSparse, Sparse24, mask_24, mask_blocks, sparse_from

__all__ = [
    "BASE3",
    "DENSE",
    "TABLES",
    "Binary",
    "BlockSparse",
    "Element",
    "Int",
    "Layout",
    "Levels",
    "NotFinite",
    "NotFiniteCount",
    "Rule",
    "Scale",
    "ScaleOutOfRange",
    "Scheme",
    "Sparse24",
    "Ternary",
    "affine_params",
    "check_finite",
    "count_not_finite",
    "dequantize",
    "fake_quantize",
    "grouped",
    "hadamard",
    "layout_of",
    "mask_24",
    "mask_blocks",
    "pack",
    "pack_base3",
    "pack_codes",
    "params_from_range",
    "parse_element",
    "quantize",
    "sparse_from",
    "unpack",
    "unpack_base3",
    "unpack_codes",
    "words_per_row",
]
