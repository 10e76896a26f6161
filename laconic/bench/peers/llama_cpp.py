"""llama.cpp through llama-cpp-python: its products by ggml, and whole models from a GGUF file that is written here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.bench.contest import Ready, contestant
from laconic.bench.machine import INT8
from laconic.bench.problems import LanguageModel, Product

from . import _ggml

__all__: list[str] = []

NEEDS = ("llama_cpp",)
# The types in which it stores what we store as...
KINDS = {
    "int8": ("Q8_0",), "int4": ("Q4_0",), "int3": ("Q3_K",), "int2": ("Q2_K",), "ternary": ("TQ2_0",),
    "binary": ("TQ2_0", "Q1_0"),
}  # fmt: skip


def _kind(kind: str) -> Callable[[Any], str | None]:
    def when(problem: Product | LanguageModel) -> str | None:
        kinds = KINDS[problem.weights]
        return None if kind in kinds else f"{problem.weights} weights are stored as {' or '.join(kinds)}"

    return when


def _register(kind: str) -> None:
    @contestant(f"llama.cpp {kind}", "llama_cpp", Product, needs=NEEDS, when=_kind(kind))
    def product(problem: Product) -> Ready:
        packed = _ggml.quantized(problem.weight.numpy(), kind)
        turns = problem.turns(packed.nbytes)
        products = _ggml.Products(packed, kind, problem.x.numpy(), turns, problem.threads)
        answer = lambda _: torch.from_numpy(products.first())  # noqa: E731
        return Ready(products, packed.nbytes, turns, answer, INT8, f"weights in {products.buffer}", products.close)


for _name in sorted({name for names in KINDS.values() for name in names}):
    _register(_name)


@contestant("llama.cpp Q4_0", "llama_cpp", LanguageModel, needs=(*NEEDS, "gguf"), when=_kind("Q4_0"))
def four_bits(problem: LanguageModel) -> Ready:
    """All linear layers and the head in Q4_0."""
    return _model(problem, "Q4_0")


@contestant("llama.cpp TQ2_0", "llama_cpp", LanguageModel, needs=(*NEEDS, "gguf"), when=_kind("TQ2_0"))
def ternary(problem: LanguageModel) -> Ready:
    """All linear layers and the head in TQ2_0."""
    return _model(problem, "TQ2_0")


def _model(problem: LanguageModel, kind: str) -> Ready:
    import llama_cpp

    folder = tempfile.TemporaryDirectory(prefix="laconic-bench-")
    path = Path(folder.name) / "model.gguf"
    stored = write_gguf(problem, path, kind)
    llama = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_threads=problem.threads, n_threads_batch=problem.threads,
        verbose=False, logits_all=False,
    )  # fmt: skip
    ids = problem.ids[0].tolist()
    context, new = ids[: problem.context], ids[problem.context :]
    if context:
        llama.eval(context)

    def turn() -> None:
        llama.n_tokens = problem.context  # what stands behind is taken out of the cache by eval
        llama.eval(new)

    def logits(_: Any) -> Tensor:
        found = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(problem.vocabulary,))
        return torch.from_numpy(found.copy()).unsqueeze(0)

    def close() -> None:
        llama.close()
        folder.cleanup()

    return Ready(turn, stored, answer=logits, peak=INT8, note=f"all of it in {kind}", close=close)


def write_gguf(problem: LanguageModel, path: Path, kind: str) -> int:
    """Write the float model with its linear layers in one of ggml's types; returns their bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(problem.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(problem.width)
    writer.add_feed_forward_length(problem.hidden)
    writer.add_head_count(problem.heads)
    writer.add_head_count_kv(problem.heads)
    writer.add_layer_norm_rms_eps(problem.model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(problem.width // problem.heads)
    writer.add_vocab_size(problem.vocabulary)
    writer.add_tokenizer_model("none")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    linears, stored = LanguageModel.linears(problem.model), 0
    for full, value in problem.model.named_parameters():
        owner = full.removesuffix(".weight")
        parts = owner.split(".", 3)
        name = outer.get(owner) or f"blk.{parts[2]}.{names[parts[3]]}"
        array = value.detach().numpy()
        if owner not in linears:
            writer.add_tensor(f"{name}.weight", array.astype(np.float16) if array.ndim == 2 else array)
            continue
        if name.endswith(("attn_q", "attn_k")):
            array = _paired(array, problem.heads)
        packed = _ggml.quantized(array, kind)
        stored += packed.nbytes
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary positions, which turn neighbours and not the two halves of a head."""
    n, k = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k))
