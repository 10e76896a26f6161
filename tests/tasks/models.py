"""Tiny models, tokenizers and texts for the tests of tasks, and a stand-in for the pipeline's source."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from laconic.tasks.tiny_lm import train_tokenizer

TEXT = "the whale swam past the old ship and the captain saw the white whale in the cold sea"
WORDS = TEXT.split()
VOCABULARY = 300


def sentences(n: int) -> list[str]:
    """n different short texts."""
    return [" ".join(WORDS[(i + 3 * j) % len(WORDS)] for j in range(5 + i % 7)) + f" {i}" for i in range(n)]


def tokenizer() -> Any:
    return train_tokenizer(sentences(50), VOCABULARY)


def seeded(build: Any, *args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args).eval()


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def llama() -> nn.Module:
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=64, **SMALL)
    return seeded(LlamaForCausalLM, config)


def bert() -> nn.Module:
    return seeded(BertModel, BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SMALL))


def bert_classifier(classes: int = 3, names: list[str] | None = None) -> nn.Module:
    more = {"num_labels": classes}
    if names is not None:
        more = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SMALL, **more)
    return seeded(BertForSequenceClassification, config)


def vit() -> nn.Module:
    config = ViTConfig(image_size=16, patch_size=8, num_labels=2, **SMALL)
    return seeded(ViTForImageClassification, config)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return seeded(T5ForConditionalGeneration, config)


class PixelNet(nn.Module):
    """A classifier of images by their mean colour; plain, without a config."""

    def __init__(self, classes: int = 2):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean((2, 3)))


class StubSource:
    """The part of `laconic.pipeline.source.Source` that tasks use."""

    def __init__(self, model: nn.Module, folder: Path | None = None, example: tuple | None = None):
        self.model, self.name, self.config = model, "m", getattr(model, "config", None)
        self._example = example
        if folder is not None:
            self.folder = folder

    def skeleton(self) -> nn.Module:
        return copy.deepcopy(self.model).to("meta")

    def example(self) -> tuple:
        return self._example or ((), {})


def source(model: nn.Module, folder: Path | None = None, *example: torch.Tensor) -> StubSource:
    return StubSource(model, folder, (example, {}))


def with_tokenizer(model: nn.Module, folder: Path) -> StubSource:
    """A source whose folder holds a tokenizer."""
    tokenizer().save_pretrained(folder)
    return StubSource(model, folder)
