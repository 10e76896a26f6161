"""Answers of a model, compressed or float, to what a user types: text goes on, texts become vectors, inputs get labels.

    model       `open_model`: an artifact, or any model that `compress` takes; `verb_for`: what it is made for
    generate    text after a prompt, token by token, with the speed of prefill and decoding apart
    embed       a vector of unit length for each text, pooled as sentence-transformers' files say
    predict     labels with probabilities of texts, images or tensors
    answer      all of it in one call, as `laconic run` makes it
    texts       from the command line, a file or standard input to texts, and from texts to batches of tokens

Who runs models uses these from here.
"""

from __future__ import annotations

from .answer import Answer, answer
from .embed import Embeddings, embed
from .generate import Generation, generate
from .model import VERBS, Opened, check_verb, open_model, verb_for
from .predict import Predictions, predict

__all__ = [
    "VERBS", "Answer", "Embeddings", "Generation", "Opened", "Predictions", "answer", "check_verb", "embed", "generate",
    "open_model", "predict", "verb_for",
]  # fmt: skip
