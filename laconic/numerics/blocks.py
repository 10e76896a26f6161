"""Blocks of small floats under shared scales: MX, NVFP4 and FP8, their powers of two, and a matrix in them (`Blocks`).

Each run of `group` elements of a row has a scale X, and x^ = X f, f a number of the element (`floats.py`):

    scale     X of a block with a = max |x|
    e8m0      2^E: E = floor(log2 a) - emax (rule `floor`, OCP MX 1.0: a of more than largest / 2^emax of its power of two
              saturates); the same after a quarter of its power of two is added to a (`ct_round`, compressed-tensors: from 1.75
              times a power on, the next one); the least E under which nothing saturates (`ceil`)
    e4m3      a / largest, in 8 bits under one float32 for the matrix (NVFP4), see `scales.py`
    float32   a / largest (FP8), by row or block or for the matrix; 1 where a = 0

f = round(x / X), saturated. E lies in -127 .. 127; a block of zeros has E = -127. Blocks and their scales are an element
and a `Scale` of a `Scheme` like any other, by name in `NAMED`:

    >>> str(MXFP4)
    'v1/floate2m1/group32/e8m0/floor/znone/nearest'
    >>> NVFP4.bits_per_weight(rows=64, k=4096)
    4.5001220703125
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .elements import Float
from .finite import ScaleOutOfRange, check_finite
from .floats import MiniFloat, float_codes, float_values, mini_float, round_float
from .packing import pack_codes, unpack_codes
from .scales import read_scales, store_scales
from .scheme import NAMED, Scheme

__all__ = [
    "FP8_E4M3", "FP8_E5M2", "MXFP4", "MXFP6_E2M3", "MXFP6_E3M2", "MXFP8_E4M3", "MXFP8_E5M2", "MXINT8", "NVFP4",
    "Blocks", "block_scale", "float_element", "quantize_blocks",
]  # fmt: skip

MXFP4 = NAMED["mxfp4"]
MXFP6_E2M3 = NAMED["mxfp6_e2m3"]
MXFP6_E3M2 = NAMED["mxfp6_e3m2"]
MXFP8_E4M3 = NAMED["mxfp8_e4m3"]
MXFP8_E5M2 = NAMED["mxfp8_e5m2"]
MXINT8 = NAMED["mxint8"]
NVFP4 = NAMED["nvfp4"]
FP8_E4M3 = NAMED["fp8_e4m3"]
FP8_E5M2 = NAMED["fp8_e5m2"]


def float_element(scheme: Scheme) -> MiniFloat:
    """The float of a scheme.

    Raises:
        ValueError: its element is none.
    """
    if not isinstance(scheme.element, Float):
        raise ValueError(f"{scheme}: blocks are of floats, not of {scheme.element}")
    return scheme.element.numbers


def block_scale(amax: Tensor, scheme: Scheme, *, bits: int = 8, name: str = "tensor") -> Tensor:
    """X float32 of blocks whose largest magnitudes are given, by the scheme's rule; of e4m3 ones before they are coded.

    Args:
        amax: a, any shape, not negative.
        scheme: of a float.
        bits: of e8m0 scales: E lies in -(2^(bits - 1) - 1) .. 2^(bits - 1) - 1.
        name: the parameter's path, for messages.

    Raises:
        ScaleOutOfRange: a power of two is above what the scale holds.
    """
    element = float_element(scheme)
    if scheme.scale.dtype != "e8m0":
        size = amax.float() / element.largest
        return size if scheme.scale.dtype == "e4m3" else torch.where(amax > 0, size, 1.0)
    top = (1 << (bits - 1)) - 1
    exponent = _exponents(amax.double(), element, scheme.scale.rule)
    if amax.numel() and int(exponent.max()) > top:
        raise ScaleOutOfRange(f"{name}: a block's scale 2^{int(exponent.max())} is above 2^{top}, which is the most")
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float64), exponent.clamp(min=-top)).float()


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        scheme: how it is stored.
        codes: (rows, k) uint8, the floats' bit patterns.
        stored: its scales, as `store_scales` gives them.
    """

    scheme: Scheme
    codes: Tensor
    stored: dict[str, Tensor]

    @property
    def scale(self) -> Tensor:
        """X (rows, G) float32, or (1, 1); e4m3 ones as they are coded, without g."""
        coded = self.stored["scale"]
        return self._read() if self.global_scale is None else float_values(coded, mini_float("e4m3"))

    @property
    def global_scale(self) -> Tensor | None:
        """g (1,) float32 with e4m3 scales, else None."""
        return self.stored.get("global_scale")

    def _read(self) -> Tensor:
        return read_scales(self.stored, self.scheme, self.scheme.scales(*self.codes.shape)).float()

    def values(self) -> Tensor:
        """f (rows, k) float32."""
        return float_values(self.codes, float_element(self.scheme))

    def dequantize(self) -> Tensor:
        """x^ = X f (rows, k) float32."""
        rows, k = self.codes.shape
        return self.values() * _spread(self._read(), self.scheme, rows, k)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, as `Scheme.tensors` says: dense codes, and scales as their bytes."""
        return {"packed": pack_codes(self.codes, self.scheme.element), **self.stored}

    @staticmethod
    def of_tensors(stored: dict[str, Tensor], scheme: Scheme, k: int) -> Blocks:
        """The matrix of what is stored: the inverse of `tensors`.

        Raises:
            ValueError: shapes or types do not belong to `k` columns of this scheme, or a scale is nan.
        """
        rows = stored["packed"].shape[0]
        for name, (dtype, shape) in scheme.tensors(rows, k).items():
            if name not in stored or stored[name].dtype != dtype or tuple(stored[name].shape) != shape:
                found = (stored[name].dtype, tuple(stored[name].shape)) if name in stored else "nothing"
                raise ValueError(f"{name}: {scheme} stores {dtype} of shape {shape}, got {found}")
        scales = {name: tensor for name, tensor in stored.items() if name != "packed"}
        made = Blocks(scheme, unpack_codes(stored["packed"], scheme.element, k), scales)
        if bool(made._read().isnan().any()):
            raise ValueError(f"scale: a byte stands for nan in {scheme}")
        return made


def quantize_blocks(
    x: Tensor, scheme: Scheme, *, largest: float | None = None, scale_bits: int = 8, subnormals: bool = True,
    flush: bool = False, name: str = "tensor",
) -> Blocks:  # fmt: skip
    """A matrix in blocks, with what the formats' own programs offer; without it, `quantize` gives the same codes.

    Args:
        x: (rows, k) floating; the last block of a row may be short.
        scheme: how.
        largest: max |x| over what shares g, with e4m3 scales: that of x by default (q, k and v fused share one).
        scale_bits: of e8m0 scales: E lies in -(2^(bits - 1) - 1) .. 2^(bits - 1) - 1.
        subnormals: whether elements below the least normal number are kept; else they become 0.
        flush: whether blocks of numbers that float32 holds as subnormal ones alone become 0.
        name: the parameter's path, for messages.

    Raises:
        NotFinite: inf or nan in x.
        ScaleOutOfRange: a power of two is above what the scale holds, or a scale is below what float32 does.
        ValueError: x is no matrix, or the scheme no float.
    """
    element = float_element(scheme)
    if x.ndim != 2:
        raise ValueError(f"{name}: blocks are runs of a matrix's rows, got shape {tuple(x.shape)}")
    check_finite(x, name)
    rows, k = x.shape
    wide = x.detach().double()
    amax = _amax(wide, scheme)
    if flush:
        kept = amax >= torch.finfo(torch.float32).tiny
        wide = wide * _spread(kept.double(), scheme, rows, k)
    scale = block_scale(amax, scheme, bits=scale_bits, name=name).to(scheme.scale.torch_dtype)
    if scheme.scale.plain and not bool((scale > 0).all()):
        raise ScaleOutOfRange(f"{name}: a scale is below what {scheme.scale.dtype} holds")
    stored = store_scales(scale, scheme, name, largest=largest)
    under = read_scales(stored, scheme, scheme.scales(rows, k)).double()
    rounding = "even" if scheme.rounding == "nearest" else scheme.rounding
    values = round_float(wide / _spread(under, scheme, rows, k), element, rounding, subnormals=subnormals)  # type: ignore[arg-type]
    return Blocks(scheme, float_codes(values, element), stored)


def _exponents(amax: Tensor, element: MiniFloat, rule: str) -> Tensor:
    """E (rows, G) int32 of largest magnitudes in float64."""
    if rule == "ct_round":
        power = torch.ldexp(torch.ones_like(amax), torch.frexp(amax).exponent - 1)
        amax = amax + power * 0.25
    mantissa, exponent = torch.frexp(amax if rule != "ceil" else amax / element.largest)
    # Up to the next power of two, or to itself where it is one; else down.
    found = exponent - (mantissa == 0.5).int() if rule == "ceil" else exponent - 1 - element.emax
    return torch.where(amax == 0, -127, found)


def _amax(x: Tensor, scheme: Scheme) -> Tensor:
    """max |x| (rows, G) of each block, or (1, 1)."""
    rows, k = x.shape
    if scheme.scale.granularity == "tensor":
        return x.abs().max().view(1, 1) if x.numel() else x.new_zeros(1, 1)
    group, count = scheme.scale.group_of(k), scheme.scale.groups(k)
    padded = torch.nn.functional.pad(x.abs(), (0, group * count - k))
    return padded.view(rows, count, group).amax(-1) if rows else x.new_zeros(0, count)


def _spread(scale: Tensor, scheme: Scheme, rows: int, k: int) -> Tensor:
    """Scales (rows, k) of the elements."""
    if scheme.scale.granularity == "tensor":
        return scale.expand(rows, k)
    return scale.repeat_interleave(scheme.scale.group_of(k), dim=1)[:, :k]
