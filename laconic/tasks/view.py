"""What a model reads and says, as far as its class and its config tell, to check data against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from laconic.errors import BadInput

from .readers import Data
from .zoo import load_tokenizer

__all__ = ["ModelView"]

CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
KINDS = {"input_ids": "text", "pixel_values": "images", "input_values": "sound", "input_features": "sound"}


@dataclass
class ModelView:
    """What a model reads and says, as far as its class and config tell.

    Attributes:
        name: of the model, for messages.
        source: its source.
        kind: the class's name.
        main: its main input's name; None for a plain module.
        mixed: it needs text and images together.
        classes: number of classes of a classifier, else None.
        label2id: the config's class names.
    """

    name: str
    source: Any
    kind: str
    main: str | None
    mixed: bool
    classes: int | None
    label2id: Mapping[str, int]
    tokenizer: Any

    @classmethod
    def of(cls, source: Any, tokenizer: Any) -> ModelView:
        """What a source's config and skeleton say."""
        model, config = source.skeleton(), source.config
        kind = type(model).__name__
        known = config is not None
        modalities = getattr(model, "input_modalities", ())
        mixed = known and {"text", "image"} <= set(
            (modalities,) if isinstance(modalities, str) else modalities or ()
        )
        return cls(
            source.name,
            source,
            kind,
            main=getattr(model, "main_input_name", "input_ids") if known else None,
            mixed=mixed and not kind.endswith((*LANGUAGE_MODELS, "ForConditionalGeneration")),
            classes=config.num_labels if known and kind.endswith(CLASSIFIERS) else None,
            label2id=dict(config.label2id or {}) if known else {},
            tokenizer=tokenizer,
        )

    @property
    def writes(self) -> bool:
        """Whether it is a causal language model."""
        return self.kind.endswith(LANGUAGE_MODELS)

    def expect(self, main: str, data: Data) -> None:
        """Refuse data of a modality that the model does not read."""
        held, reads = KINDS[main], KINDS.get(self.main or "", self.main)
        if self.mixed:
            raise BadInput(
                f"{data.name} holds {held}, but {self.name} ({self.kind}) reads text and images together: "
                "give an NPZ file with arrays named after its inputs"
            )
        if self.main is not None and self.main != main:
            want = {"text": "a text, JSONL, CSV or Parquet file", "images": "a folder of images"}.get(
                reads, "an NPZ file"
            )
            raise BadInput(
                f"{data.name} holds {held}, but {self.name} ({self.kind}) reads {reads} ({self.main}): give "
                f"{want}"
            )

    def get_tokenizer(self, data: Data) -> Any:
        """The tokenizer given, or else the one that lies with the model."""
        if self.tokenizer is not None:
            return self.tokenizer
        folder = getattr(self.source, "folder", None)
        if folder is None and getattr(self.source, "file", None) is not None:  # a GGUF file brings its own
            folder = self.source.file.parent
        if folder is None:
            raise BadInput(
                f"{data.name} holds text, but {self.name} ({self.kind}) has no tokenizer with it: give a "
                "model folder "
                "that holds one, or token ids as an NPZ with input_ids"
            )
        return load_tokenizer(Path(folder))

    def positions(self) -> int | None:
        """The most tokens that the model can read, where its config says so."""
        return getattr(self.source.config, "max_position_embeddings", None)

    def check_ids(self, ids: Tensor, data: Data) -> None:
        """Refuse token ids that the model's embedding does not have."""
        rows = getattr(self.source.config, "vocab_size", None)
        if isinstance(rows, int) and ids.numel() and (int(ids.max()) >= rows or int(ids.min()) < 0):
            bad = int(ids.max()) if int(ids.max()) >= rows else int(ids.min())
            raise BadInput(
                f"{data.name}: token id {bad} is outside the {rows} tokens of {self.name}; is the tokenizer "
                "its own?"
            )
