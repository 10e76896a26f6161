"""compressed-tensors (llm-compressor, vLLM), formats pack-quantized and int-quantized: a layer X is

    X.weight_packed       int32 (out, ceil(in b / 32))    q + 2^(b-1), least significant bits first, values may cross words
    X.weight_shape        int64 (2,)
    X.weight              int8 (out, in)                  in place of both, in int-quantized
    X.weight_scale        (out, G), (out, 1) or (1,)
    X.weight_zero_point   int8, or packed down the outputs likewise; none of symmetric layers
    X.weight_g_idx        int32 (in,), where inputs were sorted by activation (actorder group)

    W = scale (q - zero),  q in [-2^(b-1), 2^(b-1) - 1]

Releases before the dense packer put floor(32 / b) values into a word; for 3, 5, 6 and 7 bits they are told by their width.
Inputs that are rounded to 8 bits, token by token or all by one scale that is known before, are rounded by our kernels as
well, by the same rule; the one scale is stored:

    X.input_scale         (1,)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.kernels.inputs import INT8_TOKENS, int8_tensor, static_scale
from laconic.numerics import Int, pack, unpack, words_per_row

from .checkpoint_form import Form, Read, Spec, integer_scheme
from .gptq import sorted_groups
from .matrix import QuantizedMatrix

__all__ = ["CompressedTensors", "compressed_tensors_config", "compressed_tensors_tensors"]

FORMATS = ("pack-quantized", "int-quantized")
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


class CompressedTensors(Form):
    """Integers of compressed-tensors."""

    method = "compressed-tensors"
    parts: ClassVar[tuple[str, ...]] = (
        ".weight_packed", ".weight_shape", ".weight_scale", ".weight_zero_point", ".weight_g_idx", ".input_scale",
        ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale",
    )  # fmt: skip

    def __init__(self, config: Mapping[str, Any], where: object):
        super().__init__(config, where)
        self.groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, dict)]
        formats = {group.get("format") or config.get("format") for group in self.groups} or {config.get("format")}
        odd = sorted(str(one) for one in formats if one not in FORMATS)
        weights = [group.get("weights") or {} for group in self.groups]
        if odd or any(one.get("type", "int") != "int" for one in weights):
            raise self.refused(
                f"in the format {', '.join(odd) or 'of floats'}",
                "it reads pack-quantized and int-quantized; give the float model, or decompress it with the package "
                "compressed-tensors",
            )
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense" or config.get("transform_config"):
            raise self.refused("with sparse weights or transforms")
        if config.get("kv_cache_scheme"):
            self.notes.append("its quantized cache of keys and values is not carried out: the cache stays float")

    def layers(self, names: set[str], spec: Spec) -> dict[str, str]:
        """Every layer that has a scale."""
        paths = [name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")]
        lacking = [p for p in paths if f"{p}.weight_packed" not in names and f"{p}.weight" not in names]
        if lacking:
            raise self.refused(f"whose {lacking[0]} has a scale and no weight", "download it again")
        return {f"{path}.weight": path for path in paths}

    def _arguments(self, path: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the config says of the weights and inputs of a layer: by its name, by a pattern, or by its class."""
        for group in self.groups:
            for target in group.get("targets") or ():
                named = target.startswith("re:") and re.match(target[3:], path)
                if named or target == path or path.endswith(f".{target}"):
                    return group.get("weights") or {}, group.get("input_activations")
        for group in self.groups:
            if any(re.fullmatch(r"\w+", target) for target in group.get("targets") or ()):
                return group.get("weights") or {}, group.get("input_activations")
        raise self.refused(f"whose config_groups do not name {path}", "download it again")

    def _packed(self, path: str, spec: Spec) -> bool:
        try:
            spec(f"{path}.weight_packed")
        except KeyError:
            return False
        return True

    def shape(self, path: str, spec: Spec) -> tuple[int, int]:
        """(out, in)."""
        if not self._packed(path, spec):
            return spec(f"{path}.weight")[1]  # type: ignore[return-value]
        rows, words = spec(f"{path}.weight_packed")[1]
        bits, k = self._bits(path), self.learnt.get(path)
        return (rows, k) if k is not None else (rows, words * 32 // bits)

    def learn(self, path: str, read: Read) -> None:
        """Note how many inputs a packed layer has: words alone leave room for several."""
        try:
            self.learnt[path] = int(read(f"{path}.weight_shape")[1])
        except (KeyError, IndexError):
            return  # of an unpacked one, or told by the words

    def _bits(self, path: str) -> int:
        bits = self._arguments(path)[0].get("num_bits")
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            raise self.refused(f"whose {path} has num_bits {bits!r}")
        return bits

    def matrix(self, path: str, read: Read, spec: Spec) -> QuantizedMatrix | None:
        """In our numbers; None where the groups of sorted inputs are no runs."""
        said, inputs = self._arguments(path)
        bits, (rows, k) = self._bits(path), self.shape(path, spec)
        half = 2 ** (bits - 1)
        if self._packed(path, spec):
            codes = self._unpacked(path, read(f"{path}.weight_packed"), bits, k)
        else:
            codes = (read(f"{path}.weight").to(torch.int16) + half).to(torch.uint8)
        scale = read(f"{path}.weight_scale")
        scale = scale.reshape(1, 1) if scale.numel() == 1 and rows != 1 else scale.reshape(rows, -1)
        groups = scale.shape[1]
        group = said.get("group_size") if groups > 1 else None
        if groups > 1 and (not isinstance(group, int) or group < 1 or -(-k // group) != groups):
            raise self.refused(f"whose {path}.weight_scale has {groups} columns for {k} inputs in groups of {group}")
        zero = None if said.get("symmetric", True) else self._zero(path, read, spec, bits, scale.shape[0], groups)
        order = None
        try:
            index = read(f"{path}.weight_g_idx").long()
        except KeyError:
            index = None
        if index is not None and groups > 1 and int(index.min()) >= 0:
            found = sorted_groups(index, groups)
            if found is None or found[0] != group:
                return None
            order = found[1]
            codes = codes if order is None else codes.index_select(1, order)
        scheme = integer_scheme(bits, group, scale.dtype, zero is not None)
        if scale.shape[0] == 1 and rows != 1:
            scheme = scheme.with_(granularity="tensor")
        return QuantizedMatrix(
            scheme,
            codes,
            scale.contiguous(),
            zero,
            None if order is None else order.to(torch.int32),
            self._rounding(path, inputs, read),
        )

    def _unpacked(self, path: str, words: Tensor, bits: int, k: int) -> Tensor:
        if words.shape[1] == words_per_row(k, bits):
            return unpack(words, bits, k)
        each = 32 // bits
        if words.shape[1] != -(-k // each):
            raise self.refused(
                f"whose {path}.weight_packed has {words.shape[1]} words for {k} inputs", "download it again"
            )
        shifts = torch.arange(each, dtype=torch.int32) * bits
        return (words[:, :, None] >> shifts & 2**bits - 1).to(torch.uint8).reshape(len(words), -1)[:, :k].contiguous()

    def _zero(self, path: str, read: Read, spec: Spec, bits: int, rows: int, groups: int) -> Tensor:
        stored = read(f"{path}.weight_zero_point")
        if stored.dtype is not torch.int32 or stored.shape == (rows, groups):
            return (stored.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).reshape(rows, groups)
        return self._unpacked(path, stored.t().contiguous(), bits, rows).t().contiguous()

    def _rounding(self, path: str, inputs: dict[str, Any] | None, read: Read) -> str:
        if not inputs:
            return ""
        if all(inputs.get(key) == value for key, value in _TOKENS.items()):
            return INT8_TOKENS
        if all(inputs.get(key) == value for key, value in _STATIC.items()):
            return self._static(path, read)
        note = "the rounding of inputs that it asks for is not carried out: inputs stay float"
        if note not in self.notes:
            self.notes.append(note)
        return ""

    def _static(self, path: str, read: Read) -> str:
        try:
            scale = read(f"{path}.input_scale").float().reshape(-1)
        except KeyError:
            raise self.refused(
                f"whose {path} rounds its inputs by a scale, and there is no {path}.input_scale", "download it again"
            ) from None
        if scale.numel() != 1 or not 0 < float(scale) < float("inf"):
            raise self.refused(f"whose {path}.input_scale is not one positive number", "download it again")
        return int8_tensor(float(scale))

    def values(self, path: str, read: Read, spec: Spec) -> Tensor:
        """W, for any order of groups."""
        found = self.matrix(path, read, spec)
        if found is not None:
            return found.values()
        bare = self.matrix(path, lambda name: _absent(name) if name.endswith("g_idx") else read(name), spec)
        assert bare is not None
        index = read(f"{path}.weight_g_idx").long()
        zero = bare.zero if bare.zero is not None else torch.full(bare.scale.shape, 2 ** (bare.scheme.bits - 1))
        return bare.scale.float()[:, index] * (bare.codes.float() - zero.float()[:, index])


def _absent(name: str) -> Tensor:
    raise KeyError(name)


# --- writing ---------------------------------------------------------------------------------------------------------


def compressed_tensors_tensors(matrix: QuantizedMatrix, version: str = "pack-quantized") -> dict[str, Tensor] | str:
    """The tensors of a layer by their ending, or why it has no such form."""
    scheme, (rows, k) = matrix.scheme, matrix.shape
    if not isinstance(scheme.element, Int) or scheme.zero == "real":
        return f"{scheme} is not integers with whole zero points"
    if not scheme.fits(k):
        return f"groups of {scheme.scale.group} do not divide its {k} inputs"
    bits, half = scheme.element.bits, scheme.element.levels // 2
    codes, found = matrix.codes, {}
    if matrix.order is not None:
        back = matrix.order.argsort()
        codes = codes.index_select(1, back)
        found["weight_g_idx"] = (torch.arange(k, dtype=torch.int32) // scheme.scale.group_of(k)).index_select(0, back)
    if known := static_scale(matrix.inputs):
        found["input_scale"] = torch.tensor([known])
    scale = matrix.scale.reshape(1) if scheme.scale.granularity == "tensor" else matrix.scale.contiguous()
    if version == "int-quantized":
        found |= {"weight": (codes.to(torch.int16) - half).to(torch.int8), "weight_scale": scale}
        if matrix.zero is not None:
            found["weight_zero_point"] = (matrix.zero.to(torch.int16) - half).to(torch.int8)
        return found
    found |= {"weight_packed": pack(codes, bits), "weight_shape": torch.tensor([rows, k]), "weight_scale": scale}
    if matrix.zero is not None:
        found["weight_zero_point"] = pack(matrix.zero.t().contiguous(), bits).t().contiguous()
    return found


def compressed_tensors_config(layers: Mapping[str, QuantizedMatrix], floats: list[str], version: str) -> dict[str, Any]:
    """The `quantization_config`: a group of layers for every way in which they are stored."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, matrix in layers.items():
        scale = matrix.scheme.scale
        length = scale.group_of(matrix.shape[1]) if scale.granularity == "group" else None
        key = (
            int(matrix.scheme.bits),
            matrix.zero is None,
            scale.granularity,
            length or 0,
            matrix.order is not None,
            "static" if static_scale(matrix.inputs) else matrix.inputs,
        )
        groups.setdefault(key, []).append(path)
    said = {}
    for i, (key, paths) in enumerate(sorted(groups.items())):
        bits, symmetric, strategy, length, sorted_, inputs = key
        said[f"group_{i}"] = {
            # Of each group: without it a reader infers pack-quantized from weights alone, whatever the folder's format.
            "targets": sorted(paths), "format": version,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
                "group_size": length or None, "dynamic": False, "actorder": "group" if sorted_ else None,
            },
            "input_activations": dict(_TOKENS if inputs == INT8_TOKENS else _STATIC) if inputs else None, "output_activations": None,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": version, "quantization_status": "compressed",
        "config_groups": said, "ignore": sorted(floats), "kv_cache_scheme": None,
    }  # fmt: skip
