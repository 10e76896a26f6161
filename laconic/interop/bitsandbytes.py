"""bitsandbytes checkpoints. A layer X of 4 bits is

    X.weight                                   uint8 (out in / 2, 1), two codes a byte of the flattened matrix, the first high
    X.weight.absmax                            float32, one a block of the flattened matrix; or uint8, nested:
    X.weight.nested_absmax, .nested_quant_map  absmax = map[code] nested_absmax + nested_offset
    X.weight.quant_map                         float32 (16,), the levels
    X.weight.quant_state.bitsandbytes__nf4     JSON as bytes: blocksize, shape, dtype, and what is nested (or __fp4)

    W = quant_map[code] absmax

and of 8 bits `X.weight` int8 (out, in) with `X.SCB` float32 (out,): W = q SCB / 127. Blocks run over the whole matrix: they
are groups of ours where they divide a row, and a layer where they do not is read as floats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.numerics import Int, Levels, Scale, Scheme

from .checkpoint_form import Form, Read, Spec
from .matrix import QuantizedMatrix

__all__ = ["BitsAndBytes", "bitsandbytes_config", "bitsandbytes_tensors"]

_STATE = ".weight.quant_state.bitsandbytes__"
_TABLES = {"nf4": "nf4", "fp4": "fp4_bnb"}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytes(Form):
    """NF4, FP4 and LLM.int8 of bitsandbytes."""

    method = "bitsandbytes"
    parts: ClassVar[tuple[str, ...]] = (
        ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", f"{_STATE}nf4",
        f"{_STATE}fp4", ".SCB", ".weight_format",
    )  # fmt: skip

    def __init__(self, config: Mapping[str, Any], where: object):
        super().__init__(config, where)
        if config.get("load_in_8bit"):
            self.notes.append("outliers among its inputs are not taken apart: inputs stay float")

    def layers(self, names: set[str], spec: Spec) -> dict[str, str]:
        """Every layer with the state of 4 bits or the scales of 8."""
        found = [
            name.removesuffix(f"{_STATE}{kind}")
            for kind in _TABLES
            for name in names
            if name.endswith(f"{_STATE}{kind}")
        ]
        found += [name.removesuffix(".SCB") for name in names if name.endswith(".SCB")]
        lacking = [path for path in found if f"{path}.weight" not in names]
        if lacking:
            raise self.refused(f"whose {lacking[0]} has scales and no weight", "download it again")
        loose = [
            n
            for n in names
            if n.endswith(".weight") and spec(n)[0] is torch.uint8 and n.removesuffix(".weight") not in found
        ]
        if loose:
            raise self.refused(f"whose {loose[0]} lacks its quant_state", "save it again with a newer transformers")
        return {f"{path}.weight": path for path in found}

    def learn(self, path: str, read: Read) -> None:
        """Read the shape of a layer, which is in its state alone."""
        for kind in _TABLES:
            try:
                raw = read(f"{path}{_STATE}{kind}")
            except KeyError:
                continue
            try:
                state = json.loads(bytes(raw.tolist()))
                rows, k = (int(n) for n in state["shape"])
                length = int(state["blocksize"])
            except (ValueError, KeyError, TypeError) as error:
                raise self.refused(
                    f"whose {path}{_STATE}{kind} does not parse ({error})", "download it again"
                ) from error
            self.learnt[path] = {**state, "kind": kind, "shape": (rows, k), "blocksize": length}

    def shape(self, path: str, spec: Spec) -> tuple[int, int]:
        """(out, in)."""
        state = self.learnt.get(path)
        return state["shape"] if state is not None else spec(f"{path}.weight")[1]  # type: ignore[return-value]

    def matrix(self, path: str, read: Read, spec: Spec) -> QuantizedMatrix | None:
        """In our numbers; None where blocks do not divide a row, or the levels are others than bitsandbytes' own."""
        state = self.learnt.get(path)
        if state is None:
            scale = (read(f"{path}.SCB").float() / 127).reshape(-1, 1)
            codes = (read(f"{path}.weight").to(torch.int16) + 128).to(torch.uint8)
            return QuantizedMatrix(Scheme(Int(8), Scale("channel")), codes, scale)
        (rows, k), length, element = state["shape"], state["blocksize"], Levels(_TABLES[state["kind"]])
        if k % length or not torch.equal(read(f"{path}.weight.quant_map").float(), torch.tensor(element.table)):
            return None
        scale = self._absmax(path, read, state).reshape(rows, k // length)
        return QuantizedMatrix(
            Scheme(element, Scale("group", length)), self._codes(path, read, state).reshape(rows, k), scale
        )

    def _codes(self, path: str, read: Read, state: Mapping[str, Any]) -> Tensor:
        rows, k = state["shape"]
        packed = read(f"{path}.weight").view(torch.uint8).reshape(-1)
        if packed.numel() != -(-rows * k // 2):
            raise self.refused(
                f"whose {path}.weight has {packed.numel()} bytes for {rows} x {k} codes", "download it again"
            )
        return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: rows * k]

    def _absmax(self, path: str, read: Read, state: Mapping[str, Any]) -> Tensor:
        stored = read(f"{path}.weight.absmax")
        if stored.dtype is not torch.uint8:
            return stored.float()
        outer = read(f"{path}.weight.nested_absmax").float().repeat_interleave(int(state["nested_blocksize"]))
        inner = read(f"{path}.weight.nested_quant_map").float()[stored.int()]
        return inner * outer[: len(inner)] + float(state["nested_offset"])

    def values(self, path: str, read: Read, spec: Spec) -> Tensor:
        """W, for any length of blocks."""
        state = self.learnt.get(path)
        if state is None:
            return super().values(path, read, spec)
        (rows, k), length = state["shape"], state["blocksize"]
        levels = read(f"{path}.weight.quant_map").float()[self._codes(path, read, state).int()]
        return (levels * self._absmax(path, read, state).repeat_interleave(length)[: rows * k]).reshape(rows, k)


# --- writing ---------------------------------------------------------------------------------------------------------


def bitsandbytes_tensors(matrix: QuantizedMatrix, version: str, dtype: torch.dtype) -> dict[str, Tensor] | str:
    """The tensors of a layer by their ending, or why it has no such form; `version` is "nf4" or "fp4"."""
    scheme, (rows, k) = matrix.scheme, matrix.shape
    if scheme.element != Levels(_TABLES[version]):
        return f"{scheme} is not {version} of bitsandbytes"
    length = scheme.scale.group_of(k)
    if scheme.scale.granularity != "group" or k % length or length not in BLOCKS or rows * k % 2:
        return f"its scales are not in blocks of {', '.join(map(str, BLOCKS))} that divide its {k} inputs"
    flat = matrix.codes.reshape(-1, 2)
    state = {"quant_type": version, "blocksize": length, "dtype": str(dtype).removeprefix("torch."), "shape": [rows, k]}
    return {
        "weight": (flat[:, 0] << 4 | flat[:, 1]).reshape(-1, 1), "weight.absmax": matrix.scale.float().reshape(-1),
        "weight.quant_map": torch.tensor(scheme.element.table),
        f"weight.quant_state.bitsandbytes__{version}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip


def bitsandbytes_config(layers: Mapping[str, QuantizedMatrix], floats: list[str], version: str) -> dict[str, Any]:
    """The `quantization_config`."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": version,
        "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(floats),
    }  # fmt: skip
