"""GPTQ checkpoints (AutoGPTQ, GPTQModel): a layer X of b bits is

    X.qweight  int32 (in b / 32, out)   codes, packed down the inputs, least significant bits first, values may cross words
    X.qzeros   int32 (G, out b / 32)    zero points, packed along the outputs; minus one in version 1 ("gptq")
    X.scales   float16 (G, out)
    X.g_idx    int32 (in)               the group of each input

    W[o, i] = scales[g_idx[i], o] (q[i, o] - z[g_idx[i], o])

Version 1 stores z - 1 modulo 2^b. In "act-order" checkpoints g_idx is no run of equal numbers: inputs are sorted by group, and
the layer gathers its inputs in that order when it runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.numerics import Int, pack, unpack

from .checkpoint_form import Form, Read, Spec, integer_scheme
from .matrix import QuantizedMatrix

__all__ = ["Gptq", "gptq_config", "gptq_tensors", "packed_inputs", "sorted_groups"]

VERSIONS = ("gptq", "gptq_v2")


class Gptq(Form):
    """GPTQ, versions 1 and 2, with any order of groups."""

    method = "gptq"
    parts: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, config: Mapping[str, Any], where: object):
        super().__init__(config, where)
        self.version = str(config.get("checkpoint_format") or "gptq")
        if self.version not in VERSIONS:
            raise self.refused(
                f"in the layout {self.version!r} of one kernel",
                "save it again with checkpoint_format gptq, or give the float model",
            )
        if config.get("bits") not in (2, 3, 4, 8):
            raise self.refused(f"with bits {config.get('bits')!r}")

    def layers(self, names: set[str], spec: Spec) -> dict[str, str]:
        """Every layer that has `qweight`."""
        paths = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        return {f"{path}.weight": path for path in paths}

    def shape(self, path: str, spec: Spec) -> tuple[int, int]:
        """(out, in), from the shapes of what is stored."""
        return spec(f"{path}.scales")[1][1], self._inputs(path, spec)

    def _bits(self, path: str, spec: Spec) -> int:
        """Of this layer: single layers may have other bits than the config says."""
        outputs, words = spec(f"{path}.scales")[1][1], spec(f"{path}.qzeros")[1][1]
        bits = 32 * words // max(1, outputs)
        if bits not in (2, 3, 4, 8) or 32 * words != bits * outputs:
            raise self.refused(f"whose {path}.qzeros have {words} words for {outputs} outputs", "download it again")
        return bits

    def _inputs(self, path: str, spec: Spec) -> int:
        words, bits = spec(f"{path}.qweight")[1][0], self._bits(path, spec)
        if 32 * words % bits:
            raise self.refused(f"whose {path}.qweight has {words} words of {bits} bits a column", "download it again")
        return 32 * words // bits

    def _numbers(self, path: str, read: Read, spec: Spec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes (out, in), scales (out, G), zero points (out, G) and the group of each input."""
        bits, (rows, k) = self._bits(path, spec), self.shape(path, spec)
        codes = unpack(read(f"{path}.qweight").t().contiguous(), bits, k)
        zeros = unpack(read(f"{path}.qzeros"), bits, rows).t().contiguous()
        if self.version == "gptq":
            zeros = (zeros + 1) & (2**bits - 1)
        scales = read(f"{path}.scales").t().contiguous()
        groups = scales.shape[1]
        if spec(f"{path}.qweight")[1][1] != rows or zeros.shape[1] != groups:
            raise self.refused(f"whose tensors of {path} have shapes that do not fit one another", "download it again")
        try:
            index = read(f"{path}.g_idx").long()
        except KeyError:
            index = torch.arange(k) // max(1, -(-k // groups))
        if index.shape != (k,) or (k and not 0 <= int(index.min()) <= int(index.max()) < groups):
            raise self.refused(f"whose {path}.g_idx does not number its {groups} groups", "download it again")
        return codes, scales, zeros, index

    def matrix(self, path: str, read: Read, spec: Spec) -> QuantizedMatrix | None:
        """In our numbers; None where groups have other sizes than runs can have."""
        bits = self._bits(path, spec)
        codes, scales, zeros, index = self._numbers(path, read, spec)
        found = sorted_groups(index, scales.shape[1])
        if found is None:
            return None
        group, order = found
        if order is not None:
            codes = codes.index_select(1, order)
        middle = bool((zeros == 2 ** (bits - 1)).all())
        scheme = integer_scheme(bits, group, scales.dtype, not middle)
        return QuantizedMatrix(
            scheme, codes, scales, None if middle else zeros, None if order is None else order.to(torch.int32)
        )

    def values(self, path: str, read: Read, spec: Spec) -> Tensor:
        """W, for any order of groups."""
        codes, scales, zeros, index = self._numbers(path, read, spec)
        return scales.float()[:, index] * (codes.float() - zeros.float()[:, index])


def sorted_groups(index: Tensor, groups: int) -> tuple[int | None, Tensor | None] | None:
    """Length of the groups (None where there is one), and the order of inputs by group (None where they lie so already).

    None if no order of the inputs makes the groups runs of one length, the last one perhaps shorter.
    """
    if groups == 1:
        return None, None
    counts = torch.bincount(index, minlength=groups).tolist()
    if len(set(counts[:-1])) > 1 or counts[-1] > counts[0] or counts[-1] == 0:
        return None
    order = index.argsort(stable=True)
    return counts[0], None if torch.equal(order, torch.arange(len(order))) else order


# --- writing ---------------------------------------------------------------------------------------------------------


def packed_inputs(codes: Tensor, bits: int) -> Tensor:
    """`qweight` int32 (in b / 32, out) of codes (out, in)."""
    return pack(codes, bits).t().contiguous()


def gptq_tensors(matrix: QuantizedMatrix, version: str = "gptq") -> dict[str, Tensor] | str:
    """The tensors of a layer by their ending, or why it has no such form."""
    element, (rows, k) = matrix.scheme.element, matrix.shape
    if not isinstance(element, Int) or element.bits not in (2, 3, 4, 8) or matrix.scheme.zero == "real":
        return f"{matrix.scheme} is not 2, 3, 4 or 8 bits with whole zero points"
    bits = element.bits
    if rows * bits % 32 or k * bits % 32:
        return f"its {rows} outputs and {k} inputs of {bits} bits do not fill words of 32"
    group = matrix.scheme.scale.group_of(k) if matrix.scheme.scale.granularity == "group" else k
    scale = matrix.scale.expand(rows, -1)
    if not torch.equal(scale.half().to(scale.dtype), scale):
        return "its scales do not fit in float16"
    groups = scale.shape[1]
    middle = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8)
    zero = middle if matrix.zero is None else matrix.zero.expand(rows, groups)
    if version == "gptq":
        if bool((zero == 0).any()):
            return "a zero point is 0, which readers of version 1 take for different numbers: write gptq_v2"
        zero = zero - 1
    codes, index = matrix.codes, torch.arange(k, dtype=torch.int32) // group
    if matrix.order is not None:
        back = matrix.order.argsort()
        codes, index = codes.index_select(1, back), index.index_select(0, back)
    return {
        "qweight": packed_inputs(codes, bits), "qzeros": pack(zero.t().contiguous(), bits),
        "scales": scale.half().t().contiguous(), "g_idx": index,
    }  # fmt: skip


def gptq_config(layers: Mapping[str, QuantizedMatrix], floats: list[str], version: str) -> dict[str, Any]:
    """The `quantization_config`: what most layers have, and the others one by one under `dynamic`."""
    said = {path: _said(matrix) for path, matrix in layers.items()}
    usual = Counter(tuple(one.items()) for one in said.values()).most_common(1)
    config: dict[str, Any] = (
        dict(usual[0][0]) if usual else {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    )
    dynamic: dict[str, Any] = {f"+:^{re.escape(path)}$": one for path, one in said.items() if one != config}
    dynamic |= {f"-:^{re.escape(path)}$": {} for path in floats}
    head = {"quant_method": "gptq", "checkpoint_format": version, "pack_dtype": "int32", "lm_head": "lm_head" in layers}
    return head | config | ({"dynamic": dynamic} if dynamic else {})


def _said(matrix: QuantizedMatrix) -> dict[str, Any]:
    scale = matrix.scheme.scale
    return {
        "bits": int(matrix.scheme.bits), "group_size": scale.group if scale.granularity == "group" else -1,
        "sym": matrix.zero is None, "desc_act": matrix.order is not None,
    }  # fmt: skip
