"""The modules that run packed weights; none of them knows a method."""

from .packed import (
    PackedParameterSpec,
    declare,
    declare_alias,
    fill,
    is_packed,
    make_float,
    matrix_view,
    pack_tensors,
    packed_specs,
    restore_view,
    storage_names,
    unpack_parameter,
)

__all__ = [
    "PackedParameterSpec",
    "declare",
    "declare_alias",
    "fill",
    "is_packed",
    "make_float",
    "matrix_view",
    "pack_tensors",
    "packed_specs",
    "restore_view",
    "storage_names",
    "unpack_parameter",
]
