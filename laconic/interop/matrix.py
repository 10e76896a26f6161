"""One quantized matrix in our numbers: what every foreign format is read into, and written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.core.record import PACK, Record
from laconic.kernels.ops import unpack_zero
from laconic.nn import PackedParameterSpec, pack_tensors
from laconic.nn.packed import Packed
from laconic.numerics import Codebook, Float, Int, Levels, Scheme, dequantize, unpack_codes

__all__ = ["QuantizedMatrix", "spread"]


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes, scales and zero points of a (rows, k) matrix.

    Attributes:
        scheme: says what they mean.
        codes: (rows, k) uint8.
        scale: (rows, G), or (1, 1) of a whole tensor, in the scheme's type.
        zero: None, (rows, G) uint8, or real ones in the scheme's type.
        order: (k,) int32, or None: column j of the codes is column order[j] of the matrix.
        inputs: how the inputs of its layer are rounded, as in `PackedParameterSpec`.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None
    inputs: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, k)."""
        element = self.scheme.element
        return self.codes.shape[0], self.codes.shape[1] * (element.dim if isinstance(element, Codebook) else 1)

    def values(self) -> Tensor:
        """The matrix, float32 (rows, k), its columns in their own order."""
        found = dequantize(self.codes, self.scale, self.zero, self.scheme)
        return found if self.order is None else found[:, self.order.argsort()]

    def record(self, path: str, aliases: Sequence[str] = ()) -> Record:
        """The record that packs the parameter at `path` with these numbers."""
        spec = PackedParameterSpec(self.scheme, self.shape, "rows", self.inputs, self.order is not None)
        stored = pack_tensors(spec, self.codes, self.scale, self.zero)
        if self.order is not None:
            stored["order"] = self.order.to(torch.int32)
        return Record(PACK, path, {"spec": spec.to_json(), "aliases": list(aliases)}, stored)

    @staticmethod
    def of(module: nn.Module, name: str = "weight") -> QuantizedMatrix:
        """The matrix behind a packed parameter, in its matrix view."""
        assert isinstance(module, Packed)
        spec = module._packed[name]
        codes, scale, zero = module.packed_operands(name)
        order = module.packed_tensor(name, "order") if spec.order else None
        scheme, scale = spec.scheme.plain, scale.detach()
        if scheme.element == Float("e2m1") and spec.scheme.scale.dtype == "e8m0":
            # Other programs know these numbers over their largest, which powers of two take up exactly.
            scheme, scale = scheme.with_(element=Levels("fp4")), scale * Float("e2m1").numbers.largest
        return QuantizedMatrix(
            scheme, unpack_codes(codes.detach(), spec.scheme.element, spec.matrix[1]), scale,
            unpack_zero(None if zero is None else zero.detach(), scale.shape[0], spec.scheme), order, spec.inputs,
        )  # fmt: skip

    def integers(self) -> Tensor | None:
        """q - z as int16 (rows, k), so that w = s (q - z); None where the scheme has levels or real zero points."""
        if isinstance(self.scheme.element, Int):
            if self.scheme.zero == "real":
                return None
            if self.zero is None:
                return self.codes.to(torch.int16) - self.scheme.element.levels // 2
            return self.codes.to(torch.int16) - spread(self.zero, self.shape, self.scheme).to(torch.int16)
        if isinstance(self.scheme.element, Codebook):
            return None
        whole = [float(level).is_integer() for level in self.scheme.element.table]
        if not all(whole):
            return None
        table = torch.tensor(self.scheme.element.table, dtype=torch.int16)
        return table[self.codes.int()]

    def blocks(self, length: int) -> Tensor | None:
        """Scales float32 (rows, k / length), of runs of `length` columns; None where a run has more than one."""
        rows, k = self.shape
        group = self.scheme.scale.group_of(k) if self.scheme.scale.granularity == "group" else k
        if k % length or (group % length and group < k):
            return None
        return spread(self.scale.float(), (rows, k), self.scheme)[:, ::length]


def spread(values: Tensor, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """One value a column (rows, k), from one a group, row or tensor."""
    rows, k = shape
    if values.shape[1] > 1:
        values = values.repeat_interleave(scheme.scale.group_of(k), dim=1)[:, :k]
    return values.expand(rows, k)
