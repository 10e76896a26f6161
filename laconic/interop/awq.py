"""AWQ checkpoints in the GEMM layout (AutoAWQ), read: a layer X of 4 bits is

X.qweight  int32 (in, out / 8)     eight codes a word; nibble n, the lowest first, is column 0, 2, 4, 6, 1, 3, 5, 7
X.qzeros   int32 (G, out / 8)      zero points likewise, as they are
X.scales   float16 (G, out)

W[o, i] = scales[g, o] (q[i, o] - z[g, o]),   g = i / group_size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.numerics import unpack

from .checkpoint_form import Form, Read, Spec, integer_scheme
from .matrix import QuantizedMatrix

__all__ = ["Awq"]

# The nibble of a word that holds each of its eight columns.
NIBBLE_OF = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


class Awq(Form):
    """AWQ's GEMM layout, 4 bits."""

    method = "awq"
    parts: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")

    def __init__(self, config: Mapping[str, Any], where: object):
        super().__init__(config, where)
        version, bits = str(config.get("version") or "gemm").lower(), config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise self.refused(
                f"in the layout {version!r} with {bits} bits",
                "save it again as gemm with 4 bits, or give the float model",
            )

    def layers(self, names: set[str], spec: Spec) -> dict[str, str]:
        """Every layer that has `qweight`."""
        paths = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        return {f"{path}.weight": path for path in paths}

    def shape(self, path: str, spec: Spec) -> tuple[int, int]:
        """(out, in)."""
        inputs, words = spec(f"{path}.qweight")[1]
        return words * 8, inputs

    def matrix(self, path: str, read: Read, spec: Spec) -> QuantizedMatrix:
        """In our numbers."""
        rows, k = self.shape(path, spec)
        scales = read(f"{path}.scales").t().contiguous()
        groups = scales.shape[1]
        if scales.shape[0] != rows or spec(f"{path}.qzeros")[1] != (groups, rows // 8) or groups == 0 or k % groups:
            raise self.refused(f"whose tensors of {path} have shapes that do not fit one another", "download it again")
        codes = _columns(read(f"{path}.qweight"), rows).t().contiguous()
        zeros = _columns(read(f"{path}.qzeros"), rows).t().contiguous()
        scheme = integer_scheme(4, None if groups == 1 else k // groups, scales.dtype, True)
        return QuantizedMatrix(scheme, codes, scales, zeros)


def _columns(words: Tensor, outputs: int) -> Tensor:
    """Codes (n, out) of words (n, out / 8)."""
    nibbles = unpack(words, 4, outputs).view(words.shape[0], -1, 8)
    return nibbles[:, :, NIBBLE_OF].reshape(words.shape[0], outputs)
