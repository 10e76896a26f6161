"""Models in GGUF files, the families of Llama: what a file says of its model, and what a file of ours must say.

llama.cpp names tensors `blk.3.attn_q.weight` where transformers has `model.layers.3.self_attn.q_proj.weight`, and turns
neighbours where transformers turns the two halves of a head: for the architecture `llama`, the rows of a query or key head of
2 h dimensions lie in the order 0, h, 1, h + 1, ... Rows of packed matrices are moved as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.errors import BadInput
from laconic.nn import packed_specs

from .ggml_blocks import BLOCKS, FLOATS, as_blocks, encode, read_matrix
from .gguf_file import GgufFile, write_gguf
from .matrix import QuantizedMatrix

__all__ = ["FAMILIES", "Family", "GgufModel", "export_gguf"]


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp and the model of transformers that it is."""

    name: str
    model_type: str
    cls: str
    paired: bool = False  # rows of queries and keys in the order of neighbours
    biases: tuple[str, ...] = ()
    norms: bool = False  # of queries and keys


FAMILIES = {
    "llama": Family("llama", "llama", "LlamaForCausalLM", paired=True),
    "mistral": Family("llama", "mistral", "MistralForCausalLM", paired=True),
    "qwen2": Family("qwen2", "qwen2", "Qwen2ForCausalLM", biases=("q", "k", "v")),
    "qwen3": Family("qwen3", "qwen3", "Qwen3ForCausalLM", norms=True),
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
# In files of some converters; computed from the config here.
_COMPUTED = re.compile(r"(blk\.\d+\.)?rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")


def hugging_face_name(name: str) -> str | None:
    """The name in transformers of a tensor of llama.cpp, None if there is none."""
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _INNER:
        return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"
    owner, _, kind = name.rpartition(".")
    return f"{_OUTER[owner]}.{kind}" if owner in _OUTER else None


def ggml_name(name: str) -> str | None:
    """The inverse of `hugging_face_name`."""
    owner, _, kind = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    if owner in outer:
        return f"{outer[owner]}.{kind}"
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", owner)
    return f"blk.{match[1]}.{inner[match[2]]}.{kind}" if match and match[2] in inner else None


def paired_rows(rows: int, heads: int) -> np.ndarray:
    """Row numbers, in the order in which llama.cpp has the rows of `heads` heads of transformers."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


# --- reading ---------------------------------------------------------------------------------------------------------


class GgufModel:
    """A language model of one of the families in a GGUF file, by the names of transformers: a store of weights.

    Args:
        file: the parsed file.

    Attributes:
        config: what `config.json` of the same model would hold.
        size: bytes of the file.
        notes: what is odd and was accepted.

    Raises:
        BadInput: it is of another family, or its values do not make a model.
    """

    def __init__(self, file: GgufFile):
        self.file, self.size = file, file.size
        self.notes: list[str] = []
        self.family = self.family_of(file)
        self.config = self._config()
        self._places: dict[str, str] = {}
        for name in file.tensors:
            ours = hugging_face_name(name)
            if ours is not None:
                self._places[ours] = name
            elif not _COMPUTED.fullmatch(name):
                raise BadInput(f"{file.path}: tensor {name} has no place in a {self.family.cls}: it is another model")

    @staticmethod
    def family_of(file: GgufFile) -> Family:
        """The family of a file.

        Raises:
            BadInput: it is none that is read here.
        """
        name = file.values.get("general.architecture")
        found = next((family for family in FAMILIES.values() if family.name == name), None)
        if found is None or "rope_freqs.weight" in file.tensors or any("_exps." in name for name in file.tensors):
            what = f"the architecture {name!r}" if found is None else "rescaled rotary positions or experts"
            names = ", ".join(sorted({family.name for family in FAMILIES.values()}))
            raise BadInput(f"{file.path} has {what}, and models of {names} without either are read: give its original")
        return found

    def _config(self) -> dict[str, Any]:
        arch, values, file = self.family.name, self.file.values, self.file

        def value(key: str, default: Any = None) -> Any:
            found = values.get(f"{arch}.{key}", default)
            if isinstance(found, list) and len(set(found)) == 1:
                found = found[0]
            if found is None or isinstance(found, (list, str)):
                raise BadInput(f"{file.path}: {arch}.{key} is {found!r} in its header: it is broken or of a newer kind")
            return found

        if "token_embd.weight" not in file.tensors:
            raise BadInput(f"{file.path} has no tensor token_embd.weight: it holds no whole language model")
        width, heads = value("embedding_length"), value("attention.head_count")
        if min(width, heads, value("block_count")) < 1:
            raise BadInput(
                f"{file.path}: {arch}.embedding_length or another size in its header is 0: {self.family.cls}"
            )
        head = value("attention.key_length", value("rope.dimension_count", width // heads))
        scaling = values.get(f"{arch}.rope.scaling.type", "none")
        if scaling not in ("none", ""):
            raise BadInput(
                f"{file.path}: rotary positions are scaled ({scaling}), which is not read from GGUF: give its original"
            )
        config = {
            "architectures": [self.family.cls], "model_type": self.family.model_type,
            "vocab_size": file.tensors["token_embd.weight"].shape[0], "hidden_size": width,
            "num_hidden_layers": value("block_count"), "intermediate_size": value("feed_forward_length"),
            "num_attention_heads": heads, "num_key_value_heads": value("attention.head_count_kv", heads), "head_dim": head,
            "max_position_embeddings": value("context_length", 2048),
            "rms_norm_eps": round(value("attention.layer_norm_rms_epsilon"), 12),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(value("rope.freq_base", 10000.0))},
            "hidden_act": "silu", "tie_word_embeddings": "output.weight" not in file.tensors,
        }  # fmt: skip
        if "blk.0.attn_q.bias" in file.tensors and self.family.model_type != "qwen2":
            config["attention_bias"] = True
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{ours}_token_id"] = values.get(f"tokenizer.ggml.{theirs}_token_id")
        return config

    def names(self) -> list[str]:
        """Names of all tensors, as transformers has them."""
        return list(self._places)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor: float32, whatever it is stored in."""
        return torch.float32, self.file.tensors[self._places[name]].shape

    def _raw(self, name: str) -> np.ndarray:
        """Bytes of a tensor's rows, in the order of transformers."""
        raw = self.file.raw(self._places[name])
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if self.family.paired and name.endswith((f".{part}_proj.weight", f".{part}_proj.bias")):
                count = self.config[heads]
                if name.endswith("bias"):
                    raw = raw.reshape(-1, raw.shape[1] // self.spec(name)[1][0])
                if len(raw) % (2 * count):
                    raise BadInput(
                        f"{self.file.path}: {self._places[name]} has {len(raw)} rows, not those of {count} heads"
                    )
                raw = raw[np.argsort(paired_rows(len(raw), count))]
        return raw

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows of a tensor (all by default) as float32."""
        shape, raw = self.spec(name)[1], self._raw(name)
        if len(shape) == 1:
            values = self.file.decoded(self._places[name], raw.reshape(1, -1)).reshape(-1)
            return torch.from_numpy(values.copy())[start:stop].clone()
        values = self.file.decoded(self._places[name], raw[start:stop])
        return torch.from_numpy(values.reshape(-1, *shape[1:]).copy())

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored in fewer bits than a float."""
        return self.file.tensors[self._places[name]].type not in FLOATS

    def matrix(self, name: str) -> QuantizedMatrix | None:
        """A tensor as it is stored, in our numbers; None for floats and for types that only gguf reads."""
        kind = self.file.tensors[self._places[name]].type
        return read_matrix(self._raw(name), kind) if kind in BLOCKS and len(self.spec(name)[1]) == 2 else None


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """What was written: a row per matrix, and sentences on what is not as it was."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {kind: dtype for dtype, kind in FLOAT_TYPES.items()}


def export_gguf(
    model: Any,
    file: Path,
    *,
    tokenizer: Path | Mapping[str, Any] | None = None,
    exact: bool = False,
    floats: str | None = None,
) -> Written:
    """Write a language model, packed or float, as a GGUF file.

    Packed matrices keep their codes: integers become Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, whichever is smallest and holds them,
    ternary and binary numbers TQ2_0, FP4 with scales that are powers of two MXFP4. What fits none (rows or groups that are no
    multiple of 32) is written as F16, or as F32 where no value may change.

    Args:
        model: of one of `FAMILIES`.
        file: to write.
        tokenizer: folder with `tokenizer.json`, or the values that another GGUF file has of its own; without one a reader can
            be given token ids alone.
        exact: no value may change; else scales and minima are rounded to the float16 that the format has.
        floats: type of the matrices that are not packed, or fit no type: F32, F16, BF16, or a block type, to which they are
            rounded. By default the model's own type. Vectors are always F32.

    Raises:
        BadInput: the model is of no family that is written here, or was changed into one that is not.
    """
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if config is None or family is None:
        known = ", ".join(FAMILIES)
        kind = getattr(config, "model_type", type(model).__name__)
        raise BadInput(f"GGUF is written for {known}, and this is a {kind}: export it to onnx or torch instead")
    if floats is not None and floats not in ("F32", "F16", "BF16", *BLOCKS):
        raise BadInput(f"floats={floats!r}: one of F32, F16, BF16, {', '.join(BLOCKS)}")
    _check_structure(model, family)
    written, tensors = Written(), []
    for name, value in _tensors(model):
        theirs = ggml_name(name)
        if theirs is None:
            raise BadInput(
                f"{name} has no name in llama.cpp's {family.name}: export the model to onnx or torch instead"
            )
        rows = _order(name, family, config, value.shape[0])
        kind, shape, data = _stored(name, value, exact, floats, written)
        data = data if rows is None else np.ascontiguousarray(data.reshape(len(rows), -1)[rows])
        tensors.append((theirs, kind, shape, data))
    own = isinstance(tokenizer, Mapping)
    spoken = dict(tokenizer) if own else _tokenizer(tokenizer, config.vocab_size, written)  # type: ignore[arg-type]
    values = _header(config, family, tensors) | spoken
    write_gguf(file, values, tensors)
    return written


def _tensors(model: nn.Module) -> Iterable[tuple[str, QuantizedMatrix | Tensor]]:
    """Every stored tensor once: packed ones as matrices, in the order of the model."""
    packed, seen = packed_specs(model), set()
    for path, module in model.named_modules():
        own = [f"{path}.{name}" if path else name for name in getattr(module, "_packed", ())]
        for name in own:
            if name in packed:
                yield name, QuantizedMatrix.of(module, name.rpartition(".")[2])
        for attribute, tensor in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            stored = any(name.startswith(f"{other}_") for other in own)
            if tensor is not None and not stored and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor.detach()


def _check_structure(model: Any, family: Family) -> None:
    config = model.config
    if type(model).__name__.removeprefix("Packed") != family.cls:
        raise BadInput(f"GGUF holds a {family.cls}, and this is a {type(model).__name__}: export its language model")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise BadInput(
            f"rotary positions of type {rope['rope_type']!r} are not written to GGUF: export to onnx or torch"
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise BadInput(f"llama.cpp's {family.name} has the activation silu, and this model {config.hidden_act}")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    plain = type(model.model.norm).__name__.endswith("RMSNorm") or isinstance(model.model.norm, LlamaRMSNorm)
    if not plain:
        raise BadInput(
            f"model.norm is a {type(model.model.norm).__name__}: the norms of this model were exchanged, and llama.cpp's "
            f"{family.name} has RMSNorm: export to onnx or torch"
        )


def _order(name: str, family: Family, config: Any, rows: int) -> np.ndarray | None:
    if family.paired and ".self_attn.q_proj." in name:
        return paired_rows(rows, config.num_attention_heads)
    if family.paired and ".self_attn.k_proj." in name:
        return paired_rows(rows, config.num_key_value_heads)
    return None


def _stored(
    name: str, value: QuantizedMatrix | Tensor, exact: bool, floats: str | None, written: Written
) -> tuple[str, tuple[int, ...], np.ndarray]:
    """Type, shape and bytes of a tensor."""
    if isinstance(value, Tensor) and value.ndim < 2:
        return "F32", tuple(value.shape), value.float().numpy()
    shape = tuple(value.shape)
    if isinstance(value, QuantizedMatrix):
        found = as_blocks(value, exact=exact)
        if found is not None:
            kind, data, same = found
            written.rows.append({"name": name, "type": kind, "exact": same})
            if not same:
                written.notes.append(f"{name}: scales or minima were rounded to the float16 of {kind}")
            return kind, shape, data
        written.notes.append(f"{name} ({value.scheme}) fits no type of GGUF and is written as floats")
        matrix, kind = value.values(), "F32" if exact else floats or "F16"
    else:
        matrix, kind = value, floats or FLOAT_TYPES.get(value.dtype, "F32")
    if kind in BLOCKS and shape[1] % BLOCKS[kind].length:
        kind = "F16"
    if kind in BLOCKS:
        data, same = encode(matrix.float().numpy(), kind), False
    else:
        data, same = _as_floats(matrix, kind), bool((matrix.to(_DTYPES[kind]) == matrix).all())
    written.rows.append({"name": name, "type": kind, "exact": same})
    return kind, shape, data


def _as_floats(matrix: Tensor, kind: str) -> np.ndarray:
    if kind == "BF16":
        return matrix.bfloat16().contiguous().view(torch.int16).numpy()
    return (matrix.half() if kind == "F16" else matrix.float()).contiguous().numpy()


def _header(config: Any, family: Family, tensors: list) -> dict[str, Any]:
    arch, heads = family.name, config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    # llama.cpp's name for what most of a file is; only shown.
    sizes: dict[str, int] = {}
    for _, kind, _, data in tensors:
        sizes[kind] = sizes.get(kind, 0) + data.nbytes
    types = {
        "F32": 0,
        "F16": 1,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q8_0": 7,
        "Q5_0": 8,
        "Q5_1": 9,
        "BF16": 32,
        "TQ1_0": 36,
        "TQ2_0": 37,
        "MXFP4": 38,
    }
    return {
        "general.architecture": arch, "general.name": Path(str(getattr(config, "name_or_path", "") or arch)).name,
        "general.file_type": types[max(sizes, key=lambda kind: sizes[kind])], "general.quantization_version": 2,
        f"{arch}.block_count": config.num_hidden_layers, f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size, f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        f"{arch}.attention.key_length": head, f"{arch}.attention.value_length": head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(theta), f"{arch}.rope.dimension_count": head, f"{arch}.vocab_size": config.vocab_size,
    }  # fmt: skip


# --- the tokenizer ---------------------------------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# A part of the pattern by which a tokenizer splits text -> llama.cpp's name of it.
_SPLITS = (
    (r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)", "llama-bpe"),
    (r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)", "qwen2"),
)


def _tokenizer(folder: Path | None, vocabulary: int, written: Written) -> dict[str, Any]:
    """The tokenizer of a folder as values of the header; "none" where there is none that GGUF can hold."""
    file = None if folder is None else folder / "tokenizer.json"
    if folder is None or file is None or not file.is_file():
        written.notes.append("no tokenizer.json was found: the file takes token ids, not text")
        return {"tokenizer.ggml.model": "none"}
    raw = json.loads(file.read_bytes())
    bpe = raw.get("model", {})
    if bpe.get("type") != "BPE":
        written.notes.append(
            f"a tokenizer of type {bpe.get('type')} is not written: the file takes token ids, not text"
        )
        return {"tokenizer.ggml.model": "none"}
    tokens: list[str] = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    for token, i in bpe["vocab"].items():
        if i < vocabulary:
            tokens[i] = token
            types[i] = _BYTE if bpe.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else _NORMAL
    for added in raw.get("added_tokens", ()):
        if added["id"] < vocabulary:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added.get("special") else _USER
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe.get("merges", ())]
    values: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if bpe.get("byte_fallback"):
        if bpe.get("unk_token") in bpe["vocab"]:
            types[bpe["vocab"][bpe["unk_token"]]] = _UNKNOWN
        values |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": _scores(bpe, merges, vocabulary)}
    else:
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        values["tokenizer.ggml.pre"] = _split_name(raw.get("pre_tokenizer") or {}, written)
    return values | _special(folder, raw, tokens)


def _scores(bpe: dict[str, Any], merges: list[str], vocabulary: int) -> list[float]:
    """Scores of a sentencepiece model, which merges what scores best: minus the number of a token's first merge."""
    scores = [0.0] * vocabulary
    for rank, merge in reversed(list(enumerate(merges))):
        made = bpe["vocab"].get(merge.replace(" ", ""))
        if made is not None and made < vocabulary:
            scores[made] = -1.0 - rank
    return scores


def _split_name(pre: dict[str, Any], written: Written) -> str:
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    patterns = [str(step.get("pattern", {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    for part, name in _SPLITS:
        if any(part in pattern for pattern in patterns):
            return name
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    written.notes.append(
        "how the tokenizer splits text has no known name in llama.cpp: text may be split otherwise there"
    )
    return "default"


def _special(folder: Path, raw: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    number = {token: i for i, token in reversed(list(enumerate(tokens)))}
    values: dict[str, Any] = {}
    for theirs, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in number:
            values[f"tokenizer.ggml.{theirs}_token_id"] = number[token]
    adds = json.dumps(raw.get("post_processor") or {})
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    values["tokenizer.ggml.add_bos_token"] = bool(config.get("add_bos_token", bool(bos) and json.dumps(bos) in adds))
    values["tokenizer.ggml.add_space_prefix"] = '"Prepend"' in json.dumps(raw.get("normalizer") or {})
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(text, str):
        values["tokenizer.chat_template"] = text
    return values
