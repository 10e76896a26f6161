"""Packed parameters whose scales are stored in few bits, too (double quantization).

`nest(module, "weight", how)` changes a packed module in place: instead of the buffer `weight_scale` it stores

    weight_scale_codes      words of codes of `bits` bits, one a scale, row by row
    weight_scale_absmax     a (runs,), one for each run of `block` scales
    weight_scale_offset     o ()

and its scales are computed at each use, s^ = o + a T[q]. Two papers have settings of their own for this:

    levels    offset o      T
    dynamic   mean s        256 levels from -1 to 1 that lie closer near 0 (QLoRA)
    linear    min s         0, 1 / (2^b - 1), ..., 1 (LQ-LoRA)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laconic.numerics import pack, unpack, words_per_row
from laconic.numerics.nested import Nested
from laconic.numerics.nested import nest as dynamic_nest
from laconic.numerics.scheme import SCALE_DTYPES

from .packed import Packed

__all__ = ["NestedScales", "nest", "nested_of"]


@dataclass(frozen=True)
class NestedScales:
    """How scales are stored.

    Args:
        levels: "dynamic" or "linear", see above.
        bits: of a code; 8 of dynamic ones.
        block: scales to a run.
        dtype: of a.

    Raises:
        ValueError: no such levels, width, run or type.
    """

    levels: Literal["dynamic", "linear"] = "dynamic"
    bits: int = 8
    block: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.levels not in ("dynamic", "linear"):
            raise ValueError(f"levels of scales are 'dynamic' or 'linear', not {self.levels!r}")
        if not 1 <= self.bits <= 8 or (self.levels == "dynamic" and self.bits != 8):
            raise ValueError(f"{self.levels} scales cannot have {self.bits} bits")
        if self.block < 1 or self.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"runs of {self.block} scales, type {self.dtype!r}: 1 at least, of {', '.join(SCALE_DTYPES)}"
            )
        if self.levels == "dynamic" and self.dtype != "float32":
            raise ValueError("dynamic scales have float32 sizes")

    def tensors(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape of what is stored for so many scales."""
        return {
            "scale_codes": (torch.int32, (1, words_per_row(count, self.bits))),
            "scale_absmax": (SCALE_DTYPES[self.dtype], (math.ceil(count / self.block),)),
            "scale_offset": (torch.float32, ()),
        }

    def nbytes(self, count: int) -> int:
        """Bytes of everything that is stored for so many scales."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors(count).values())

    def encode(self, scale: Tensor, name: str = "tensor") -> dict[str, Tensor]:
        """What is stored, by suffix, for scales of any shape, read in row-major order.

        Raises:
            NotFinite: inf or nan among them.
        """
        if self.levels == "dynamic":
            made = dynamic_nest(scale, self.block, name=name)
            codes, absmax, offset = made.codes, made.absmax, made.offset
        else:
            codes, absmax, offset = self._linear(scale.detach().float().reshape(-1))
        return {"scale_codes": pack(codes[None], self.bits), "scale_absmax": absmax, "scale_offset": offset}

    def decode(self, stored: dict[str, Tensor], count: int) -> Tensor:
        """s^ (count,) float32."""
        codes = unpack(stored["scale_codes"], self.bits, count)[0]
        absmax, offset = stored["scale_absmax"], stored["scale_offset"]
        if self.levels == "dynamic":
            return Nested(codes, absmax, offset, self.block).scales()
        step = absmax.float() / ((1 << self.bits) - 1)
        return codes.float() * step.repeat_interleave(self.block)[:count] + offset

    def _linear(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = (1 << self.bits) - 1
        offset = scale.min() if len(scale) else scale.new_zeros(())
        left = torch.nn.functional.pad(scale - offset, (0, -len(scale) % self.block)).view(-1, self.block)
        absmax = left.amax(1).to(SCALE_DTYPES[self.dtype])
        wide = absmax.float()
        codes = (left * (top / torch.where(wide == 0, 1.0, wide))[:, None]).round().clamp_(0, top)
        return codes.view(-1)[: len(scale)].to(torch.uint8), absmax, offset

    def to_json(self) -> dict[str, Any]:
        """As records hold it."""
        return {"levels": self.levels, "bits": self.bits, "block": self.block, "dtype": self.dtype}


class _Nested(Packed):
    """Comes first in the method resolution order of a packed class, and computes the scales of what is nested."""

    _nested: dict[str, NestedScales]

    def nested_scale(self, name: str) -> Tensor:
        """The scales (rows, G) of the packed parameter `name`, as they are stored."""
        dtype, shape = self._packed[name].tensors()["scale"]
        stored = {
            suffix: getattr(self, f"{name}_{suffix}") for suffix in ("scale_codes", "scale_absmax", "scale_offset")
        }
        return self._nested[name].decode(stored, math.prod(shape)).view(shape).to(dtype)

    def _scale_names(self) -> list[str]:
        nested = [f"{name}_scale_{suffix}" for name in self._nested for suffix in ("absmax", "offset")]
        return super()._scale_names() + nested


_CLASSES: dict[tuple[type, frozenset[str]], type] = {}


def nested_of(module: nn.Module, name: str = "weight") -> NestedScales | None:
    """How the scales of a packed parameter are stored, None where they are plain."""
    return getattr(module, "_nested", {}).get(name)


def nest(module: nn.Module, name: str, how: NestedScales, stored: dict[str, Tensor] | None = None) -> None:
    """Store the scales of a packed parameter in few bits, in place.

    Args:
        module: packed, and holds the parameter itself.
        name: of the parameter.
        how: they are stored.
        stored: what is stored, by suffix; by default it is computed from the scales that are there.

    Raises:
        ValueError: the module holds no such packed parameter with plain scales, or what is stored does not fit.
    """
    if not isinstance(module, Packed) or name not in module._packed or name in module._packed_owner:
        raise ValueError(f"{type(module).__name__} holds no packed {name!r} itself")
    if nested_of(module, name) is not None:
        raise ValueError(f"the scales of {name!r} are nested already")
    scale = module._buffers[f"{name}_scale"]
    assert scale is not None
    wanted = how.tensors(scale.numel())
    if stored is None and scale.device.type != "meta":
        stored = how.encode(scale, name)
    for suffix, (dtype, shape) in wanted.items():
        value = torch.empty(shape, dtype=dtype, device=scale.device) if stored is None else stored[suffix]
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"{name}_{suffix}: expected {dtype} of shape {shape}, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if suffix == "scale_codes":
            module.register_parameter(f"{name}_{suffix}", nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(f"{name}_{suffix}", value)
    del module._buffers[f"{name}_scale"]
    names = {**getattr(module, "_nested", {}), name: how}
    object.__setattr__(module, "_nested", names)
    module.__class__ = _nested_class(type(module), frozenset(names))


def _nested_class(cls: type, names: frozenset[str]) -> type:
    key = (cls, names)
    if key not in _CLASSES:
        body: dict[str, Any] = {f"{name}_scale": _scale_property(name) for name in names}
        bases = (cls,) if issubclass(cls, _Nested) else (_Nested, cls)
        _CLASSES[key] = type(cls.__name__, bases, body)
    return _CLASSES[key]


def _scale_property(name: str) -> property:
    return property(lambda self: self.nested_scale(name))
