"""Small drawn models for tests of formats, and what other programs say to the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.kernels.inputs import int8_tensor
from laconic.numerics import Scheme
from laconic.pipeline.source import resolve
from tests.pipeline.artifacts import round_records, write_artifact

IDS = [3, 17, 5, 250, 9, 9, 44, 101, 7, 64]
SIZES = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def drawn(family: str = "Llama", *, tied: bool = False, seed: int = 0, **more: Any) -> nn.Module:
    """A language model with random weights, in eval mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more}, tie_word_embeddings=tied)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.08)
    return model


def rounded_to(model: nn.Module, folder: Path, scheme: str, *, head: bool = True) -> Path:
    """The artifact of a model whose matrices are all rounded to a scheme; without the head and the embedding if told so."""
    source = resolve(model)
    records = round_records(source, Scheme.parse(scheme))
    kept = [r for r in records if head or not r.path.startswith(("lm_head", "model.embed_tokens"))]
    return write_artifact(folder, source, kept)


def static_inputs(model: nn.Module, folder: Path) -> Path:
    """The artifact of a model whose blocks are int8 and round their inputs by a scale of each layer."""
    source = resolve(model)
    records = round_records(source, Scheme.parse("v1/int8/channel/float32/minmax/znone/nearest"))
    kept = [r for r in records if not r.path.startswith(("lm_head", "model.embed_tokens"))]
    for i, record in enumerate(kept):
        record.data["spec"]["inputs"] = int8_tensor(0.02 + 0.01 * i)
    return write_artifact(folder, source, kept)


@torch.no_grad()
def logits(model: Any, ids: list[int] = IDS) -> Tensor:
    """(tokens, vocabulary) float32."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def in_llama_cpp(file: Path, ids: list[int] = IDS) -> Tensor:
    """What llama.cpp says to the same tokens, with keys and values in float32."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    try:
        llama.eval(ids)
        return torch.from_numpy(np.array(llama.scores[: len(ids)], np.float32))
    finally:
        llama.close()


def off(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
